"""Kernels: one file each, behind this protocol. `policy.py` picks one."""

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from ..layout import Layout
from ..weights import LayerShape

if TYPE_CHECKING:
    from ..experts import PreparedExperts


WORKSPACE_ALIGNMENT = 256  # bytes, on a GPU: FlashInfer wants 128, torch's CUDA allocator gives 512


class KernelUnavailable(RuntimeError):
    """A kernel cannot serve this layer here; the message says why and what to do."""


class Kernel(Protocol):
    """One way to compute the fused MoE. Instances hold no per-layer state.

    name: what users and logs call it.
    auto_devices: device types on which kernel="auto" may choose it.
    """

    name: str
    auto_devices: frozenset[str]

    def why_not(self, shape: LayerShape, device: torch.device) -> str | None:
        """Why it can't serve this layer on this device and what to do, in a sentence; None if it can."""

    def layout(self, device: torch.device) -> Layout:
        """How it wants the weights on this device. Called only where `why_not` gave None."""

    def load(self, p: "PreparedExperts") -> None:
        """Do now, once a layer is prepared, what its first call would otherwise wait for, such as compiling."""

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        """Bytes of scratch that `run` needs for up to this many tokens; 0 if none."""

    def run(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        p: "PreparedExperts",
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """Write the layer's output into out.

        x [M, H] bf16, M > 0, any strides; topk_ids [M, K] int32 or int64, topk_weights [M, K] float32,
        any strides; out [M, H] bf16 contiguous; workspace uint8, at least `workspace_bytes`, any content,
        on a GPU aligned to WORKSPACE_ALIGNMENT.
        """


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "PreparedExperts", torch.Tensor, torch.Tensor], None]


def run_in_parts(
    run: Run,
    most: int,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    p: "PreparedExperts",
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """`Kernel.run` with at most so many tokens at a time, one part after the other in the same workspace."""
    if len(x) <= most:  # the common case slices nothing
        run(x, topk_ids, topk_weights, p, out, workspace)
        return
    for start in range(0, len(x), most):
        part = slice(start, start + most)
        run(x[part], topk_ids[part], topk_weights[part], p, out[part], workspace)


@cache
def say_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a line once a process, not once a layer."""
    logger.log(level, message)
