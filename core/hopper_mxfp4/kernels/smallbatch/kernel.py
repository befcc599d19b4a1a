"""The `smallbatch` kernel: our own, for few tokens an expert, on the weights as the flashinfer kernel has them.

Two grouped GEMMs and a sum, in CUDA C++ (smallbatch.cu) compiled for a layer's sizes when it is prepared.
Sums are float32 and in a fixed order, and a token's result does not depend on its batch, so that it is
deterministic and batch invariant as it is. docs/kernels/smallbatch.md says how it came to be.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import WORKSPACE_ALIGNMENT, Call, LayerShape, Layout, Run
from hopper_mxfp4.kernels.flashinfer.kernel import MULTIPLE, FlashInferKernel
from hopper_mxfp4.kernels.flashinfer.kernel import make_plan as flashinfer_plan
from hopper_mxfp4.kernels.jit import driver, nvrtc
from hopper_mxfp4.kernels.support import bounded_put, cached, chunked
from hopper_mxfp4.scratch import raw_stream
from hopper_mxfp4.tuning.tables import choose_smallbatch

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

# What `tune` measured of this kernel holds for this revision of it. A change of smallbatch.cu, of
# how a layer is cut or of how it is launched makes another if it may change a time; a new name or
# comment does not. A test compares the code with what it was, and asks.
REVISION = 1
CHUNK = 128  # values of a dot product that a warp takes at a time
MAX_WARPS = 16  # that share a dot product; more leave each too few registers
SM_SHARED_BYTES = 228 * 1024  # of SM90; a block takes RESERVED_BYTES beside its own
RESERVED_BYTES = 1024
SHARED_BYTES = SM_SHARED_BYTES - RESERVED_BYTES  # a block's most
STATIC_SHARED_BYTES = 512  # of which the source's own variables
MAX_PAIRS = 4096  # tokens x top-k of a call: each block sorts them all
MAX_TOP_K = 64  # bits of a mask
# For layers that `tune` has not measured, in pairs (tokens x top-k) an expert of the rank (docs/kernels/smallbatch.md): up to
# how many smallbatch beats flashinfer, by the tiles it has for the layer (beyond, experts with more pairs than a tile
# holds are read twice), and tiles of 8 tokens beat tiles of 16.
PAIRS_AN_EXPERT = {(1,): 5, (1, 2): 8}
PAIRS_OF_NARROW_TILES = 5


@dataclass(frozen=True)
class Gemm:
    """How one of the two GEMMs is cut: the macros of smallbatch.cu, see there."""

    gated: bool
    k: int
    rows: int
    experts: int
    nt: int
    warps: int
    chunks_a_warp: int
    blocks: int
    buffers: int = 2

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.nt * self.buffers)

    def macros(self) -> dict[str, int]:
        padded = {
            name: round_up(size, MULTIPLE) for name, size in (("KP", self.k), ("ROWSP", self.rows))
        }
        sizes = {"GATED": int(self.gated), "K": self.k, "ROWS": self.rows, "E": self.experts}
        return (
            sizes
            | padded
            | {
                "NT": self.nt,
                "WK": self.warps,
                "CH": self.chunks_a_warp,
                "BUFS": self.buffers,
                "CTAS": self.blocks,
            }
        )

    def shared_bytes(self, pairs: int) -> int:
        """Dynamic shared memory of a block in a call of so many pairs: x, sums, and the lists of who is where."""
        x = round_up(self.k, CHUNK) // CHUNK * 2048 * self.nt
        sums = self.buffers * self.warps * 2 * self.nt * 512
        segments = min(pairs, self.experts + pairs // (8 * self.nt))
        return x + sums + 4 * self.experts + 4 * pairs + 8 * segments + 2 * pairs


def cut(gated: bool, k: int, rows: int, experts: int, nt: int) -> Gemm:
    """A GEMM of that size over 8 nt tokens at a time: as many warps on a dot product as its chunks fill evenly."""
    chunks = round_up(k, CHUNK) // CHUNK
    each = -(-chunks // MAX_WARPS)
    warps = -(-chunks // each)
    one = Gemm(gated, k, rows, experts, nt, warps, each, 1)
    # Small shards: more blocks an SM until enough loads are in flight, as far as registers (96 a thread) and memory allow.
    memory = one.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES + RESERVED_BYTES
    blocks = min(-(-12 // warps), 20 // (one.threads // 32), SM_SHARED_BYTES // memory)
    return replace(one, blocks=max(blocks, 1))


def cuts(shape: LayerShape, nt: int) -> tuple[Gemm, Gemm]:
    """fc1 and fc2 of a layer."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    return cut(True, h, i, e, nt), cut(False, i, h, e, nt)


