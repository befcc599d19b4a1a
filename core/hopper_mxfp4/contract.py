"""The contract between those who call a kernel and those who implement one.

It imports nothing that is built on it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from hopper_mxfp4.checkpoint.families import CheckpointFamily
    from hopper_mxfp4.checkpoint.swiglu import SwiGLU

NEUTRAL_SCALE = 127  # E8M0 byte for 1.0
GREATEST_SCALE = 254  # the greatest one; 255 is NaN
BLOCK = 32  # values that share one E8M0 scale, along K (OCP Microscaling Formats v1.0, section 5)
# What tokens may be multiplied as, and what logs call it; reference/moe.py defines them.
ACTIVATIONS = {"bf16": "BF16", "fp8": "FP8 in groups of 128 columns"}
WORKSPACE_ALIGNMENT = 256  # bytes, on a GPU: FlashInfer wants 128, torch's CUDA allocator gives 512
Repack = Callable[[torch.Tensor], torch.Tensor]


class KernelUnavailable(RuntimeError):
    """A kernel cannot serve this layer here; the message says why and what to do."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one rank's experts; hidden_size and intermediate_size are unpadded."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


def same_bytes(t: torch.Tensor) -> torch.Tensor:
    return t


class Packing(NamedTuple):
    """What a `Layout` does with one projection's bytes; its fields are those of `Layout`."""

    pack_weight: Repack
    pack_scale: Repack
    unpack_weight: Repack
    unpack_scale: Repack


@dataclass(frozen=True)
class Layout:
    """How a kernel wants its bytes.

    name: identifies the arrangement; a kernel refuses weights prepared under another name.
    multiple: H and I are padded to it, each half of w13 on its own.
    pack_weight, pack_scale: from uint8 [e, rows, K/2] or [e, rows, K/32] to the kernel's
        arrangement of the same bytes, expert by expert: any shape whose first dimension is e. May
        return its argument.
    unpack_weight, unpack_scale: their inverses, in plain torch, on any device.
    w13: the same four for w13, whose rows are [up; gate], where it is arranged otherwise than w2;
        None: as w2.
    least_scale: the smallest E8M0 byte that the kernel multiplies by exactly. Below it weights must
        be zero.
    greatest_scale: the greatest such byte. Above it there must be none.
    greatest_spread: how far apart a row's E8M0 bytes may be for it to be exact.
    padding_scale: the byte that padding is filled with.
    """

    name: str
    multiple: int
    pack_weight: Repack = same_bytes
    pack_scale: Repack = same_bytes
    unpack_weight: Repack = same_bytes
    unpack_scale: Repack = same_bytes
    least_scale: int = 0
    w13: Packing | None = None
    greatest_scale: int = GREATEST_SCALE
    greatest_spread: int = GREATEST_SCALE
    padding_scale: int = NEUTRAL_SCALE

    def packing(self, name: str) -> Packing:
        """Of the projection of that name, w13 or w2."""
        if name == "w13" and self.w13 is not None:
            return self.w13
        return Packing(self.pack_weight, self.pack_scale, self.unpack_weight, self.unpack_scale)


PLAIN = Layout("plain", BLOCK)


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """One layer's experts as a kernel reads them, made by `prepare_experts`.

    Every tensor's first dimension is E, the number of this rank's experts.
    shape: the true sizes. weight_dtype: what the checkpoint's weights were.
    With Ip and Hp the padded sizes: w13 [E, 2Ip, Hp/2], w2 [E, Hp, Ip/2] uint8; scales uint8 in the
    layout's shape; w13_bias [E, 2Ip], w2_bias [E, Hp] bf16 or None. w13's rows are [up; gate].
    alpha, beta, limit: SwiGLU's parameters, float32 [E]; limit None where there is no clamp.
    deterministic: equal calls give equal bytes: a token's experts are summed in a fixed order.
    batch_invariant: also, a token's bytes do not depend on the tokens beside it.
    ep_size: over how many ranks a token's experts are spread.
    activations: one of ACTIVATIONS.
    relies_on: what its kernel has seen of the weights, in words, and goes by in every call.
    plans: what kernels keep between calls. launch_plans: how calls run, by (tokens, top-k). Both
        empty when made.
    """

    kernel: "Kernel"
    layout: Layout
    family: "CheckpointFamily"
    swiglu: "SwiGLU"
    shape: LayerShape
    weight_dtype: torch.dtype
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    alpha: torch.Tensor
    beta: torch.Tensor
    limit: torch.Tensor | None
    deterministic: bool
    batch_invariant: bool = False
    ep_size: int = 1
    activations: str = "bf16"
    relies_on: set[str] = field(default_factory=set)
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    launch_plans: dict[tuple[int, int], "LaunchPlan"] = field(default_factory=dict, repr=False)

    def reset_constants(self) -> None:
        """Write alpha, beta and limit again, in place.

        For frameworks whose sleep mode drops a layer's memory and then reloads the weights alone.
        """
        for name in ("alpha", "beta", "limit"):
            values, value = getattr(self, name), getattr(self.swiglu, name)
            if values is not None:
                values.fill_(value)

    def go_on_after(self, reloaded: "PreparedExperts") -> None:
        """Serve the weights that were loaded anew and prepared, as `reloaded`, in the same memory.

        For frameworks whose CUDA graphs hold this one's constants, which are written again.
        Raises ValueError where this one's kernel relies on what no longer holds.
        """
        broken = self.relies_on - reloaded.relies_on
        if broken:
            raise ValueError(
                f"the weights that were loaded no longer have {', '.join(sorted(broken))}, by "
                f"which kernel {self.kernel.name} and captured CUDA graphs run this layer; restart "
                "the server with these weights"
            )
        self.reset_constants()


