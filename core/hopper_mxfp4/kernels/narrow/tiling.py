"""How a layer is cut for narrow: its two GEMMs, in segments of tokens, warps and k-tiles."""

from dataclasses import dataclass, replace
from typing import ClassVar

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels.tiles.layout import TILES

MAX_STREAMERS = 16  # warps that share a dot product; more leave each too few registers
SLICES = 2  # of 16 weight rows, in a unit
MAX_PAIRS = 2048  # tokens x top-k of a call: each block sorts them all
SM_SHARED_BYTES = 228 * 1024  # of SM90; a block takes RESERVED_BYTES beside its own
RESERVED_BYTES = 1024
SHARED_BYTES = SM_SHARED_BYTES - RESERVED_BYTES  # a block's most
STATIC_SHARED_BYTES = 512  # of which the source's own variables


@dataclass(frozen=True)
class Gemm:
    """How one of the two GEMMs is cut: the macros that config.cuh lists, see there.

    rows: of the output. segment: tokens of an expert that are multiplied together.

    packages: where its source is, in the first of them that has a file. tile_k: values of a dot
    product that a warp takes at a time, to which the layout pads. tiles_per_warp_choices: k-tiles
    whose loads a warp has in flight, the better one first. hidden_bytes: of a number of what fc1
    writes.
    """

    packages: ClassVar[tuple[str, ...]] = (__package__,)
    tile_k: ClassVar[int] = TILES.multiple
    tiles_per_warp_choices: ClassVar[tuple[int, ...]] = (3, 4)
    hidden_bytes: ClassVar[int] = 2

    gated: bool
    k: int
    rows: int
    experts: int
    segment: int
    streamers: int
    tiles_per_warp: int
    blocks_per_sm: int
    stages: int = 2

    @property
    def threads(self) -> int:
        finishers = self.segment // 8 * self.stages
        return 32 * (self.streamers + finishers)

    @property
    def most_warps(self) -> int:
        """Of blocks that share an SM, each thread of which needs 96 registers."""
        return 20

    @property
    def units(self) -> int:
        """Of a segment."""
        return self.rows // (16 if self.gated else 32)

    def macros(self) -> dict[str, int]:
        return {
            "GATED": int(self.gated),
            "K": self.k,
            "ROWS": self.rows,
            "NUM_EXPERTS": self.experts,
            "BLOCK_N": self.segment,
            "NUM_STREAMERS": self.streamers,
            "TILES_PER_WARP": self.tiles_per_warp,
            "NUM_STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
        }

    @property
    def x_bytes(self) -> int:
        """Of a warp's part of x, with its factors."""
        return self.segment * (self.tiles_per_warp * self.tile_k * 2 + 16 + 4)

    def shared_bytes(self, pairs: int) -> int:
        """Dynamic shared memory of a block in a call of so many pairs: see moe_gemm."""
        x = self.streamers * self.x_bytes
        sums = self.stages * self.streamers * SLICES * (self.segment // 8) * 512
        segments = min(pairs, self.experts + pairs // self.segment)
        return x + sums + 4 * self.experts + 4 * pairs + 8 * segments + 2 * pairs


def cut_product(k: int, kind: type[Gemm] = Gemm) -> tuple[int, int]:
    """How many warps share a dot product, and how many k-tiles each of them has.

    The same for segments of any size: a token's sums must not depend on the tokens beside it.
    """
    tiles = round_up(k, kind.tile_k) // kind.tile_k
    choices = [n for n in kind.tiles_per_warp_choices if n <= tiles <= n * MAX_STREAMERS]
    # Of the choices, what has the fewest of them twice.
    per_warp = min(choices, key=lambda n: -tiles % n, default=-(-tiles // MAX_STREAMERS))
    return -(-tiles // per_warp), per_warp


def cut_gemm(
    gated: bool, k: int, rows: int, experts: int, segment: int, kind: type[Gemm] = Gemm
) -> Gemm:
    """A GEMM of that size."""
    streamers, tiles_per_warp = cut_product(k, kind)
    gemm = kind(gated, k, rows, experts, segment, streamers, tiles_per_warp, 1)
    # Small shards: more blocks an SM until enough loads are in flight, as far as registers and
    # memory allow.
    memory = gemm.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES + RESERVED_BYTES
    by_registers = gemm.most_warps // (gemm.threads // 32)
    blocks = min(-(-12 // streamers), by_registers, SM_SHARED_BYTES // memory)
    return replace(gemm, blocks_per_sm=max(blocks, 1))


def cut_layer(shape: LayerShape, segment: int, kind: type[Gemm] = Gemm) -> tuple[Gemm, Gemm]:
    """fc1 and fc2 of a layer."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    return cut_gemm(True, h, i, e, segment, kind), cut_gemm(False, i, h, e, segment, kind)


def segments(shape: LayerShape, kind: type[Gemm] = Gemm) -> tuple[int, ...]:
    """The sizes of segments, in tokens, that a layer has kernels for; none where it is too large.

    Segments of 16 leave large blocks too few registers: DeepSeek-V4-Flash's fc1, 640 threads of
    4 k-tiles, spills 94 and takes 1.7 times as long as with segments of 8; GPT-OSS's, 608 threads
    of 3 k-tiles, spills 19 and is the faster from 7 tokens an expert on.
    """
    if not _fit(cut_layer(shape, 8, kind)):
        return ()
    large = cut_layer(shape, 16, kind)
    serves = all(gemm.threads <= 512 or gemm.tiles_per_warp * gemm.tile_k <= 192 for gemm in large)
    return (8, 16) if serves and _fit(large) else (8,)


def _fit(gemms: tuple[Gemm, Gemm]) -> bool:
    return all(gemm.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES <= SHARED_BYTES for gemm in gemms)
