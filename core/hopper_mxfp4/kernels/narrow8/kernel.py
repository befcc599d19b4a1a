"""The `narrow8` kernel: narrow with 8-bit activations (W4A8), on the weights that `wide8` reads.

Each warp quantises its part of x, and fc2's warps what fc1 wrote in float32, as they load it. Sums
are in a fixed order that does not depend on the tokens beside, so that it is deterministic and
batch invariant as it is. docs/dev/w4a8-kernel.md says how it came to be.
"""

import torch

from hopper_mxfp4.contract import Layout
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2


class Narrow8Kernel(NarrowKernel):
    """Needs a Hopper GPU and NVRTC."""

    name = "narrow8"
    activations = frozenset({"fp8"})
    gemm = Gemm8

    def layout(self, device: torch.device) -> Layout:
        return TILES_E5M2
