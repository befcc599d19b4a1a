"""What of wide needs no GPU: how layers are cut, that every cut compiles and keeps wgmma's operands
apart, what is launched, and preparing through the public functions.
"""

import ctypes
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_structs import Pairs, declared_fields
from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    allocate_weights,
    env,
    prepare_experts,
    restore_weights,
)
from hopper_mxfp4.arrange import restore_in_place
from hopper_mxfp4.contract import WORKSPACE_ALIGNMENT, Call
from hopper_mxfp4.kernels.jit import driver, nvrtc
from hopper_mxfp4.kernels.select import choose_kernel
from hopper_mxfp4.kernels.support import in_launches
from hopper_mxfp4.kernels.tiles.layout import TILES
from hopper_mxfp4.kernels.wide import kernel as kernel_module
from hopper_mxfp4.kernels.wide import launch
from hopper_mxfp4.kernels.wide import tiling as tiling_module
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide.launch import MAX_PAIRS, Compiled, workspace_parts
from hopper_mxfp4.kernels.wide.tiling import SHARED_BYTES, Tiling, cut_layer
from random_layers import FAMILIES, FAMILY_IDS, assert_restored, clone, random_weights
from sass import Instruction, disassemble, disassembler, overwritten_operands

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))
needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="no nvdisasm; pip install nvidia-cuda-nvdisasm"
)
CUDA = torch.device("cuda")

SHAPES = [
    (32, 2880, 2880),
    (128, 2880, 736),
    (32, 2880, 672),
    (32, 2880, 384),
    (32, 2880, 192),
    (256, 4096, 2048),
    (256, 4096, 256),
    (64, 7168, 576),
    (12, 512, 288),
    (1, 32, 32),
    (1024, 160, 96),
    (2, 16416, 64),
]
sizes = st.integers(1, 240).map(lambda n: 32 * n)
layers = st.builds(LayerShape, st.integers(1, 1024), sizes, sizes)


# ---- How it is cut ------------------------------------------------------------------------------


@given(layers)
def test_blocks_fit_the_gpu(shape):
    for tiling in cut_layer(shape):
        assert tiling.shared_bytes <= SHARED_BYTES
        assert replace(tiling, stages=tiling.stages + 1).shared_bytes > SHARED_BYTES
        assert tiling.stages >= 6
        assert tiling.run % 2 == 0
        # Those who multiply wait for ever for registers that the block was not started with.
        granted = (1 << 16) // tiling.threads // 8 * 8 * tiling.threads
        wanted = tiling.consumers * tiling.consumer_registers + tiling.producer_registers
        assert 128 * wanted <= granted


def test_tiles_taken_ahead_have_the_shared_memory_that_the_source_gives_them():
    """A barrier of each sort and the tile itself, for as many as shared.cuh says."""
    header = launch.gemm_source(cut_layer(LayerShape(8, 64, 64))[0]).headers["shared.cuh"]
    ahead, of_tile = (
        int(re.search(rf"constexpr int {name} = (\d+);", header)[1])
        for name in ("TILES_AHEAD", "TILE_BYTES")
    )
    assert ahead * (2 * 8 + of_tile) == tiling_module._BARRIERS


def test_the_sum_starts_when_the_sorting_has_ended():
    """It reads rows and experts before it waits: whoever lets it start has waited himself."""
    gemms = launch.gemm_source(cut_layer(LayerShape(8, 64, 64))[0]).text
    wait, start = map(gemms.index, ("wait_for_previous_kernel();", "launch_next_kernel();"))
    assert wait < start


