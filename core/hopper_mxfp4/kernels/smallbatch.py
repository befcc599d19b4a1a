"""The `smallbatch` kernel: our own, for few tokens an expert, on the weights as the flashinfer kernel has them.

Two grouped GEMMs and a sum, in CUDA C++ (smallbatch.cu) compiled for a layer's sizes when it is prepared.
Sums are float32 and in a fixed order, and a token's result does not depend on its batch, so that it is
deterministic and batch invariant as it is. docs/kernels/smallbatch.md says how it came to be.
"""

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..layout import Layout
from ..weights import LayerShape, round_up
from ..workspace import raw_stream
from . import WORKSPACE_ALIGNMENT, nvrtc, run_in_parts
from .flashinfer import MULTIPLE, FlashInferKernel

if TYPE_CHECKING:
    from ..experts import PreparedExperts

CHUNK = 128  # values of a dot product that a warp takes at a time
MOST_WARPS = 16  # that share a dot product; more leave each too few registers
SM_SHARED_BYTES = 228 * 1024  # of SM90; a block takes RESERVED_BYTES beside its own
RESERVED_BYTES = 1024
SHARED_BYTES = SM_SHARED_BYTES - RESERVED_BYTES  # a block's most
STATIC_SHARED_BYTES = 512  # of which the source's own variables
MOST_PAIRS = 4096  # tokens x top-k of a call: each block sorts them all
MOST_TOP_K = 64  # bits of a mask
PAIRS_OF_NT1 = 5  # up to so many pairs an expert, tiles of 8 tokens beat tiles of 16 (docs/kernels/smallbatch.md)


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
        padded = {name: round_up(size, MULTIPLE) for name, size in (("KP", self.k), ("ROWSP", self.rows))}
        sizes = {"GATED": int(self.gated), "K": self.k, "ROWS": self.rows, "E": self.experts}
        return sizes | padded | {"NT": self.nt, "WK": self.warps, "CH": self.chunks_a_warp, "BUFS": self.buffers, "CTAS": self.blocks}

    def shared_bytes(self, pairs: int) -> int:
        """Dynamic shared memory of a block in a call of so many pairs: x, sums, and the lists of who is where."""
        x = round_up(self.k, CHUNK) // CHUNK * 2048 * self.nt
        sums = self.buffers * self.warps * 2 * self.nt * 512
        segments = min(pairs, self.experts + pairs // (8 * self.nt))
        return x + sums + 4 * round_up(pairs, 4) + 8 * segments + 2 * pairs


def cut(gated: bool, k: int, rows: int, experts: int, nt: int) -> Gemm:
    """A GEMM of that size over 8 nt tokens at a time: as many warps on a dot product as its chunks fill evenly."""
    chunks = round_up(k, CHUNK) // CHUNK
    each = -(-chunks // MOST_WARPS)
    warps = -(-chunks // each)
    one = Gemm(gated, k, rows, experts, nt, warps, each, 1)
    # Small shards: more blocks an SM until enough loads are in flight, as far as registers (96 a thread) and memory allow.
    memory = one.shared_bytes(MOST_PAIRS) + STATIC_SHARED_BYTES + RESERVED_BYTES
    blocks = min(-(-12 // warps), 20 // (one.threads // 32), SM_SHARED_BYTES // memory)
    return replace(one, blocks=max(blocks, 1))


def cuts(shape: LayerShape, nt: int) -> tuple[Gemm, Gemm]:
    """fc1 and fc2 of a layer."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    return cut(True, h, i, e, nt), cut(False, i, h, e, nt)


def fits(gemms: tuple[Gemm, ...]) -> bool:
    return all(gemm.shared_bytes(MOST_PAIRS) + STATIC_SHARED_BYTES <= SHARED_BYTES for gemm in gemms)


class _Args(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("w", "scale", "bias", "x", "ids", "topw", "out")]
    _fields_ += [(name, ctypes.c_int) for name in ("pairs", "top_k", "x_stride", "ids64", "ids_s0", "ids_s1", "topw_s0", "topw_s1")]
    _fields_ += [(name, ctypes.c_float) for name in ("alpha", "beta", "limit")]


class _SumArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("partial", "ids", "out")]
    _fields_ += [(name, ctypes.c_int) for name in ("top_k", "ids64", "ids_s0", "ids_s1")]


class Compiled(NamedTuple):
    """A layer's functions on one device, for tiles of 8 nt tokens."""

    gemms: tuple[Gemm, Gemm]
    functions: tuple[Any, Any, Any]  # fc1, fc2, sum
    multiprocessors: int
    configs: dict[Any, tuple[Any, Any, Any]]  # by stream, pairs and tokens


class SmallBatchKernel:
    """Needs what the flashinfer kernel needs, and NVRTC."""

    name = "smallbatch"
    auto_devices: frozenset[str] = frozenset()  # the hybrid kernel takes it where it is the faster one
    _base = FlashInferKernel()

    def why_not(self, shape: LayerShape, device: torch.device) -> str | None:
        return self._base.why_not(shape, device) or self.beside_flashinfer(shape, device)

    def beside_flashinfer(self, shape: LayerShape, device: torch.device) -> str | None:
        """`why_not` where the flashinfer kernel can serve."""
        reason = nvrtc.problem()
        if reason:
            return reason
        if not tiles(shape):
            return f"hidden size {shape.hidden_size} or intermediate size {shape.intermediate_size} is too large for its shared memory"
        layout = self.layout(device).name
        return None if layout == "flashinfer-sm90-folded" else f"it reads the folded scale layout, and this FlashInfer makes {layout}"

    def layout(self, device: torch.device) -> Layout:
        return self._base.layout(device)

    def load(self, p: "PreparedExperts") -> None:
        for nt in tiles(p.shape):
            compiled(p.shape, nt, p.w13.device.index)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return sum(_parts(p.shape, _tokens_at_once(num_tokens, top_k), top_k))

    def run(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        p: "PreparedExperts",
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        run_in_parts(_run, _tokens_at_once(*topk_ids.shape), x, topk_ids, topk_weights, p, out, workspace)


def _tokens_at_once(tokens: int, top_k: int) -> int:
    if top_k > MOST_TOP_K:
        raise ValueError(f"topk_ids has {top_k} columns; the smallbatch kernel takes at most {MOST_TOP_K}, so use kernel='flashinfer'")
    return min(tokens, MOST_PAIRS // top_k)


def _parts(shape: LayerShape, tokens: int, top_k: int) -> tuple[int, ...]:
    """Bytes of the workspace's parts, aligned: x where it must be copied, fc1's rows in bf16, fc2's in float32."""
    pairs = tokens * top_k
    sizes = (2 * tokens * shape.hidden_size, 2 * pairs * shape.intermediate_size, 4 * pairs * shape.hidden_size)
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
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # torch makes the context when it first needs it
        (fc1,) = nvrtc.load(cubins[0], ("moe_gemm",), SHARED_BYTES - STATIC_SHARED_BYTES)
        fc2, total = nvrtc.load(cubins[1], ("moe_gemm", "moe_sum"), SHARED_BYTES - STATIC_SHARED_BYTES)
    return Compiled(gemms, (fc1, fc2, total), torch.cuda.get_device_properties(device_index).multi_processor_count, {})


def _configs(c: Compiled, stream: int, pairs: int, tokens: int) -> tuple[Any, Any, Any]:
    key = (stream, pairs, tokens)
    found = c.configs.get(key)
    if found is None:
        if len(c.configs) > 4096:
            c.configs.clear()
        fc1, fc2 = (
            nvrtc.launch_config((c.multiprocessors * gemm.blocks, 1), gemm.threads, gemm.shared_bytes(pairs), stream, early=not gemm.gated)
            for gemm in c.gemms
        )
        columns = c.gemms[1].rows
        found = fc1, fc2, nvrtc.launch_config((-(-columns // 512), tokens), 128, 0, stream, early=True)
        c.configs[key] = found
    return found


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _run(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    p: "PreparedExperts",
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    tokens, top_k = topk_ids.shape
    shape, pairs, device = p.shape, tokens * top_k, x.device
    nt = 1 if pairs <= PAIRS_OF_NT1 * shape.num_experts * p.ep_size or len(tiles(shape)) == 1 else 2
    c = compiled(shape, nt, device.index)
    copy_bytes, rows_bytes, _ = _parts(shape, tokens, top_k)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = workspace[: 2 * x.numel()].view(torch.bfloat16).view(x.shape).copy_(x)
    rows = workspace.data_ptr() + copy_bytes
    partial = rows + rows_bytes
    ids, ids64 = topk_ids.data_ptr(), topk_ids.dtype is torch.int64
    s = p.swiglu
    strides = (*topk_ids.stride(), *topk_weights.stride())
    rest = (strides[2], strides[3], s.alpha, s.beta, float("inf") if s.limit is None else s.limit)
    fc1 = _Args(
        p.w13.data_ptr(), p.w13_scale.data_ptr(), _address(p.w13_bias), x.data_ptr(), ids, None, rows,
        pairs, top_k, x.stride(0), ids64, strides[0], strides[1], *rest,
    )  # fmt: skip
    fc2 = _Args(
        p.w2.data_ptr(), p.w2_scale.data_ptr(), _address(p.w2_bias), rows, ids, topk_weights.data_ptr(), partial,
        pairs, top_k, shape.intermediate_size, ids64, strides[0], strides[1], *rest,
    )  # fmt: skip
    total = _SumArgs(partial, ids, out.data_ptr(), top_k, ids64, strides[0], strides[1])
    configs = _configs(c, raw_stream(device.index), pairs, tokens)
    for config, function, arguments in zip(configs, c.functions, (fc1, fc2, total), strict=True):
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))
        nvrtc.launch(config, function, ctypes.addressof(pointer))
