"""The `wide` kernel: our own, for many tokens an expert, on weights in the tiles layout.

Routing on the device, both grouped GEMMs in one launch and a sum, in CUDA C++ compiled for a
layer's sizes when it is prepared. Sums are float32 and in a fixed order, which does not depend on
how wide a token's tile is, so that it is deterministic and batch invariant as it is.
docs/dev/wide-kernel.md says how it came to be.
"""

from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.contract import LayerShape, Layout, Run
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.support import hopper_problem
from hopper_mxfp4.kernels.tiles.layout import TILES
from hopper_mxfp4.kernels.wide.launch import (
    compiled,
    make_runner,
    tokens_at_once,
    workspace_parts,
)
from hopper_mxfp4.kernels.wide.tiling import MAX_EXPERTS, tile_layer

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts


class WideKernel:
    """Needs a Hopper GPU and NVRTC."""

    name = "wide"
    auto_devices: frozenset[str] = frozenset()  # on request

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        if reason := hopper_problem(device):
            return reason
        if shape.num_experts > MAX_EXPERTS:
            return f"it takes up to {MAX_EXPERTS} experts a rank, and there are {shape.num_experts}"
        return nvrtc.problem()

    def layout(self, device: torch.device) -> Layout:
        return TILES

    def warm_up(self, p: "PreparedExperts") -> None:
        compiled(p.shape, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return workspace_parts(tile_layer(p.shape), tokens_at_once(num_tokens, top_k), top_k).end

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        return make_runner(compiled(p.shape, p.w13.device.index), num_tokens, top_k)