def fits(gemms: tuple[Gemm, ...]) -> bool:
    return all(gemm.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES <= SHARED_BYTES for gemm in gemms)


# smallbatch.cu's Args and SumArgs, and what a call hands the driver, in a row: pointers to the arguments of fc1, fc2
# and the sum, then these. Packing them all at once takes the host a third of the time that ctypes' structures take.
_ARGS, _SUM_ARGS = "7P8iI3f0P", "3P4i"
_CALL = struct.Struct(f"@3P{_ARGS}{_ARGS}{_SUM_ARGS}")
_FC1 = struct.calcsize("@3P")
_FC2, _SUM = _FC1 + struct.calcsize(f"@{_ARGS}"), _FC1 + 2 * struct.calcsize(f"@{_ARGS}")
_CallBytes = ctypes.c_char * _CALL.size
_POINTER = struct.calcsize("@P")
_INFINITY = float("inf")
_MAX_LAUNCHES = 4096  # that a layer's shape remembers


class Launches(NamedTuple):
    """What calls of one number of tokens on one stream have in common.

    rows, partial: bytes into the workspace, see `_parts`. magic: smallbatch.cu divides by top-k with it.
    """

    configs: tuple[Any, Any, Any]
    rows: int
    partial: int
    magic: int


class Compiled(NamedTuple):
    """A layer's functions on one device, for tiles of 8 nt tokens."""

    gemms: tuple[Gemm, Gemm]
    functions: tuple[Any, Any, Any]  # fc1, fc2, sum
    device_index: int
    multiprocessors: int
    launches: dict[tuple[int, int, int], Launches]  # by stream, tokens and top-k


class Switches(NamedTuple):
    """Where a layer changes kernels, in tokens of a call, and where that is from, in words.

    tokens: up to so many smallbatch is faster than flashinfer. wide_from: from so many tiles of 16 tokens than tiles of 8.
    """

    tokens: int
    wide_from: int
    where: str


class Plan(NamedTuple):
    """How one layer's calls of one top-k run: with `wide` from so many tokens, else with `narrow`."""

    wide_from: int
    narrow: Compiled
    wide: Compiled