class Call(NamedTuple):
    """The tensors of one call.

    x [M, H] bf16, M > 0, any strides; topk_ids [M, K] int32 or int64, topk_weights [M, K] float32,
    any strides; out [M, H] bf16 contiguous; workspace uint8, at least `Kernel.workspace_bytes`, any
    content, on a GPU aligned to WORKSPACE_ALIGNMENT.
    expert_map: int32 [ids], contiguous: the local expert of each id. None: ids are local. Kernels
        are handed one only where they take it, see `Kernel`.
    """

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    out: torch.Tensor
    workspace: torch.Tensor
    expert_map: torch.Tensor | None = None

    def part(self, tokens: slice) -> "Call":
        """The call of some of its tokens, in the same workspace."""
        return self._replace(
            x=self.x[tokens],
            topk_ids=self.topk_ids[tokens],
            topk_weights=self.topk_weights[tokens],
            out=self.out[tokens],
        )


Run = Callable[[Call, PreparedExperts], None]  # writes the layer's output into call.out


class LaunchPlan(NamedTuple):
    """How calls of one number of tokens and top-k run: bytes of scratch, and what runs them."""

    workspace_bytes: int
    run: Run


class Compilation(NamedTuple):
    """Something to compile: function(*arguments), which leaves its result in a cache for whoever
    needs it later. Any thread may run it. Of equal ones one is run.
    """

    function: Callable[..., Any]
    arguments: tuple[Hashable, ...] = ()

    def run(self) -> None:
        self.function(*self.arguments)


class Kernel(Protocol):
    """One way to compute the fused MoE. Instances hold no per-layer state.

    name: what users and logs call it.
    auto_devices: device types on which kernel="auto" may choose it.
    activations: those of ACTIVATIONS that it computes with; it is asked for no others.

    One that reads `Call.expert_map` itself says so by an attribute takes_expert_map = True. The
    others' calls have local ids always.

    One that compiles may have a method compilations(shape: LayerShape), which returns a tuple or
    list of `Compilation`: all that a layer of that shape will need compiled, in the order in which
    it is best begun. It is called as soon as a layer's shape is known, on a device where the kernel
    serves it, which is before the layer's weights are loaded: threads then run what it lists. And
    `hopper-mxfp4 warmup` calls it, on machines without a GPU too.
    """

    name: str
    auto_devices: frozenset[str]
    activations: frozenset[str]

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        """Why it can't serve this layer on this device and what to do; None if it can.

        deterministic: whether equal calls must give equal bytes.
        """

    def layout(self, device: torch.device) -> Layout:
        """How it wants the weights. Called only where `unsupported_reason` gave None."""

    def warm_up(self, p: PreparedExperts) -> None:
        """Do what a prepared layer's first call would otherwise wait for, such as compiling."""

    def workspace_bytes(self, p: PreparedExperts, num_tokens: int, top_k: int) -> int:
        """Bytes of scratch that a call of up to this many tokens needs; 0 if none."""

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        """What runs p's calls of exactly so many tokens and experts a token.

        Asked once and kept, so what depends on these alone is best decided here: a call should cost
        the host little.
        """
