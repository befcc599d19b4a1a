"""How a layer is cut for smallbatch: its two GEMMs, in tiles of tokens, warps and chunks."""

from dataclasses import dataclass, replace
from functools import cache

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels.flashinfer.kernel import MULTIPLE
from hopper_mxfp4.kernels.gemms_and_sum import blocks_per_sm, fits

BLOCK_K = 128  # values of a dot product that a warp takes at a time
MAX_STREAMERS = 16  # warps that share a dot product; more leave each too few registers
MAX_PAIRS = 4096  # tokens x top-k of a call: each block sorts them all


@dataclass(frozen=True)
class Gemm:
    """How one of the two GEMMs is cut: the macros that config.cuh lists, see there.

    rows: of the output. tile: tokens of an expert that are multiplied together.
    """

    gated: bool
    k: int
    rows: int
    experts: int
    tile: int
    streamers: int
    chunks_per_warp: int
    blocks_per_sm: int
    stages: int = 2

    @property
    def threads(self) -> int:
        finishers = self.tile // 8 * self.stages
        return 32 * (self.streamers + finishers)

    def macros(self) -> dict[str, int]:
        return {
            "GATED": int(self.gated),
            "K": self.k,
            "K_PADDED": round_up(self.k, MULTIPLE),
            "ROWS": self.rows,
            "ROWS_PADDED": round_up(self.rows, MULTIPLE),
            "NUM_EXPERTS": self.experts,
            "BLOCK_N": self.tile,
            "NUM_STREAMERS": self.streamers,
            "CHUNKS_PER_WARP": self.chunks_per_warp,
            "NUM_STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }

    def shared_bytes(self, pairs: int) -> int:
        """Dynamic shared memory of a block in a call of so many pairs: `Shared` in config.cuh."""
        x = 2 * round_up(self.k, BLOCK_K) * self.tile
        sums = self.stages * self.streamers * 2 * (self.tile // 8) * 512
        segments = min(pairs, self.experts + pairs // self.tile)
        return x + sums + 4 * self.experts + 4 * pairs + 8 * segments + 2 * pairs


def tile_gemm(gated: bool, k: int, rows: int, experts: int, tile: int) -> Gemm:
    """A GEMM of that size, with as many warps on a dot product as its chunks fill evenly."""
    chunks = round_up(k, BLOCK_K) // BLOCK_K
    chunks_per_warp = -(-chunks // MAX_STREAMERS)
    streamers = -(-chunks // chunks_per_warp)
    gemm = Gemm(gated, k, rows, experts, tile, streamers, chunks_per_warp, 1)
    return replace(gemm, blocks_per_sm=blocks_per_sm(gemm, MAX_PAIRS))


def tile_layer(shape: LayerShape, tile: int) -> tuple[Gemm, Gemm]:
    """fc1 and fc2 of a layer."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    return tile_gemm(True, h, i, e, tile), tile_gemm(False, i, h, e, tile)


@cache
def tiles(shape: LayerShape) -> tuple[int, ...]:
    """The tiles, in tokens, that a layer has kernels for; none where it is too large.

    Tiles of 16 need 128 registers a thread, or they are slower than two of 8.
    """
    small, large = tile_layer(shape, 8), tile_layer(shape, 16)
    if not fits(small, MAX_PAIRS):
        return ()
    wide = fits(large, MAX_PAIRS) and all(gemm.threads <= 512 for gemm in large)
    return (8, 16) if wide else (8,)
