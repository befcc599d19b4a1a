"""The `wide8` kernel: our own with 8-bit activations (W4A8), on weights in the tiles-e5m2 layout.

Routing, both grouped GEMMs in one launch and a sum, as `wide` does; x is quantised where it is
copied, fc1's result where it is made. Sums are in a fixed order, which does not depend on how wide
a token's tile is, so that it is deterministic and batch invariant as it is. docs/dev/w4a8-kernel.md
says how it came to be.
"""

import torch

from hopper_mxfp4.contract import Layout
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide8.tiling import cut_layer


class Wide8Kernel(WideKernel):
    """Needs a Hopper GPU and NVRTC."""

    name = "wide8"
    activations = frozenset({"fp8"})
    # Pairs an expert up to which the cut for few tokens serves (docs/dev/w4a8-kernel.md).
    few_pairs = 40
    cut_layer = staticmethod(cut_layer)

    def layout(self, device: torch.device) -> Layout:
        return TILES_E5M2
