"""Kernels: one file each, behind this protocol. `policy.py` picks one."""

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch

from ..layout import Layout
from ..weights import LayerShape

if TYPE_CHECKING:
    from ..experts import PreparedExperts


Key = TypeVar("Key")
Value = TypeVar("Value")
WORKSPACE_ALIGNMENT = 256  # bytes, on a GPU: FlashInfer wants 128, torch's CUDA allocator gives 512


class KernelUnavailable(RuntimeError):
    """A kernel cannot serve this layer here; the message says why and what to do."""


class Call(NamedTuple):
    """The tensors of one call.

    x [M, H] bf16, M > 0, any strides; topk_ids [M, K] int32 or int64, topk_weights [M, K] float32,
    any strides; out [M, H] bf16 contiguous; workspace uint8, at least `Kernel.workspace_bytes`, any content,
    on a GPU aligned to WORKSPACE_ALIGNMENT.
    """

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    out: torch.Tensor
    workspace: torch.Tensor

    def part(self, tokens: slice) -> "Call":
        """The call of some of its tokens, in the same workspace."""
        return Call(
            self.x[tokens],
            self.topk_ids[tokens],
            self.topk_weights[tokens],
            self.out[tokens],
            self.workspace,
        )


Run = Callable[[Call, "PreparedExperts"], None]  # writes the layer's output into call.out


class Kernel(Protocol):
    """One way to compute the fused MoE. Instances hold no per-layer state.

    name: what users and logs call it.
    auto_devices: device types on which kernel="auto" may choose it.
    """

    name: str
    auto_devices: frozenset[str]

    def why_not(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        """Why it can't serve this layer on this device and what to do, in a sentence; None if it can.

        deterministic: whether equal calls must give equal bytes.
        """

    def layout(self, device: torch.device) -> Layout:
        """How it wants the weights on this device. Called only where `why_not` gave None."""

    def load(self, p: "PreparedExperts") -> None:
        """Do now, once a layer is prepared, what its first call would otherwise wait for, such as compiling."""

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        """Bytes of scratch that a call of up to this many tokens needs; 0 if none."""

    def runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        """What runs p's calls of exactly so many tokens and experts a token.

        Asked once and kept, so what depends on these alone is best decided here: a call should cost the host little.
        """


def in_parts(make: Callable[[int], Run], num_tokens: int, most: int) -> Run:
    """A runner of calls of num_tokens that runs at most so many at a time, one part after the other in the same workspace.

    make(n): the runner of n tokens.
    """
    if num_tokens <= most:  # the common case slices nothing
        return make(num_tokens)
    whole, last = make(most), make(num_tokens % most or most)

    def run(call: Call, p: "PreparedExperts") -> None:
        for start in range(0, num_tokens, most):
            (whole if start + most <= num_tokens else last)(
                call.part(slice(start, start + most)), p
            )

    return run


def planned(
    p: "PreparedExperts", name: str, top_k: int, make: Callable[["PreparedExperts", int], Any]
) -> Any:
    """make(p, top_k), which is not None, once a layer and top-k: what the kernel of that name keeps in `p.plans`."""
    found = p.plans.get((name, top_k))
    if found is None:
        found = p.plans[name, top_k] = make(p, top_k)
    return found


def remember(kept: dict[Key, Value], key: Key, made: Value, most: int) -> Value:
    """Keep what was made under its key, and return it; where so many are kept already, start anew."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = made
    return made


@cache
def say_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a line once a process, not once a layer."""
    logger.log(level, message)
