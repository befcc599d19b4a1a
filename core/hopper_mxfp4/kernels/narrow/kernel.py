"""The `narrow` kernel: our own, for few tokens an expert, on the tiles layout.

Two grouped GEMMs and a sum, in CUDA C++ (narrow.cu) compiled for a layer's sizes when it is
prepared. Sums are float32 and in a fixed order, and a token's result does not depend on its batch,
so that it is deterministic and batch invariant as it is. docs/dev/narrow-kernel.md says how it came
to be.
"""

from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.contract import Compilation, LayerShape, Layout, Run
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.narrow.launch import (
    Compiled,
    compile_cubins,
    compiled,
    launch,
    tokens_at_once,
    workspace_parts,
)
from hopper_mxfp4.kernels.narrow.tiling import Gemm, cut_layer, segments
from hopper_mxfp4.kernels.support import hopper_problem, in_launches, tokens_of
from hopper_mxfp4.kernels.tiles.layout import TILES

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

SMALL_SEGMENT_PAIRS = 7  # an expert, up to which segments of 8 tokens are taken


class NarrowKernel:
    """Needs a Hopper GPU and NVRTC."""

    name = "narrow"
    auto_devices: frozenset[str] = frozenset()
    activations = frozenset({"bf16"})
    takes_expert_map = True
    gemm: type[Gemm] = Gemm  # how it cuts one

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        if reason := hopper_problem(device) or nvrtc.problem():
            return reason
        if segments(shape, self.gemm):
            return None
        sizes = f"hidden size {shape.hidden_size} or intermediate size {shape.intermediate_size}"
        return f"{sizes} is too large for its shared memory"

    def layout(self, device: torch.device) -> Layout:
        return TILES

    def compilations(self, shape: LayerShape) -> list[Compilation]:
        return [Compilation(compile_cubins, (gemms,)) for gemms in self._cuts(shape)]

    def warm_up(self, p: "PreparedExperts") -> None:
        self._compiled(p)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        tokens = tokens_at_once(num_tokens, top_k, self.name)
        return workspace_parts(p.shape, tokens, top_k, self.gemm).end

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        by_segment = self._compiled(p)
        small = tokens_of(p, SMALL_SEGMENT_PAIRS, top_k)

        def compiled_for(tokens: int) -> Compiled:
            return by_segment[0 if tokens <= small else -1]

        most = tokens_at_once(num_tokens, top_k, self.name)
        return in_launches(launch, compiled_for, num_tokens, top_k, most)

    def _compiled(self, p: "PreparedExperts") -> list[Compiled]:
        """By size of segments."""
        return [compiled(gemms, p.w13.device.index) for gemms in self._cuts(p.shape)]

    def _cuts(self, shape: LayerShape) -> list[tuple[Gemm, Gemm]]:
        """By size of segments; none where the layer is too large."""
        return [cut_layer(shape, segment, self.gemm) for segment in segments(shape, self.gemm)]
