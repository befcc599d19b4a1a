"""wide's compiled functions, and what launches them: routing, both GEMMs at once, and a sum."""

import ctypes
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels import support
from hopper_mxfp4.kernels.jit import driver, nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.support import PAIRS, bounded_put, offsets, packed_pairs
from hopper_mxfp4.kernels.wide import wgmma
from hopper_mxfp4.kernels.wide.tiling import (
    CHUNK,
    GATHER_COLUMNS,
    GATHER_THREADS,
    PAIRS_PER_BLOCK,
    SUM_THREADS,
    Tiling,
)
from hopper_mxfp4.scratch import raw_stream

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

MAX_TOP_K = 64  # up to which the source's division by top-k is exact
MAX_PAIRS = 1 << 16  # tokens x top-k of a launch: more would only take more scratch


# What a call hands the driver, in one piece: pointers to the arguments of the functions, then
# these. Tests hold the formats against the structs of the CUDA sources.
_FUNCTIONS = ("moe_count", "moe_sort", "moe_gather", "moe_gemms", "moe_sum")
_POINTERS = "4P"  # moe_count and moe_sort share theirs
_SORT_ARGS = f"{PAIRS}6Pi0P"
_GATHER_ARGS = "5P2q2i0P"
_GEMM_ARGS = "11P3f0P"
_SUM_ARGS = "6P4i0P"
_CALL = struct.Struct(f"@{_POINTERS}{_SORT_ARGS}{_GATHER_ARGS}{_GEMM_ARGS}{_SUM_ARGS}")
_SORT = struct.calcsize(f"@{_POINTERS}")
_GATHER = _SORT + struct.calcsize(f"@{_SORT_ARGS}")
_GEMM = _GATHER + struct.calcsize(f"@{_GATHER_ARGS}")
_SUM = _GEMM + struct.calcsize(f"@{_GEMM_ARGS}")
_CallBytes = ctypes.c_char * _CALL.size
_POINTER = struct.calcsize("@P")
_INFINITY = float("inf")
_MAX_LAUNCHES = 4096  # that a layer's shape remembers


class Parts(NamedTuple):
    """Where the workspace's parts begin, in bytes, and where the last one ends.

    int32: counts [blocks, E], rows [pairs], experts [pairs], slots [E + 1, 4], arrivals [1 + token
    tiles]. uint16: places [pairs, 2]. bf16: tokens [rows, H padded], in whose place fc2 writes its
    output, and h [rows, I padded].
    """

    counts: int
    rows: int
    experts: int
    places: int
    slots: int
    arrivals: int
    tokens: int
    h: int
    end: int


class Launches(NamedTuple):
    """What calls of one number of tokens on one stream have in common.

    configs: of _FUNCTIONS, None for one that is not launched. top_k_reciprocal: the source divides
        by top-k with it.
    """

    configs: tuple[Any, ...]
    parts: Parts
    token_tiles: int
    top_k_reciprocal: int


class Compiled(NamedTuple):
    """A layer's functions on one device, for one cut of it. launches: by stream, tokens and
    top-k.
    """

    tiling: Tiling
    functions: tuple[Any, ...]
    device_index: int
    multiprocessors: int
    launches: dict[tuple[int, int, int], Launches]


def tokens_at_once(tokens: int, top_k: int, kernel: str) -> int:
    """As in `support`. kernel: its name."""
    return support.tokens_at_once(kernel, MAX_TOP_K, MAX_PAIRS, tokens, top_k)


def gemm_source(tiling: Tiling) -> Source:
    read = sources.read(tiling.packages[0], "wide.cu", *tiling.packages[1:])
    wrappers = wgmma.header(tiling.widths, tiling.kind)
    return read._replace(headers={**read.headers, wgmma.NAME: wrappers})


def route_source(tiling: Tiling | type[Tiling] = Tiling) -> Source:
    return sources.read(tiling.packages[0], "route.cu", *tiling.packages[1:])


def compile_cubins(tiling: Tiling) -> tuple[bytes, bytes]:
    """Routing with the sum, and the GEMMs. Raises RuntimeError."""
    macros = tiling.macros()
    return (
        nvrtc.compile_cubin(route_source(tiling), macros),
        nvrtc.compile_cubin(gemm_source(tiling), macros),
    )


@cache
def compiled(tiling: Tiling, device_index: int) -> Compiled:
    """Compile (or take from the cache) and load what a layer needs. Raises RuntimeError."""
    route, gemms = compile_cubins(tiling)
    sort, count, gather, total = driver.load(
        route,
        ("moe_sort", "moe_count", "moe_gather", "moe_sum"),
        tiling.sorting_shared_bytes,
        device_index,
    )
    (both,) = driver.load(gemms, ("moe_gemms",), tiling.shared_bytes, device_index)
    multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return Compiled(tiling, (count, sort, gather, both, total), device_index, multiprocessors, {})


