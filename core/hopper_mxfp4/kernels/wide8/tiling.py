"""How wide8 cuts a layer: wide's macros and one of its own, few tokens an expert or many."""

from dataclasses import dataclass
from typing import ClassVar

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels.tiles.e5m2 import TILE_K
from hopper_mxfp4.kernels.tiles.layout import BLOCK_ROWS
from hopper_mxfp4.kernels.wide import wgmma
from hopper_mxfp4.kernels.wide.tiling import Tiling, with_stages

GROUP_BLOCKS = 4  # of w13, gate and up: a group of 128 columns of fc1's output
_BLOCK_BYTES = BLOCK_ROWS * TILE_K // 2 + BLOCK_ROWS * TILE_K // 32  # of weights and scales
_ROW_BYTES = TILE_K + 4  # of a token in a stage, with its scale


@dataclass(frozen=True)
class Tiling8(Tiling):
    """parts: blocks of rows that a warpgroup has at the tensor cores at once; run and stagger mean
    nothing here.
    """

    packages: ClassVar[tuple[str, ...]] = (__package__, *Tiling.packages)
    kind: ClassVar[wgmma.Kind] = wgmma.E5M2_E4M3
    multiple: ClassVar[int] = TILE_K

    consumers: int = 2
    blocks: int = 2
    consumer_registers: int = 232
    producer_registers: int = 40
    parts: int = 1

    @property
    def stage_bytes(self) -> int:
        """Tokens begin at multiples of 1024."""
        return round_up(self.block_n * _ROW_BYTES, 1024) + self.panel * _BLOCK_BYTES

    @property
    def shared_bytes(self) -> int:
        """And the magnitudes of consumer.cuh."""
        groups = self.panel // GROUP_BLOCKS
        return super().shared_bytes + 3 * groups * self.block_n * 4

    @property
    def h_bytes(self) -> int:
        return self.intermediate_padded // TILE_K * _ROW_BYTES

    def macros(self) -> dict[str, int]:
        return {**super().macros(), "NUM_PARTS": self.parts}


def cut_layer(shape: LayerShape) -> tuple[Tiling8, Tiling8]:
    """For few tokens an expert, and for many; with as many stages as shared memory holds.

    A block has 512 weight rows times up to 48 tokens, or 256 times up to 112: what registers hold.
    Fewer instructions for a weight are what counts, and whether the tensor cores are ever without
    work.
    """
    few = Tiling8(shape, block_n=48, min_n=8, step_from=16, blocks=4, parts=2)
    many = Tiling8(shape, block_n=112, min_n=16, step_from=32)
    return with_stages(few), with_stages(many)