@given(
    layers,
    st.lists(st.integers(0, 2000), min_size=1, max_size=64),
)
@settings(deadline=None)
def test_rows_and_token_tiles_are_enough(shape, pairs_of_experts):
    """As schedule.cuh cuts them."""
    pairs_of_experts = pairs_of_experts[: shape.num_experts]
    for tiling in cut_layer(shape):
        tiles = rows = 0
        for pairs in filter(None, pairs_of_experts):
            cut = -(-pairs // tiling.block_n)
            each = -(-pairs // cut)
            width = next(width for width in tiling.widths if width >= each)
            tiles, rows = tiles + cut, rows + cut * width
        pairs = sum(pairs_of_experts)
        assert tiles <= tiling.token_tiles(pairs)
        assert rows <= tiling.rows(pairs)


@given(layers, st.integers(1, 1024), st.integers(1, 64))
def test_parts_of_the_workspace(shape, tokens, top_k):
    """Aligned, one after the other, and large enough for calls of fewer tokens as well."""
    tiling, pairs = cut_layer(shape)[1], tokens * top_k
    parts = workspace_parts(tiling, tokens, top_k)
    rows = tiling.rows(pairs)
    sizes = (
        -(-pairs // 1024) * shape.num_experts * 4,
        pairs * 4,
        pairs * 4,
        pairs * 4,
        (shape.num_experts + 1) * 16,
        (1 + tiling.token_tiles(pairs)) * 4,
        rows * tiling.hidden_padded * 2,
        rows * tiling.intermediate_padded * 2,
    )
    for begin, end, size in zip(parts, parts[1:], sizes, strict=False):
        assert begin % WORKSPACE_ALIGNMENT == 0
        assert end - begin >= size
    fewer = workspace_parts(tiling, max(tokens // 2, 1), top_k)
    assert all(a <= b for a, b in zip(fewer, parts, strict=True))


@pytest.mark.parametrize(
    "name", ["CHUNK", "PAIRS_PER_BLOCK", "GATHER_THREADS", "GATHER_CHUNKS", "SUM_THREADS"]
)
def test_the_launches_sizes_are_the_sources(name):
    read = launch.route_source()
    text = "\n".join((read.text, *read.headers.values()))
    (value,) = re.findall(rf"^constexpr int {name} = (\d+);", text, re.M)
    assert int(value) == getattr(tiling_module, name)


def test_scratch_of_a_large_call():
    """No more however many tokens there are: they run in parts."""
    kernel, p = WideKernel(), SimpleNamespace(shape=LayerShape(32, 2880, 2880), ep_size=1)
    most = kernel.workspace_bytes(p, MAX_PAIRS // 4, 4)
    assert most < 850 << 20
    assert kernel.workspace_bytes(p, 1 << 20, 4) == most
    with pytest.raises(ValueError, match="65 columns; the wide kernel takes at most 64"):
        kernel.workspace_bytes(p, 1, 65)


# ---- Where it runs ------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as questions go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(nvrtc, "problem", lambda: None)


@pytest.mark.usefixtures("hopper")
def test_it_serves_a_hopper_gpu_on_request_alone(monkeypatch):
    kernel, shape = WideKernel(), LayerShape(32, 2880, 2880)
    assert kernel.unsupported_reason(shape, CUDA, deterministic=True) is None
    assert choose_kernel("wide", shape, CUDA).name == "wide"
    monkeypatch.setenv(env.KERNEL.name, "wide")
    assert choose_kernel("auto", shape, CUDA).name == "wide"
    monkeypatch.delenv(env.KERNEL.name)
    assert "cuda" not in kernel.auto_devices


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"is_available": lambda: False}, "torch sees no GPU"),
        (
            {
                "get_device_capability": lambda device=None: (10, 0),
                "get_device_name": lambda device=None: "Some GPU",
            },
            r"Some GPU has compute capability 10\.0",
        ),
    ],
)
def test_it_says_why_it_cannot(change, wanted, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(KernelUnavailable, match=f"kernel wide can't run: .*{wanted}"):
        choose_kernel("wide", LayerShape(32, 2880, 2880), CUDA)


@pytest.mark.usefixtures("hopper")
def test_it_says_what_it_lacks(monkeypatch):
    with pytest.raises(KernelUnavailable, match="up to 1024 experts a rank, and there are 1025"):
        choose_kernel("wide", LayerShape(1025, 64, 64), CUDA)
    with pytest.raises(KernelUnavailable, match="weights are on cpu"):
        choose_kernel("wide", LayerShape(32, 64, 64), torch.device("cpu"))
    monkeypatch.setattr(nvrtc, "problem", lambda: "NVRTC is missing; install it")
    with pytest.raises(KernelUnavailable, match="install it"):
        choose_kernel("wide", LayerShape(32, 64, 64), CUDA)


# ---- Preparing, restoring, reloading ------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Preparing needs no GPU."""
    monkeypatch.setattr(WideKernel, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(WideKernel, "warm_up", lambda *args: None)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("sizes", [(3, 2880, 96), (2, 128, 64), (2, 96, 160)])
def test_prepared_weights_are_restored_and_reloaded(sizes, family):
    w = random_weights(family, *sizes)
    p = prepare_experts(clone(w), family=family, swiglu=SwiGLU(), kernel="wide")
    assert (p.kernel.name, p.layout.name) == ("wide", TILES.name)
    assert_restored(restore_weights(p), w)
    allocated = allocate_weights(LayerShape(*sizes), family=family, device="cpu", kernel="wide")
    addresses = {name: t.data_ptr() for name, t in allocated.tensors().items()}
    for seed in range(2):
        w = random_weights(family, *sizes, seed=seed)
        for name, t in w.tensors().items():
            halves = 2 if name.startswith("w13") and family is DEEPSEEK_V4 else 1
            for to, piece in zip(
                getattr(allocated, name).chunk(halves, 1), t.chunk(halves, 1), strict=True
            ):
                to[tuple(slice(n) for n in piece.shape)] = piece
        q = prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel="wide")
        assert {name: getattr(q, name).data_ptr() for name in addresses} == addresses
        assert_restored(restore_weights(q), w)
        allocated = restore_in_place(q)


@pytest.mark.usefixtures("on_cpu")
def test_a_scale_it_cannot_multiply_by_is_refused():
    w = random_weights(GPT_OSS, 2, 64, 64)
    w.w2_scale[1, 3, 1] = 129
    with pytest.raises(ValueError, match=r"w2_scale\[1, 3, 1\] is 129; .* kernel wide cannot"):
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="wide")


# ---- Compiled -----------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_it_compiles(sizes, tmp_path, monkeypatch):
    """With two widths in place of all, which take a quarter of a minute."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    shape = LayerShape(*sizes)
    two = Tiling(shape, block_n=32, min_n=16, step_from=32, step_n=16, stages=6)
    route, gemms = launch.compile_cubins(two)
    for name in launch._FUNCTIONS:
        assert (name.encode() in route) != (name.encode() in gemms), name


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize("cut", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("sizes", [(32, 2880, 2880), (256, 4096, 2048)], ids=str)
def test_operands_of_wgmma_are_kept_until_it_has_read_them(sizes, cut, tmp_path, monkeypatch):
    """And the kernel neither spills nor waits for each wgmma, as ptxas makes it where it loses
    track.
    """
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    tiling = cut_layer(LayerShape(*sizes))[cut]
    cubin = tmp_path / "gemms.cubin"
    cubin.write_bytes(nvrtc.compile_cubin(launch.gemm_source(tiling), tiling.macros()))
    lines = disassemble(cubin)
    assert overwritten_operands(lines) == []
    text = "\n".join(lines)
    widths = {int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16", text)}
    assert widths == set(tiling.widths)
    assert not re.search(r"\b(STL|LDL)\b", text), "it spills"
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
    assert waits.count("1") == (tiling.run - 1) * len(tiling.widths)
    assert len(waits) <= (tiling.run + 2) * len(tiling.widths), "it waits for each group at once"


def test_the_scan_sees_what_it_looks_for():
    loop = """
    .section .text.f
            /*0000*/                   MOV R8, R1 ;
    .L_x_1:
            /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
            /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, R12, gdesc[UR4], R24, gsb0 ;
            /*0030*/                   {between}
            /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{pending} ;
            /*0050*/                   {after}
            /*0060*/              @P0  BRA `(.L_x_1) ;
            /*0070*/                   EXIT ;
    """

    def found(between="NOP ;", pending=0, after="NOP ;"):
        text = loop.format(between=between, pending=pending, after=after)
        return overwritten_operands([line.strip() for line in text.splitlines()])

    assert found() == []
    assert found(after="MOV R11, R2 ;") == []
    assert found(between="MOV R16, R8 ;") == []
    assert found(between="STS [R8], R12 ;") == []
    for write in ("MOV R11, R2", "LDS.128 R12, [R3]", "LOP3.LUT P1, R8, R2, R3, RZ, 0xc0, !PT"):
        assert found(between=f"{write} ;") == [write]
        assert found(pending=1, after=f"{write} ;") == [write]
    # A register that only the next time round is one of a wgmma in flight.
    assert found(pending=1, between="NOP ;", after="NOP ;") == []
    assert found(pending=1, after="LDS.64 R14, [R3] ;") == ["LDS.64 R14, [R3]"]
    assert Instruction(None, "IMAD.WIDE", "R10, R2, R3, R4").written() == {10, 11}


# ---- What is launched ---------------------------------------------------------------------------


class SortArgs(ctypes.Structure):
    _fields_ = [
        ("pairs", Pairs),
        *(
            (name, ctypes.c_void_p)
            for name in ("counts", "rows", "experts", "places", "slots", "arrivals")
        ),
        ("token_tiles", ctypes.c_int),
    ]


class GatherArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "rows", "places", "tokens", "h")),
        *((name, ctypes.c_longlong) for name in ("x_token_stride", "x_column_stride")),
        *((name, ctypes.c_int) for name in ("x_in_chunks", "top_k")),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("words", "scales", "tokens", "out")]


class GemmArgs(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("fc1", "fc2")),
        *((name, ctypes.c_void_p) for name in ("bias", "slots", "arrivals")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit")),
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("outputs", "rows", "experts", "bias")),
        *((name, ctypes.c_void_p) for name in ("topk_weights", "out")),
        *((name, ctypes.c_int) for name in ("num_tokens", "top_k")),
        *((name, ctypes.c_int) for name in ("weights_token_stride", "weights_choice_stride")),
    ]


KINDS = dict(
    zip(launch._FUNCTIONS, (SortArgs, SortArgs, GatherArgs, GemmArgs, SumArgs), strict=True)
)


@pytest.mark.parametrize(
    "kind", [Pairs, SortArgs, GatherArgs, Matrix, GemmArgs, SumArgs], ids=lambda k: k.__name__
)
def test_arguments_are_as_the_sources_declare_them(kind):
    """Names, order and types of its struct; what a call is given is read by these below."""
    sources = [launch.route_source(), launch.gemm_source(cut_layer(LayerShape(1, 64, 64))[0])]
    nested = {"Pairs": Pairs, "Matrix": Matrix}
    assert declared_fields(kind.__name__, *sources, nested=nested) == kind._fields_


def runner_of(compiled_for, tokens, top_k):
    most = launch.tokens_at_once(tokens, top_k, "wide")
    return in_launches(launch.launch, compiled_for, tokens, top_k, most)


@pytest.fixture
def launched(monkeypatch):
    """What the GPU would be handed: (function, its configuration, its arguments) of each launch."""
    seen = []

    def launched_by_driver(config, function, parameters):
        kind = KINDS[function]
        at = ctypes.c_void_p.from_address(parameters).value
        seen.append((function, config, kind.from_buffer_copy(kind.from_address(at))))

    monkeypatch.setattr(launch, "raw_stream", lambda index: 7)
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: (*args, *kwargs.values()))
    monkeypatch.setattr(driver, "launch", launched_by_driver)
    return seen


def layer(family=GPT_OSS, sizes=(8, 160, 96), limit=7.0):
    p = prepare_experts(
        random_weights(family, *sizes), family=family, swiglu=SwiGLU(1.5, 0.5, limit), kernel="wide"
    )
    return p, Compiled(cut_layer(p.shape)[1], tuple(KINDS), 0, 132, {})


def call_of(p, c, tokens, top_k, x=None, ids=None, weights=None, expert_map=None):
    workspace = torch.empty(workspace_parts(c.tiling, tokens, top_k).end, dtype=torch.uint8)
    hidden = p.shape.hidden_size
    return Call(
        torch.randn(tokens, hidden).bfloat16() if x is None else x,
        torch.zeros(tokens, top_k, dtype=torch.int32) if ids is None else ids,
        torch.rand(tokens, top_k) if weights is None else weights,
        torch.empty(tokens, hidden).bfloat16(),
        workspace,
        expert_map,
    )


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_what_is_launched(family, launched):
    p, c = layer(family, limit=None if family is DEEPSEEK_V4 else 7.0)
    tokens, top_k = 700, 3
    ids = torch.zeros(top_k, 2 * tokens, dtype=torch.int64).t()[::2]
    weights = torch.rand(tokens, 5)[:, :3]
    call = call_of(p, c, tokens, top_k, ids=ids, weights=weights)
    runner_of(lambda tokens: c, tokens, top_k)(call, p)
    assert [name for name, *_ in launched] == list(KINDS)
    count, sort, gather, gemms, total = (arguments for *_, arguments in launched)
    begin = call.workspace.data_ptr()
    parts = [begin + part for part in workspace_parts(c.tiling, tokens, top_k)]
    _, rows, experts, places, slots, arrivals, tokens_at, h, _ = parts

    assert bytes(count) == bytes(sort)
    assert (sort.counts, sort.rows, sort.experts) == tuple(parts[:3])
    assert (sort.places, sort.slots, sort.arrivals) == tuple(parts[3:6])
    assert sort.token_tiles == c.tiling.token_tiles(2100)
    pairs = sort.pairs
    assert pairs.topk_ids == ids.data_ptr()
    assert (pairs.num_pairs, pairs.top_k, pairs.ids_are_int64) == (2100, 3, 1)
    assert (pairs.ids_token_stride, pairs.ids_choice_stride) == (2, 1400)
    assert (pairs.expert_map, pairs.num_ids) == (None, 8)
    assert all(n * pairs.top_k_reciprocal >> 31 == n // 3 for n in range(2100))
    assert (gather.x, gather.x_token_stride, gather.x_column_stride) == (call.x.data_ptr(), 160, 1)
    assert (gather.x_in_chunks, gather.top_k) == (1, 3)
    assert (gather.rows, gather.places, gather.tokens, gather.h) == (rows, places, tokens_at, h)

    bias = (0, 0) if p.w13_bias is None else (p.w13_bias.data_ptr(), p.w2_bias.data_ptr())
    for matrix, weight, scale, source, target in (
        (gemms.fc1, p.w13, p.w13_scale, tokens_at, h),
        (gemms.fc2, p.w2, p.w2_scale, h, tokens_at),
    ):
        assert (matrix.words, matrix.scales) == (weight.data_ptr(), scale.data_ptr())
        assert (matrix.tokens, matrix.out) == (source, target)
    assert (gemms.bias or 0, total.bias or 0) == bias
    assert (gemms.slots, gemms.arrivals) == (slots, arrivals)
    assert (gemms.alpha, gemms.beta) == (1.5, 0.5)
    assert gemms.limit == (float("inf") if family is DEEPSEEK_V4 else 7.0)

    assert (total.outputs, total.rows, total.experts) == (tokens_at, rows, experts)
    assert (total.topk_weights, total.out) == (weights.data_ptr(), call.out.data_ptr())
    assert (total.num_tokens, total.top_k) == (700, 3)
    assert (total.weights_token_stride, total.weights_choice_stride) == (5, 1)

    configs = [config for _, config, _ in launched]
    assert [config[0] for config in configs] == [(3, 1), (3, 1), (700, 1), (132, 1), (55, 1)]
    assert [config[1] for config in configs] == [1024, 1024, 128, 512, 256]
    assert [config[2] for config in configs] == [0, 32 * 8 * 2, 0, c.tiling.shared_bytes, 0]
    assert {config[3] for config in configs} == {7}, "the current stream"
    assert [config[4] for config in configs] == [False, True, True, True, True]


@pytest.mark.usefixtures("on_cpu")
def test_whatever_reads_ids_is_given_the_expert_map(launched):
    p, c = layer()
    expert_map = torch.full((40,), -1, dtype=torch.int32)
    call = call_of(p, c, 2 * (MAX_PAIRS // 3), 3, expert_map=expert_map)
    runner_of(lambda tokens: c, len(call.x), 3)(call, p)
    pairs = [arguments.pairs for _, _, arguments in launched if hasattr(arguments, "pairs")]
    assert len(pairs) == 2 * 2, "of both that sort, twice"
    assert {(one.expert_map, one.num_ids) for one in pairs} == {(expert_map.data_ptr(), 40)}


@pytest.mark.usefixtures("on_cpu")
def test_few_pairs_are_counted_where_they_are_sorted(launched):
    p, c = layer()
    runner_of(lambda tokens: c, 512, 2)(call_of(p, c, 512, 2), p)
    assert [name for name, *_ in launched] == list(KINDS)[1:]
    assert [config[4] for _, config, _ in launched] == [False, True, True, True]


@pytest.mark.parametrize(
    ("tokens", "ep_size", "wanted"), [(432, 1, 0), (433, 1, 1), (1728, 4, 0), (1729, 4, 1)]
)
def test_which_cut_serves(tokens, ep_size, wanted, monkeypatch):
    """By the pairs an expert: 54 of 32 experts' are 432 tokens of top-4."""
    p = SimpleNamespace(
        shape=LayerShape(32, 64, 64), ep_size=ep_size, w13=SimpleNamespace(device=CUDA)
    )
    monkeypatch.setattr(kernel_module, "compiled", lambda tiling, index: tiling)
    monkeypatch.setattr(
        kernel_module, "in_launches", lambda _, compiled_for, n, *__: compiled_for(n)
    )
    assert WideKernel().make_runner(p, tokens, 4) == cut_layer(p.shape)[wanted]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("x", "in_chunks"),
    [
        (lambda t: t, 1),
        (lambda t: t.t().contiguous().t(), 0),
        (lambda t: torch.zeros(9, 200).bfloat16()[:, 8:168], 1),
        (lambda t: torch.zeros(9, 200).bfloat16()[:, 1:161], 0),
        (lambda t: torch.zeros(9, 163).bfloat16()[:, :160], 0),
        (lambda t: t[:1].expand(9, 160), 1),
    ],
    ids=["contiguous", "transposed", "aligned", "unaligned", "odd stride", "expanded"],
)
def test_strides_of_x(x, in_chunks, launched):
    p, c = layer()
    given = x(torch.zeros(9, 160).bfloat16())
    runner_of(lambda tokens: c, 9, 2)(call_of(p, c, 9, 2, x=given), p)
    arguments = next(arguments for name, _, arguments in launched if name == "moe_gather")
    assert arguments.x == given.data_ptr()
    assert (arguments.x_token_stride, arguments.x_column_stride) == given.stride()
    assert arguments.x_in_chunks == in_chunks


@pytest.mark.usefixtures("on_cpu")
def test_large_calls_run_in_parts(launched):
    p, c = layer(sizes=(2, 32, 32))
    top_k = 64
    most = MAX_PAIRS // top_k
    call = call_of(p, c, most, top_k)
    tokens = 2 * most + 3
    x = torch.zeros(tokens, 32).bfloat16()
    ids, weights = torch.zeros(tokens, top_k, dtype=torch.int32), torch.zeros(tokens, top_k)
    out = torch.empty_like(x)
    runner_of(lambda tokens: c, tokens, top_k)(Call(x, ids, weights, out, call.workspace), p)
    totals = [arguments for name, _, arguments in launched if name == "moe_sum"]
    assert [arguments.num_tokens for arguments in totals] == [most, most, 3]
    assert [arguments.out - out.data_ptr() for arguments in totals] == [0, 64 * most, 128 * most]


@pytest.mark.usefixtures("on_cpu")
def test_launches_are_kept_by_stream_and_size(launched, monkeypatch):
    p, c = layer()
    for tokens in (5, 5, 6):
        runner_of(lambda tokens: c, tokens, 2)(call_of(p, c, tokens, 2), p)
    monkeypatch.setattr(launch, "raw_stream", lambda index: 8)
    runner_of(lambda tokens: c, 5, 2)(call_of(p, c, 5, 2), p)
    assert list(c.launches) == [(7, 5, 2), (7, 6, 2), (8, 5, 2)]
