"""narrow's compiled functions, and what launches them: two grouped GEMMs and a sum."""

import ctypes
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hopper_mxfp4.contract import Call, LayerShape
from hopper_mxfp4.kernels import support
from hopper_mxfp4.kernels.jit import driver, nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.narrow.tiling import (
    MAX_PAIRS,
    SHARED_BYTES,
    STATIC_SHARED_BYTES,
    Gemm,
)
from hopper_mxfp4.kernels.support import PAIRS, bounded_put, offsets, packed_pairs
from hopper_mxfp4.scratch import raw_stream

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

MAX_TOP_K = 64  # bits of moe_sum's mask

# What a call hands the driver, in one piece: pointers to the arguments of fc1, fc2 and the sum,
# then these. Tests hold the formats against the structs of the CUDA source. Packing them all at
# once takes the host a third of the time that ctypes' structures take.
_POINTERS, _GEMM_ARGS, _SUM_ARGS = "3P", f"6P{PAIRS}3i3f0P", f"2P{PAIRS}"
_CALL = struct.Struct(f"@{_POINTERS}{_GEMM_ARGS}{_GEMM_ARGS}{_SUM_ARGS}")
_FC1 = struct.calcsize(f"@{_POINTERS}")
_FC2 = _FC1 + struct.calcsize(f"@{_GEMM_ARGS}")
_SUM = _FC2 + struct.calcsize(f"@{_GEMM_ARGS}")
_CallBytes = ctypes.c_char * _CALL.size
_POINTER = struct.calcsize("@P")
_INFINITY = float("inf")
_MAX_LAUNCHES = 4096  # that a layer's shape remembers


class Parts(NamedTuple):
    """Where a workspace's parts begin, behind x where it must be copied: fc1's rows in numbers of
    `Gemm.hidden_bytes`, fc2's in float32; and where they end. In bytes.
    """

    rows: int
    partial: int
    end: int


class Launches(NamedTuple):
    """What calls of one number of tokens on one stream have in common.

    configs: of fc1, fc2 and the sum. top_k_reciprocal: the source divides by top-k with it.
    """

    configs: tuple[Any, Any, Any]
    parts: Parts
    top_k_reciprocal: int


class Compiled(NamedTuple):
    """A layer's functions (fc1, fc2, sum) on one device, for one cut of it.

    launches: by stream, tokens and top-k.
    """

    gemms: tuple[Gemm, Gemm]
    functions: tuple[Any, Any, Any]
    device_index: int
    multiprocessors: int
    launches: dict[tuple[int, int, int], Launches]


def source(kind: type[Gemm] = Gemm) -> Source:
    own, *bases = kind.packages
    return sources.read(own, "narrow.cu", *bases)


def compile_cubins(gemms: tuple[Gemm, Gemm]) -> list[bytes]:
    """Compile both, or take them from the cache. Raises RuntimeError."""
    return [nvrtc.compile_cubin(source(type(gemm)), gemm.macros()) for gemm in gemms]


@cache
def compiled(gemms: tuple[Gemm, Gemm], device_index: int) -> Compiled:
    """Compile (or take from the cache) and load what a layer needs. Raises RuntimeError."""
    of_fc1, of_fc2 = compile_cubins(gemms)
    most_shared = SHARED_BYTES - STATIC_SHARED_BYTES
    (fc1,) = driver.load(of_fc1, ("moe_gemm",), most_shared, device_index)
    fc2, total = driver.load(of_fc2, ("moe_gemm", "moe_sum"), most_shared, device_index)
    multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return Compiled(gemms, (fc1, fc2, total), device_index, multiprocessors, {})


def tokens_at_once(tokens: int, top_k: int, kernel: str) -> int:
    """As in `support`. kernel: its name."""
    return support.tokens_at_once(kernel, MAX_TOP_K, MAX_PAIRS, tokens, top_k)


def workspace_parts(shape: LayerShape, tokens: int, top_k: int, kind: type[Gemm] = Gemm) -> Parts:
    """Of calls of up to so many tokens, launched together."""
    pairs = tokens * top_k
    _, *begins = offsets(
        (
            2 * tokens * shape.hidden_size,
            kind.hidden_bytes * pairs * shape.intermediate_size,
            4 * pairs * shape.hidden_size,
        )
    )
    return Parts(*begins)


def launch(c: Compiled, tokens: int, top_k: int, call: Call, p: "PreparedExperts") -> None:
    """Run a call of so many tokens, all at once."""
    x, _, topk_weights, out, workspace, _ = call
    key = (raw_stream(c.device_index), tokens, top_k)
    launches = c.launches.get(key)
    if launches is None:
        launches = _make_launches(c, p.shape, *key)
    x_stride, x_step = x.stride()
    if x_step != 1 or x_stride % 8 or x.data_ptr() % 16:
        x = workspace[: 2 * x.numel()].view(torch.bfloat16).view(x.shape).copy_(x)
        x_stride = x.stride(0)
    configs, (rows, partial_sums, _), top_k_reciprocal = launches
    scratch = workspace.data_ptr()
    rows += scratch
    partial_sums += scratch
    pairs = packed_pairs(call, p.shape.num_experts, top_k_reciprocal)
    swiglu = p.swiglu
    # What both GEMMs are told alike, behind x_stride.
    common = (
        *topk_weights.stride(),
        swiglu.alpha,
        swiglu.beta,
        _INFINITY if swiglu.limit is None else swiglu.limit,
    )
    # The layer's own addresses are asked for at every call, as FlashInfer does with the tensors it
    # is handed: they may have been given other memory.
    w13_bias = 0 if p.w13_bias is None else p.w13_bias.data_ptr()
    w2_bias = 0 if p.w2_bias is None else p.w2_bias.data_ptr()
    packed = _CallBytes()  # a call's own: the driver has read it when it has launched
    at = ctypes.addressof(packed)
    _CALL.pack_into(
        packed, 0,
        at + _FC1, at + _FC2, at + _SUM,
        # fc1's GemmArgs
        p.w13.data_ptr(), p.w13_scale.data_ptr(), w13_bias, x.data_ptr(), 0, rows,
        *pairs, x_stride, *common,
        # fc2's GemmArgs
        p.w2.data_ptr(), p.w2_scale.data_ptr(), w2_bias, rows, topk_weights.data_ptr(),
        partial_sums, *pairs, p.shape.intermediate_size, *common,
        # SumArgs
        partial_sums, out.data_ptr(), *pairs,
    )  # fmt: skip
    (fc1_config, fc2_config, sum_config), (fc1, fc2, total) = configs, c.functions
    driver.launch(fc1_config, fc1, at)
    driver.launch(fc2_config, fc2, at + _POINTER)
    driver.launch(sum_config, total, at + 2 * _POINTER)


def _make_launches(
    c: Compiled, shape: LayerShape, stream: int, tokens: int, top_k: int
) -> Launches:
    fc1, fc2 = (
        driver.launch_config(
            (c.multiprocessors * gemm.blocks_per_sm, 1),
            gemm.threads,
            gemm.shared_bytes(tokens * top_k),
            stream,
            early=not gemm.gated,
        )
        for gemm in c.gemms
    )
    column_blocks = -(-c.gemms[1].rows // 512)
    total = driver.launch_config((column_blocks, tokens), 128, 0, stream, early=True)
    parts = workspace_parts(shape, tokens, top_k, type(c.gemms[0]))
    made = Launches((fc1, fc2, total), parts, -(-(2**31) // top_k))
    return bounded_put(c.launches, (stream, tokens, top_k), made, _MAX_LAUNCHES)