class SmallBatchKernel:
    """Needs what the flashinfer kernel needs, and NVRTC."""

    name = "smallbatch"
    auto_devices: frozenset[str] = (
        frozenset()
    )  # the hybrid kernel takes it where it is the faster one
    _base = FlashInferKernel()

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._base.unsupported_reason(shape, device) or self.beside_flashinfer(shape, device)

    def beside_flashinfer(self, shape: LayerShape, device: torch.device) -> str | None:
        """`unsupported_reason` where the flashinfer kernel can serve."""
        if device.type != "cuda":
            return f"it runs on a GPU, and the weights are on {device}"
        reason = nvrtc.problem()
        if reason:
            return reason
        if not tiles(shape):
            return f"hidden size {shape.hidden_size} or intermediate size {shape.intermediate_size} is too large for its shared memory"
        layout = self.layout(device).name
        return (
            None
            if layout == "flashinfer-sm90-folded"
            else f"it reads the folded scale layout, and this FlashInfer makes {layout}"
        )

    def layout(self, device: torch.device) -> Layout:
        return self._base.layout(device)

    def warm_up(self, p: "PreparedExperts") -> None:
        for nt in tiles(p.shape):
            compiled(p.shape, nt, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return sum(_parts(p.shape, _tokens_at_once(num_tokens, top_k), top_k))

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        plan = cached(p, self.name, top_k, make_plan)
        return _runner(
            lambda tokens: plan.wide if tokens >= plan.wide_from else plan.narrow, num_tokens, top_k
        )


def _tokens_at_once(tokens: int, top_k: int) -> int:
    if top_k > MAX_TOP_K:
        raise ValueError(
            f"topk_ids has {top_k} columns; the smallbatch kernel takes at most {MAX_TOP_K}, so use kernel='flashinfer'"
        )
    return min(tokens, MAX_PAIRS // top_k)


def _parts(shape: LayerShape, tokens: int, top_k: int) -> tuple[int, ...]:
    """Bytes of the workspace's parts, aligned: x where it must be copied, fc1's rows in bf16, fc2's in float32."""
    pairs = tokens * top_k
    sizes = (
        2 * tokens * shape.hidden_size,
        2 * pairs * shape.intermediate_size,
        4 * pairs * shape.hidden_size,
    )
    return tuple(round_up(nbytes, WORKSPACE_ALIGNMENT) for nbytes in sizes)


@cache
def tiles(shape: LayerShape) -> tuple[int, ...]:
    """The nt that a layer has kernels for. Tiles of 16 tokens need 128 registers a thread, or they are slower than two of 8."""
    small, large = cuts(shape, 1), cuts(shape, 2)
    if not fits(small):
        return ()
    return (1, 2) if fits(large) and all(gemm.threads <= 512 for gemm in large) else (1,)


@cache
def source() -> str:
    return (resources.files(__package__) / "smallbatch.cu").read_text()


def compile_cubins(gemms: tuple[Gemm, Gemm]) -> list[bytes]:
    return [nvrtc.compile_cubin(source(), "smallbatch.cu", gemm.macros()) for gemm in gemms]


def compile_all(shape: LayerShape) -> None:
    """Have everything for a layer of that shape in the cache. Raises RuntimeError."""
    for nt in tiles(shape):
        compile_cubins(cuts(shape, nt))


@cache
def compiled(shape: LayerShape, nt: int, device_index: int) -> Compiled:
    """Compile (or take from the cache) and load what a layer of that shape needs. Raises RuntimeError."""
    gemms = cuts(shape, nt)
    cubins = compile_cubins(gemms)
    (fc1,) = driver.load(cubins[0], ("moe_gemm",), SHARED_BYTES - STATIC_SHARED_BYTES, device_index)
    fc2, total = driver.load(
        cubins[1], ("moe_gemm", "moe_sum"), SHARED_BYTES - STATIC_SHARED_BYTES, device_index
    )
    multiprocessors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return Compiled(gemms, (fc1, fc2, total), device_index, multiprocessors, {})


def switches(p: "PreparedExperts", top_k: int) -> Switches:
    """What `tune` measured for a layer, here or on another card, or else a guess.

    A rank of many counts the others' experts: most of its pairs are then holes.
    """
    plan = cached(p, FlashInferKernel.name, top_k, flashinfer_plan)
    experts = p.shape.num_experts * p.ep_size
    tokens = PAIRS_AN_EXPERT[tiles(p.shape)] * experts // top_k
    wide_from = PAIRS_OF_NARROW_TILES * experts // top_k + 1
    crossover = choose_smallbatch(plan.shape, plan.build, REVISION, plan.card)
    found, most, where = crossover.smallbatch, crossover.most, crossover.where
    if found is None:
        return Switches(
            tokens,
            wide_from,
            f"a guess by the pairs an expert: {where}; `hopper-mxfp4 tune` measures it",
        )
    # What does not change in any bucket is guessed beyond the last.
    most *= p.ep_size
    return Switches(
        max(tokens, most) if found.tokens is None else found.tokens * p.ep_size,
        max(wide_from, most + 1) if found.wide_from is None else found.wide_from * p.ep_size,
        where,
    )


def make_plan(p: "PreparedExperts", top_k: int) -> Plan:
    """Look up where a layer changes tiles and what is compiled for it. Raises RuntimeError."""
    compiled_for = [compiled(p.shape, nt, p.w13.device.index) for nt in tiles(p.shape)]
    return Plan(switches(p, top_k).wide_from, compiled_for[0], compiled_for[-1])


def tiles_runner(nt: int, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
    """`SmallBatchKernel.runner` with tiles of 8 nt tokens, be they the faster or not."""
    c = compiled(p.shape, nt, p.w13.device.index)
    return _runner(lambda tokens: c, num_tokens, top_k)


def _runner(of: Callable[[int], Compiled], num_tokens: int, top_k: int) -> Run:
    """of(tokens): what launches a part of so many."""
    return chunked(
        lambda tokens: partial(_launch, of(tokens), tokens, top_k),
        num_tokens,
        _tokens_at_once(num_tokens, top_k),
    )


def _launch(c: Compiled, tokens: int, top_k: int, call: Call, p: "PreparedExperts") -> None:
    x, topk_ids, topk_weights, out, workspace = call
    key = (raw_stream(c.device_index), tokens, top_k)
    launches = c.launches.get(key)
    if launches is None:
        launches = _launches(c, p.shape, *key)
    x_stride, x_step = x.stride()
    if x_step != 1 or x_stride % 8 or x.data_ptr() % 16:
        x = workspace[: 2 * x.numel()].view(torch.bfloat16).view(x.shape).copy_(x)
        x_stride = x.stride(0)
    scratch = workspace.data_ptr()
    rows, partial_sums = scratch + launches.rows, scratch + launches.partial
    ids, weights = topk_ids.data_ptr(), topk_weights.data_ptr()
    ids_are = (topk_ids.dtype is torch.int64, *topk_ids.stride())
    s = p.swiglu
    rest = (
        *ids_are,
        *topk_weights.stride(),
        launches.magic,
        s.alpha,
        s.beta,
        _INFINITY if s.limit is None else s.limit,
    )
    # The layer's own addresses are asked for as well, as FlashInfer does with the tensors it is handed.
    w13_bias = 0 if p.w13_bias is None else p.w13_bias.data_ptr()
    w2_bias = 0 if p.w2_bias is None else p.w2_bias.data_ptr()
    pairs = tokens * top_k
    packed = _CallBytes()  # a call's own: the driver has read it when it has launched
    at = ctypes.addressof(packed)
    _CALL.pack_into(
        packed, 0,
        at + _FC1, at + _FC2, at + _SUM,
        p.w13.data_ptr(), p.w13_scale.data_ptr(), w13_bias, x.data_ptr(), ids, 0, rows, pairs, top_k, x_stride, *rest,
        p.w2.data_ptr(), p.w2_scale.data_ptr(), w2_bias, rows, ids, weights, partial_sums, pairs, top_k, p.shape.intermediate_size, *rest,
        partial_sums, ids, out.data_ptr(), top_k, *ids_are,
    )  # fmt: skip
    (one, two, three), (fc1, fc2, total) = launches.configs, c.functions
    driver.launch(one, fc1, at)
    driver.launch(two, fc2, at + _POINTER)
    driver.launch(three, total, at + 2 * _POINTER)


def _launches(c: Compiled, shape: LayerShape, stream: int, tokens: int, top_k: int) -> Launches:
    pairs = tokens * top_k
    fc1, fc2 = (
        driver.launch_config(
            (c.multiprocessors * gemm.blocks, 1),
            gemm.threads,
            gemm.shared_bytes(pairs),
            stream,
            early=not gemm.gated,
        )
        for gemm in c.gemms
    )
    total = driver.launch_config((-(-c.gemms[1].rows // 512), tokens), 128, 0, stream, early=True)
    copy_bytes, rows_bytes, _ = _parts(shape, tokens, top_k)
    made = Launches((fc1, fc2, total), copy_bytes, copy_bytes + rows_bytes, -(-(2**31) // top_k))
    return bounded_put(c.launches, (stream, tokens, top_k), made, _MAX_LAUNCHES)
