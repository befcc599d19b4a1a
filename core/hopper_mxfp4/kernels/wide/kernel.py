"""The `wide` kernel: our own, for many tokens an expert, on weights in the tiles layout.

Routing on the device, both grouped GEMMs in one launch and a sum, in CUDA C++ compiled for a
layer's sizes when it is prepared. Sums are float32 and in a fixed order, which does not depend on
how wide a token's tile is, so that it is deterministic and batch invariant as it is.
docs/dev/wide-kernel.md says how it came to be.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.contract import Compilation, LayerShape, Layout, Run
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.support import hopper_problem, in_launches, tokens_of
from hopper_mxfp4.kernels.tiles.layout import MOST_FOR_BF16, TILES
from hopper_mxfp4.kernels.wide.launch import (
    Compiled,
    compile_cubins,
    compiled,
    launch,
    tokens_at_once,
    workspace_parts,
)
from hopper_mxfp4.kernels.wide.tiling import MAX_EXPERTS, cut_layer

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

# Pairs an expert up to which the cut for few tokens serves (docs/dev/wide-kernel.md, section 9).
FEW_PAIRS = 54


class WideKernel:
    """Needs a Hopper GPU and NVRTC."""

    name = "wide"
    auto_devices: frozenset[str] = frozenset()  # on request
    activations = frozenset({"bf16"})
    takes_expert_map = True
    few_pairs = FEW_PAIRS
    cut_layer = staticmethod(cut_layer)  # few tokens an expert, and many

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        if reason := hopper_problem(device):
            return reason
        if shape.num_experts > MAX_EXPERTS:
            return f"it takes up to {MAX_EXPERTS} experts a rank, and there are {shape.num_experts}"
        return nvrtc.problem()

    def layout(self, device: torch.device) -> Layout:
        return replace(TILES, greatest_scale=MOST_FOR_BF16)

    def compilations(self, shape: LayerShape) -> list[Compilation]:
        """The cut for many tokens first, which takes the longest."""
        cuts = reversed(self.cut_layer(shape))
        return [Compilation(compile_cubins, (tiling,)) for tiling in cuts]

    def warm_up(self, p: "PreparedExperts") -> None:
        for tiling in self.cut_layer(p.shape):
            compiled(tiling, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        """For any number of tokens up to so many: both cuts' where both may serve."""
        few, many = self.cut_layer(p.shape)
        tokens = tokens_at_once(num_tokens, top_k, self.name)
        of_few = min(tokens, tokens_of(p, self.few_pairs, top_k))
        return max(
            workspace_parts(few, of_few, top_k).end, workspace_parts(many, tokens, top_k).end
        )

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        few, many = (compiled(tiling, p.w13.device.index) for tiling in self.cut_layer(p.shape))
        few_tokens = tokens_of(p, self.few_pairs, top_k)

        def compiled_for(tokens: int) -> Compiled:
            return few if tokens <= few_tokens else many

        most = tokens_at_once(num_tokens, top_k, self.name)
        return in_launches(launch, compiled_for, num_tokens, top_k, most)
