"""How a layer is cut for narrow8: as for narrow, in k-tiles twice as deep."""

from dataclasses import dataclass
from typing import ClassVar

from hopper_mxfp4.kernels.narrow.tiling import Gemm
from hopper_mxfp4.kernels.tiles.e5m2 import TILE_K

X_AT_ONCE = 4  # tokens whose x a warp has on its way


@dataclass(frozen=True)
class Gemm8(Gemm):
    """How one of the two GEMMs is cut."""

    packages: ClassVar[tuple[str, ...]] = (__package__, *Gemm.packages)
    tile_k: ClassVar[int] = TILE_K
    tiles_per_warp_choices: ClassVar[tuple[int, ...]] = (2, 1)
    hidden_bytes: ClassVar[int] = 4

    @property
    def most_warps(self) -> int:
        """Segments of 16 need 128 registers: their sums of a k-tile are kept apart as well."""
        return super().most_warps if self.segment == 8 else 16

    @property
    def x_bytes(self) -> int:
        """With a factor for each k-tile, and with x as it comes (tile.cuh)."""
        columns = self.tiles_per_warp * TILE_K
        as_it_comes = X_AT_ONCE * columns * (2 if self.gated else self.hidden_bytes)
        return self.segment * (columns * 2 + 16 + 4 * self.tiles_per_warp) + as_it_comes