def workspace_parts(tiling: Tiling, tokens: int, top_k: int) -> Parts:
    """For calls of up to so many tokens, launched together."""
    pairs, experts = tokens * top_k, tiling.shape.num_experts
    rows = tiling.rows(pairs)
    return Parts._make(
        offsets(
            (
                4 * -(-pairs // PAIRS_PER_BLOCK) * experts,
                4 * pairs,
                4 * pairs,
                4 * pairs,
                16 * (experts + 1),
                4 * (1 + tiling.token_tiles(pairs)),
                2 * rows * tiling.hidden_padded,
                rows * tiling.h_bytes,
            )
        )
    )


def launch(c: Compiled, tokens: int, top_k: int, call: Call, p: "PreparedExperts") -> None:
    """Run a call of so many tokens, all at once."""
    x, _, topk_weights, out, workspace, _ = call
    key = (raw_stream(c.device_index), tokens, top_k)
    launches = c.launches.get(key)
    if launches is None:
        launches = _make_launches(c, *key)
    scratch = workspace.data_ptr()
    counts, rows, experts, places, slots, arrivals, rows_of_x, h, _ = (
        scratch + part for part in launches.parts
    )
    pairs = packed_pairs(call, p.shape.num_experts, launches.top_k_reciprocal)
    x_at, (x_stride, x_step) = x.data_ptr(), x.stride()
    swiglu = p.swiglu
    # The layer's own addresses are asked for at every call: they may have been given other memory.
    w13_bias = 0 if p.w13_bias is None else p.w13_bias.data_ptr()
    w2_bias = 0 if p.w2_bias is None else p.w2_bias.data_ptr()
    packed = _CallBytes()  # a call's own: the driver has read it when it has launched
    at = ctypes.addressof(packed)
    _CALL.pack_into(
        packed, 0,
        at + _SORT, at + _GATHER, at + _GEMM, at + _SUM,
        # SortArgs
        *pairs, counts, rows, experts, places, slots, arrivals, launches.token_tiles,
        # GatherArgs
        x_at, rows, places, rows_of_x, h, x_stride, x_step,
        x_step == 1 and not (x_stride % CHUNK or x_at % (2 * CHUNK)), top_k,
        # GemmArgs: fc1, fc2, the rest
        p.w13.data_ptr(), p.w13_scale.data_ptr(), rows_of_x, h,
        p.w2.data_ptr(), p.w2_scale.data_ptr(), h, rows_of_x,
        w13_bias, slots, arrivals, swiglu.alpha, swiglu.beta,
        _INFINITY if swiglu.limit is None else swiglu.limit,
        # SumArgs
        rows_of_x, rows, experts, w2_bias, topk_weights.data_ptr(), out.data_ptr(),
        tokens, top_k, *topk_weights.stride(),
    )  # fmt: skip
    count, sort, gather, gemms, total = c.functions
    count_config, sort_config, gather_config, gemms_config, sum_config = launches.configs
    if count_config is not None:
        driver.launch(count_config, count, at)
    driver.launch(sort_config, sort, at)
    driver.launch(gather_config, gather, at + _POINTER)
    driver.launch(gemms_config, gemms, at + 2 * _POINTER)
    driver.launch(sum_config, total, at + 3 * _POINTER)


def _make_launches(c: Compiled, stream: int, tokens: int, top_k: int) -> Launches:
    tiling, pairs = c.tiling, tokens * top_k
    blocks = -(-pairs // PAIRS_PER_BLOCK)
    parts_of_token = -(-tiling.hidden_padded // GATHER_COLUMNS)
    chunks = tokens * (tiling.shape.hidden_size // CHUNK)
    # A single block counts its pairs itself.
    launches = (  # grid, threads, shared memory
        ((blocks, 1), PAIRS_PER_BLOCK, 0) if blocks > 1 else None,
        ((blocks, 1), PAIRS_PER_BLOCK, tiling.sorting_shared_bytes),
        ((tokens, parts_of_token), GATHER_THREADS, 0),
        ((c.multiprocessors, 1), tiling.threads, tiling.shared_bytes),
        ((-(-chunks // SUM_THREADS), 1), SUM_THREADS, 0),
    )
    # The first has nothing of this call's to wait for, but the scratch is the last call's.
    first = next(launch for launch in launches if launch)
    made = Launches(
        tuple(
            launch and driver.launch_config(*launch, stream, early=launch is not first)
            for launch in launches
        ),
        workspace_parts(tiling, tokens, top_k),
        tiling.token_tiles(pairs),
        -(-(2**31) // top_k),
    )
    return bounded_put(c.launches, (stream, tokens, top_k), made, _MAX_LAUNCHES)
