"""The `smallbatch` kernel: our own, for few tokens an expert, on the weights as the flashinfer
kernel has them.

Two grouped GEMMs and a sum, in CUDA C++ (smallbatch.cu) compiled for a layer's sizes when it is
prepared. Sums are float32 and in a fixed order, and a token's result does not depend on its batch,
so that it is deterministic and batch invariant as it is. docs/dev/smallbatch.md says how it came to
be.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from hopper_mxfp4.contract import LayerShape, Layout, Run
from hopper_mxfp4.kernels.crossover import Crossover, find_crossover
from hopper_mxfp4.kernels.flashinfer.kernel import FlashInferKernel
from hopper_mxfp4.kernels.gemms_and_sum import (
    MAX_TOP_K,
    Compiled,
    make_runner,
    too_large,
    workspace_parts,
)
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.smallbatch.launch import compiled, tokens_at_once
from hopper_mxfp4.kernels.smallbatch.tiling import tiles
from hopper_mxfp4.kernels.support import cached

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

__all__ = [
    "MAX_TOP_K",
    "REVISION",
    "SmallBatchKernel",
    "crossover",
    "tiles",
    "tiles_runner",
]

# What `tune` measured of this kernel holds for this revision of it. A change of the CUDA source, of
# how a layer is cut or of how it is launched makes another if it may change a time; a new name or
# comment does not. A test compares the code with what it was, and asks.
REVISION = 1


class TilePlan(NamedTuple):
    """How one layer's calls of one top-k run: with `wide` from so many tokens, else `narrow`."""

    wide_from: int
    narrow: Compiled
    wide: Compiled

    def compiled_for(self, tokens: int) -> Compiled:
        return self.wide if tokens >= self.wide_from else self.narrow


class SmallBatchKernel:
    """Needs what the flashinfer kernel needs, and NVRTC."""

    name = "smallbatch"
    auto_devices: frozenset[str] = frozenset()  # the hybrid kernel takes it where it is faster
    _base = FlashInferKernel()

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._base.unsupported_reason(shape, device) or self.beside_flashinfer(shape, device)

    def beside_flashinfer(self, shape: LayerShape, device: torch.device) -> str | None:
        """`unsupported_reason` where the flashinfer kernel can serve."""
        if device.type != "cuda":
            return f"it runs on a GPU, and the weights are on {device}"
        reason = nvrtc.problem()
        if reason:
            return reason
        if not tiles(shape):
            return too_large(shape)
        layout = self.layout(device).name
        if layout != "flashinfer-sm90-folded":
            return f"it reads the folded scale layout, and this FlashInfer makes {layout}"
        return None

    def layout(self, device: torch.device) -> Layout:
        return self._base.layout(device)

    def warm_up(self, p: "PreparedExperts") -> None:
        for tile in tiles(p.shape):
            compiled(p.shape, tile, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return workspace_parts(p.shape, tokens_at_once(num_tokens, top_k), top_k).end

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        plan: TilePlan = cached(p, self.name, top_k, make_plan)
        return make_runner(plan.compiled_for, num_tokens, top_k, tokens_at_once(num_tokens, top_k))


def make_plan(p: "PreparedExperts", top_k: int) -> TilePlan:
    """What is compiled for a layer, and where it changes tiles. Raises RuntimeError."""
    by_tile = [compiled(p.shape, tile, p.w13.device.index) for tile in tiles(p.shape)]
    return TilePlan(crossover(p, top_k).wide_from, by_tile[0], by_tile[-1])


def crossover(p: "PreparedExperts", top_k: int) -> Crossover:
    """Where a layer changes kernels and tiles; decided once a layer and top-k."""
    found: Crossover = cached(
        p,
        "crossover",
        top_k,
        lambda p, top_k: find_crossover(p, top_k, tiles(p.shape), REVISION),
    )
    return found


def tiles_runner(tile: int, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
    """`SmallBatchKernel.make_runner` with tiles of so many tokens, be they the faster or not."""
    by_tile = compiled(p.shape, tile, p.w13.device.index)
    return make_runner(lambda tokens: by_tile, num_tokens, top_k, tokens_at_once(num_tokens, top_k))
