"""The `narrow` kernel: our own, for few tokens an expert, on the tiles layout.

Two grouped GEMMs and a sum, in CUDA C++ (narrow.cu) compiled for a layer's sizes when it is
prepared. Sums are float32 and in a fixed order, and a token's result does not depend on its batch,
so that it is deterministic and batch invariant as it is. docs/dev/narrow-kernel.md says how it came
to be.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.contract import GREATEST_SCALE, LayerShape, Layout, Run
from hopper_mxfp4.kernels.gemms_and_sum import Compiled, make_runner, too_large, workspace_parts
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.narrow.launch import compiled, tokens_at_once
from hopper_mxfp4.kernels.narrow.tiling import segments
from hopper_mxfp4.kernels.support import hopper_problem
from hopper_mxfp4.kernels.tiles.layout import TILES

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

WIDE_FROM = 5  # pairs an expert, from which segments of 16 tokens are taken


class NarrowKernel:
    """Needs a Hopper GPU and NVRTC."""

    name = "narrow"
    auto_devices: frozenset[str] = frozenset()

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        if reason := hopper_problem(device) or nvrtc.problem():
            return reason
        return None if segments(shape) else too_large(shape)

    def layout(self, device: torch.device) -> Layout:
        """Scales multiply float32 sums here, so that all but byte 0 are exact."""
        return replace(TILES, least_scale=1, greatest_scale=GREATEST_SCALE)

    def warm_up(self, p: "PreparedExperts") -> None:
        for segment in segments(p.shape):
            compiled(p.shape, segment, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return workspace_parts(p.shape, tokens_at_once(num_tokens, top_k), top_k).end

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        by_segment = [compiled(p.shape, s, p.w13.device.index) for s in segments(p.shape)]
        pairs = WIDE_FROM * p.shape.num_experts * p.ep_size

        def compiled_for(tokens: int) -> Compiled:
            return by_segment[-1 if tokens * top_k > pairs else 0]

        return make_runner(compiled_for, num_tokens, top_k, tokens_at_once(num_tokens, top_k))
