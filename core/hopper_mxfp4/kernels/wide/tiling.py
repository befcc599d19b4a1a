"""How wide cuts a layer: the macros that config.cuh lists, few tokens an expert or many."""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels.tiles.layout import BLOCK_ROWS
from hopper_mxfp4.kernels.wide import wgmma

SHARED_BYTES = 227 * 1024  # that a block may have on SM90
MAX_STAGES = 16
CHUNK = 8  # columns that a thread of route.cu copies or adds up at a time
PAIRS_PER_BLOCK = 1024  # that are sorted, one a thread
MAX_EXPERTS = PAIRS_PER_BLOCK  # so is an expert
SORTING_WARPS = PAIRS_PER_BLOCK // 32
GATHER_THREADS = 128
GATHER_CHUNKS = 8  # of a thread
GATHER_COLUMNS = GATHER_THREADS * GATHER_CHUNKS * CHUNK  # of a token, that a block copies
SUM_THREADS = 256
_BLOCK_BYTES = BLOCK_ROWS * BLOCK_ROWS // 2 + BLOCK_ROWS * 2  # of weights and scales
_BARRIERS = 192  # bytes of those of the four tiles taken ahead, with the tiles


@dataclass(frozen=True)
class Tiling:
    """One way to cut a layer's GEMMs; config.cuh says what each is.

    block_n, min_n, step_from, step_n: tokens of a tile. consumers: warpgroups. blocks: of each.
    every_lane_arrives: for compute-sanitizer's racecheck.

    packages: where its source is, in the first of them that has a file. kind: of wgmma.
    multiple: of H and I, as the layout pads them.
    """

    packages: ClassVar[tuple[str, ...]] = (__package__,)
    kind: ClassVar[wgmma.Kind] = wgmma.BF16
    multiple: ClassVar[int] = BLOCK_ROWS

    shape: LayerShape
    block_n: int = 192
    min_n: int = 32
    step_from: int = 64
    step_n: int = 8
    consumers: int = 3
    blocks: int = 1
    stages: int = MAX_STAGES
    run: int = 4
    consumer_registers: int = 160
    producer_registers: int = 32
    stagger: int = 0
    every_lane_arrives: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Of token tiles."""
        return self.min_n, *range(self.step_from, self.block_n + 1, self.step_n)

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def panel(self) -> int:
        """Blocks of weight rows that a block of threads multiplies."""
        return self.consumers * self.blocks

    @property
    def stage_bytes(self) -> int:
        """Of tokens, weights and scales."""
        return self.block_n * 128 + self.panel * _BLOCK_BYTES

    @property
    def shared_bytes(self) -> int:
        """Of a block that multiplies: `Shared` in shared.cuh."""
        stage = self.stage_bytes + 16
        return self.stages * stage + _BARRIERS + 16 * (self.shape.num_experts + 1)

    @property
    def sorting_shared_bytes(self) -> int:
        """Of a block of moe_sort: how many pairs of each expert come before each warp's."""
        return SORTING_WARPS * self.shape.num_experts * 2

    @property
    def hidden_padded(self) -> int:
        return round_up(self.shape.hidden_size, self.multiple)

    @property
    def intermediate_padded(self) -> int:
        return round_up(self.shape.intermediate_size, self.multiple)

    @property
    def h_bytes(self) -> int:
        """Of a row of what fc1 writes."""
        return 2 * self.intermediate_padded

    def token_tiles(self, pairs: int) -> int:
        """At most, in a call of so many pairs."""
        return min(pairs, self.shape.num_experts + pairs // self.block_n)

    def rows(self, pairs: int) -> int:
        """Of all token tiles, at most. An expert's only tile may have a step between the least
        widths too many, every further one an ordinary step.
        """
        first = max(self.step_n, self.min_n, self.step_from - self.min_n)
        experts = min(pairs, self.shape.num_experts)
        return pairs + experts * first + pairs // self.block_n * self.step_n

    def macros(self) -> dict[str, int]:
        return {
            "NUM_EXPERTS": self.shape.num_experts,
            "HIDDEN": self.shape.hidden_size,
            "INTER": self.shape.intermediate_size,
            "BLOCK_N": self.block_n,
            "MIN_N": self.min_n,
            "STEP_FROM": self.step_from,
            "STEP_N": self.step_n,
            "NUM_CONSUMERS": self.consumers,
            "CONSUMER_BLOCKS": self.blocks,
            "NUM_STAGES": self.stages,
            "RUN": self.run,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "PRODUCER_REGISTERS": self.producer_registers,
            "STAGGER": self.stagger,
            "EVERY_LANE_ARRIVES": int(self.every_lane_arrives),
        }


def cut_layer(shape: LayerShape) -> tuple[Tiling, Tiling]:
    """For few tokens an expert, and for many; with as many stages as shared memory holds.

    A block has 384 weight rows times up to 64 tokens, or 192 times up to 192. With few tokens, what
    counts is how often its warps wait for a stage. Each width takes NVRTC most of a second.
    """
    few = Tiling(shape, block_n=64, min_n=8, step_from=16, blocks=2, run=2)
    return with_stages(few), with_stages(Tiling(shape, stagger=2000))


Cut = TypeVar("Cut", bound=Tiling)


def with_stages(tiling: Cut) -> Cut:
    """With as many of its stages as shared memory holds."""
    while tiling.shared_bytes > SHARED_BYTES:
        tiling = replace(tiling, stages=tiling.stages - 1)
    return tiling
