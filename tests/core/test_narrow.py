"""What of the narrow kernel needs no GPU: that its addresses, fragments and arithmetic give the
dense product, followed in NumPy; how layers are cut; that every cut compiles; and what the driver
is handed of a call.
"""

import ctypes
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_structs import Pairs, declared_fields
from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, LayerShape, SwiGLU, env, prepare_experts
from hopper_mxfp4.bench.workloads import WORKLOADS, Workload, random_weights
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels.jit import driver, nvrtc
from hopper_mxfp4.kernels.narrow import kernel as kernel_module
from hopper_mxfp4.kernels.narrow import launch, tiling
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.narrow.tiling import MAX_PAIRS, Gemm
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))
sizes = st.integers(1, 240).map(lambda n: 32 * n)
CPU = torch.device("cpu")
NARROW = NarrowKernel()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class LaidOutForNarrow(ReferenceKernel):
    """The reference, with weights as the narrow kernel has them."""

    def layout(self, device):
        return NarrowKernel().layout(device)


def rotated_right(v, n):
    return v >> np.uint32(n) | v << np.uint32(32 - n)


def tile_pair(pair, word):
    """As tiles.cuh does it."""
    in_place = np.uint32(0x81C081C0)
    if pair == 0:
        return word & in_place
    if pair == 1:
        return rotated_right(word, 6) & in_place
    if pair == 2:
        return word << np.uint32(6) & in_place
    return (rotated_right(word, 4) & np.uint32(0x80C080C0)) | (
        word << np.uint32(4) & np.uint32(0x01000100)
    )


def bf16_pairs(words):
    """[..] words to [.., 2] numbers, low half first."""
    halves = np.stack((words << np.uint32(16), words & np.uint32(0xFFFF0000)), -1)
    return halves.view(np.float32).astype(np.float64)


def unit_products(weights, scales, x, unit, weight_rows):
    """The sums [2 slices, 16 rows, tokens] of a unit of one expert, by the kernel's addresses.

    weights, scales: the expert's bytes. x [tokens, K padded], float64.
    """
    lane = np.arange(32)
    sums = np.zeros((2, 16, len(x)))
    for tile in range(x.shape[1] // 64):
        for piece in range(2):
            at = tile * weight_rows * 32 + unit * 1024 + piece * 512 + lane * 16
            words = weights[at[:, None] + np.arange(16)].view("<u4")
            at = tile * weight_rows * 2 + unit * 64 + piece * 32 + lane // 4 * 4
            exponents = scales[at[:, None] + np.arange(4)].astype(np.float64) - 127
            for group in range(2):
                products = np.zeros((16, len(x)))
                for step in range(2):
                    a = np.zeros((16, 16))  # an A fragment of mma.m16n8k16, as PTX prescribes
                    for half in range(2):
                        for right in range(2):
                            pairs = bf16_pairs(
                                tile_pair(2 * step + right, words[:, 2 * group + half])
                            )
                            for i in range(2):
                                a[lane // 4 + 8 * half, 8 * right + lane % 4 * 2 + i] = pairs[:, i]
                    k = 64 * tile + 32 * group + 16 * step
                    products += a @ x[:, k : k + 16].T
                for half in range(2):
                    scale = 2.0 ** exponents[::4, 2 * group + half]
                    rows = slice(8 * half, 8 * half + 8)
                    sums[piece, rows] += products[rows] * scale[:, None]
    return sums * 2.0**126


def output_row(gated, unit, piece, row, half):
    """As finisher.cuh has it."""
    if gated:
        return 16 * unit + 8 * piece + row
    return 32 * unit + 16 * piece + 4 * (row // 2) + 2 * half + row % 2


def dense(weights, scales):
    """uint8 [rows, K/2] and [rows, K/32] to float64 [rows, K]."""
    values = np.stack((E2M1[weights & 15], E2M1[weights >> 4]), -1).reshape(len(weights), -1)
    return values * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)


@pytest.mark.parametrize("family", [GPT_OSS, DEEPSEEK_V4], ids=lambda f: f.name)
@pytest.mark.parametrize("sizes", [(160, 96), (64, 32), (32, 160)])
def test_addresses_and_fragments_give_the_dense_product(family, sizes):
    hidden, inter = sizes
    layer = Workload("odd", family, SwiGLU(), 2, 1, hidden, inter)
    w = random_weights(layer, CPU)
    p = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=LaidOutForNarrow())
    expert, rng = 1, np.random.default_rng(0)
    w13 = dense(w.w13[expert].numpy(), w.w13_scale[expert].numpy())
    gate, up = (
        (w13[0::2], w13[1::2]) if family.rows == "interleaved" else (w13[:inter], w13[inter:])
    )
    w2 = dense(w.w2[expert].numpy(), w.w2_scale[expert].numpy())
    for gated, k, rows in ((True, hidden, inter), (False, inter, hidden)):
        gemm = tiling.cut_gemm(gated, k, rows, 2, 8)
        x = np.zeros((3, round_up(k, 64)))
        x[:, :k] = rng.standard_normal((3, k))
        weights, scales = (p.w13, p.w13_scale) if gated else (p.w2, p.w2_scale)
        found = np.full((2, rows, 3), np.nan)
        for unit in range(gemm.units):
            sums = unit_products(
                weights[expert].reshape(-1).numpy(),
                scales[expert].reshape(-1).numpy(),
                x,
                unit,
                (1 + gated) * round_up(rows, 64),
            )
            for piece in range(2):
                for row in range(8):
                    for half in range(2):
                        to = output_row(gated, unit, piece, row, half)
                        found[half if gated else 0, to] = sums[piece, row + 8 * half]
        if gated:
            np.testing.assert_allclose(found[0], gate @ x[:, :k].T, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found[1], up @ x[:, :k].T, rtol=1e-12, atol=1e-12)
        else:
            np.testing.assert_allclose(found[0], w2 @ x[:, :k].T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Gemm, Gemm8])
@given(experts=st.integers(1, 512), hidden=sizes, intermediate=sizes)
def test_a_cut_covers_the_layer_and_fits_the_gpu(kind, experts, hidden, intermediate):
    shape = LayerShape(experts, hidden, intermediate)
    for segment in (8, 16):
        gemms = tiling.cut_layer(shape, segment, kind)
        for gemm, k, rows in zip(
            gemms, (hidden, intermediate), (intermediate, hidden), strict=True
        ):
            tiles = -(-k // kind.tile_k)
            assert gemm.tiles_per_warp <= tiles
            assert gemm.streamers * gemm.tiles_per_warp >= tiles
            assert (gemm.streamers - 1) * gemm.tiles_per_warp < tiles, "a warp without work"
            assert 1 <= gemm.streamers <= tiling.MAX_STREAMERS
            blocks = gemm.blocks_per_sm
            assert blocks * gemm.threads <= 20 * 32, "no 96 registers a thread"
            assert blocks == 1 or blocks * gemm.threads <= gemm.most_warps * 32
            assert gemm.units * (16 if gemm.gated else 32) == rows
            if segment in tiling.segments(shape, kind):
                block = gemm.shared_bytes(tiling.MAX_PAIRS) + tiling.STATIC_SHARED_BYTES
                assert block <= tiling.SHARED_BYTES
                assert (
                    gemm.blocks_per_sm * (block + tiling.RESERVED_BYTES) <= tiling.SM_SHARED_BYTES
                )


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (2880, (15, 3)),
        (4096, (16, 4)),
        (2048, (8, 4)),
        (7168, (16, 7)),
        (736, (4, 3)),
        (672, (4, 3)),  # the last warp has one of its neighbour's
        (192, (1, 3)),
        (32, (1, 1)),
    ],
)
def test_how_a_dot_product_is_cut(k, wanted):
    assert tiling.cut_product(k) == wanted


def test_segments_of_the_workloads():
    assert tiling.segments(WORKLOADS["gpt-oss-20b"].shape) == (8, 16)
    assert tiling.segments(WORKLOADS["dsv4-flash"].shape) == (8,)
    assert tiling.segments(LayerShape(600, 160, 96)) == (8, 16)
    assert not tiling.segments(LayerShape(8, 1 << 15, 2880))


def test_a_workspace_holds_every_part():
    parts = launch.workspace_parts(LayerShape(32, 2880, 736), 8, 4)
    assert parts.rows >= 2 * 8 * 2880
    assert parts.partial - parts.rows >= 2 * 32 * 736
    assert parts.end - parts.partial >= 4 * 32 * 2880
    assert not any(offset % 256 for offset in parts)


def test_it_takes_every_scale_but_byte_0():
    layout = NarrowKernel().layout(CPU)
    assert (layout.name, layout.least_scale) == ("tiles", 1)


def test_it_declines_a_cpu():
    assert "runs on a GPU" in NarrowKernel().unsupported_reason(LayerShape(8, 64, 64), CPU)


@needs_nvrtc
@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b-tp8", "dsv4-flash-tp8"])
def test_it_compiles(name, tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    for segment in tiling.segments(WORKLOADS[name].shape):
        for cubin in launch.compile_cubins(tiling.cut_layer(WORKLOADS[name].shape, segment)):
            assert cubin[:4] == b"\x7fELF"
            assert b"moe_gemm" in cubin


# ---- What is launched ---------------------------------------------------------------------------


class GemmArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weights", "scales", "bias", "x", "topk_weights", "out")
        ),
        ("pairs", Pairs),
        *((name, ctypes.c_int) for name in ("x_stride", "weights_token_stride")),
        ("weights_choice_stride", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit")),
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "out")),
        ("pairs", Pairs),
    ]


@pytest.mark.parametrize("kind", [Pairs, GemmArgs, SumArgs], ids=lambda kind: kind.__name__)
def test_arguments_are_as_the_source_declares_them(kind):
    """Names, order and types of its struct; what a call is given is read by these below."""
    found = declared_fields(kind.__name__, launch.source(), nested={"Pairs": Pairs})
    assert found == kind._fields_


@pytest.fixture
def launched(monkeypatch):
    """What the GPU would be handed: (segment, configuration, arguments) of every launch, by
    thread.
    """
    by_thread, kinds = {}, {"fc1": GemmArgs, "fc2": GemmArgs, "sum": SumArgs}
    made = {}

    def compiled(gemms, device_index):
        functions = tuple((gemms[0].segment, name) for name in kinds)
        return made.setdefault(gemms, launch.Compiled(gemms, functions, device_index, 132, {}))

    def launched_by_driver(config, function, parameters):
        segment, name = function
        time.sleep(0)  # lets other threads run, as the driver's does
        at = ctypes.c_void_p.from_address(parameters).value
        arguments = kinds[name].from_buffer_copy(kinds[name].from_address(at))
        by_thread.setdefault(threading.get_ident(), []).append((segment, config, arguments))

    monkeypatch.setattr(kernel_module, "compiled", compiled)
    monkeypatch.setattr(launch, "raw_stream", lambda index: 7)
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: (*args, *kwargs.values()))
    monkeypatch.setattr(driver, "launch", launched_by_driver)
    return by_thread


def layer(*shape, **changes):
    """A layer of that shape, whose tensors have no memory to speak of."""
    names = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")
    tensors = {name: torch.zeros(8, dtype=torch.uint8) for name in names}
    given = {"ep_size": 1, "swiglu": SwiGLU(1.5, 0.5, None)} | tensors | changes
    return SimpleNamespace(shape=LayerShape(*shape), plans={}, **given)


def call_of(tokens, top_k, hidden=160):
    return (
        torch.randn(tokens, hidden).bfloat16(),
        torch.zeros(tokens, top_k, dtype=torch.int64),
        torch.rand(tokens, top_k),
        torch.empty(tokens, hidden).bfloat16(),
    )


def run(p, *call, workspace=None, expert_map=None, kernel=NARROW):
    """Launch a call of x, ids, weights and out."""
    tokens_and_top_k = call[1].shape
    if workspace is None:
        workspace = torch.empty(kernel.workspace_bytes(p, *tokens_and_top_k), dtype=torch.uint8)
    kernel.make_runner(p, *tokens_and_top_k)(Call(*call, workspace, expert_map), p)
    return workspace


@pytest.mark.parametrize("aligned", [True, False])
def test_what_a_call_is_given(aligned, launched):
    """x is copied only where the kernel can't read it; the parts of the workspace lie inside of it
    and apart from each other.
    """
    tokens, top_k = 5, 3
    p = layer(8, 160, 96)
    wide = torch.randn(tokens, 168).bfloat16()
    _, ids, weights, out = call_of(tokens, top_k)
    x = wide[:, :160] if aligned else wide[:, 1:161]
    workspace = run(p, x, ids, weights, out)
    seen = launched[threading.get_ident()]
    fc1, fc2, total = (arguments for _, _, arguments in seen)
    begin, pairs = workspace.data_ptr(), tokens * top_k
    if aligned:
        assert (fc1.x, fc1.x_stride) == (x.data_ptr(), 168)
    else:
        assert (fc1.x, fc1.x_stride) == (begin, 160)
        assert torch.equal(workspace[: 2 * x.numel()].view(torch.bfloat16).view(x.shape), x)
        assert begin + 2 * x.numel() <= fc1.out
    assert fc2.x == fc1.out >= begin
    assert total.partial == fc2.out >= fc1.out + 2 * pairs * 96
    assert fc2.out + 4 * pairs * 160 <= begin + workspace.numel()
    assert (fc1.out - begin) % 256 == (fc2.out - begin) % 256 == 0
    for one, *tensors in (
        (fc1, p.w13, p.w13_scale, p.w13_bias),
        (fc2, p.w2, p.w2_scale, p.w2_bias),
    ):
        assert [one.weights, one.scales, one.bias] == [t.data_ptr() for t in tensors]
        assert (one.weights_token_stride, one.weights_choice_stride) == (top_k, 1)
        assert (one.alpha, one.beta, one.limit) == (1.5, 0.5, float("inf"))
    for one in (fc1.pairs, fc2.pairs, total.pairs):
        assert (one.num_pairs, one.top_k) == (pairs, top_k)
        assert (one.topk_ids, one.ids_are_int64) == (ids.data_ptr(), 1)
        assert (one.ids_token_stride, one.ids_choice_stride) == (top_k, 1)
        assert (one.expert_map, one.num_ids) == (None, 8)
        assert all(n * one.top_k_reciprocal >> 31 == n // top_k for n in range(MAX_PAIRS))
    assert (fc1.topk_weights, fc2.topk_weights) == (None, weights.data_ptr())
    assert fc2.x_stride == 96
    assert total.out == out.data_ptr()
    # Grid, threads, shared memory, the current stream, and whether it may start early.
    of_fc1, of_fc2 = tiling.cut_layer(p.shape, 8)
    assert [config for _, config, _ in seen] == [
        ((132 * of_fc1.blocks_per_sm, 1), of_fc1.threads, of_fc1.shared_bytes(pairs), 7, False),
        ((132 * of_fc2.blocks_per_sm, 1), of_fc2.threads, of_fc2.shared_bytes(pairs), 7, True),
        ((1, tokens), 128, 0, 7, True),
    ]


def test_what_a_call_is_given_follows_the_layer(launched):
    """No biases; a clamp; ids and weights of any strides; and tensors that were given other memory
    since the last call.
    """
    p = layer(8, 160, 96, w13_bias=None, w2_bias=None, swiglu=SwiGLU(1.0, 0.0, 7.0))
    x, _, _, out = call_of(4, 3)
    ids, weights = torch.zeros(3, 8, dtype=torch.int32).t()[::2], torch.rand(4, 9)[:, ::3]
    workspace = run(p, x, ids, weights, out)
    p.w13.data, p.w2_scale.data = torch.ones_like(p.w13), torch.ones(8, dtype=torch.uint8)
    run(p, x, ids, weights, out, workspace=workspace)
    before, *_ = (arguments for _, _, arguments in launched[threading.get_ident()])
    fc1, fc2, total = (arguments for _, _, arguments in launched[threading.get_ident()][3:])
    assert (fc1.weights, fc2.scales) == (p.w13.data_ptr(), p.w2_scale.data_ptr())
    assert before.weights != fc1.weights
    assert (fc1.bias, fc2.bias, fc1.limit) == (None, None, 7.0)
    for one in (fc1.pairs, fc2.pairs, total.pairs):
        assert (one.ids_are_int64, one.ids_token_stride, one.ids_choice_stride) == (0, 2, 8)
    assert (fc2.weights_token_stride, fc2.weights_choice_stride) == (9, 3)


@pytest.mark.parametrize(
    ("shape", "ep_size", "wanted"),
    [
        # Up to 7 pairs an expert: 56 tokens of top-4 for 32 experts.
        ((32, 2880, 736), 1, {1: 8, 56: 8, 57: 16, 120: 16}),
        ((32, 2880, 736), 2, {57: 8, 112: 8, 113: 16}),  # half of the pairs are masked
        ((32, 4096, 2048), 1, {1: 8, 120: 8}),  # too large for segments of 16
    ],
)
def test_the_segments_of_a_call(shape, ep_size, wanted, launched):
    p = layer(*shape, ep_size=ep_size)
    x, ids, weights, out = call_of(120, 4, shape[1])
    for m, segment in wanted.items():
        launched.clear()
        run(p, x[:m], ids[:m], weights[:m], out[:m])
        assert [seen for seen, *_ in launched[threading.get_ident()]] == [segment] * 3, m


def test_a_call_too_large_for_one_goes_in_parts(launched):
    """Each by what serves so many tokens; the last one is small."""
    p = layer(8, 160, 96)
    x, ids, weights, out = call_of(1029, 8)
    workspace = run(p, x, ids, weights, out)
    seen = launched[threading.get_ident()]
    most = MAX_PAIRS // 8
    assert [(segment, arguments.pairs.num_pairs) for segment, _, arguments in seen[::3]] == [
        *[(16, MAX_PAIRS)] * 4,
        (8, 8 * (1029 - 4 * most)),
    ]
    assert [arguments.x for _, _, arguments in seen[::3]] == [
        x[m:].data_ptr() for m in range(0, 1029, most)
    ]
    assert [arguments.out for _, _, arguments in seen[2::3]] == [
        out[m:].data_ptr() for m in range(0, 1029, most)
    ]
    kernel = NarrowKernel()
    assert workspace.numel() == kernel.workspace_bytes(p, most, 8), "the parts share it"
    assert kernel.workspace_bytes(p, most - 1, 8) <= workspace.numel()


def test_every_launch_is_given_the_expert_map(launched):
    p = layer(8, 160, 96)
    expert_map = torch.full((40,), -1, dtype=torch.int32)
    run(p, *call_of(MAX_PAIRS // 8 + 1, 8), expert_map=expert_map)
    seen = [arguments.pairs for _, _, arguments in launched[threading.get_ident()]]
    assert len(seen) == 2 * 3
    assert {(one.expert_map, one.num_ids) for one in seen} == {(expert_map.data_ptr(), 40)}


def test_more_choices_than_its_mask_has_bits_are_refused():
    with pytest.raises(ValueError, match=r"has 65 columns; the narrow kernel takes at most 64"):
        NarrowKernel().workspace_bytes(layer(8, 160, 96), 3, 65)


def test_launches_are_kept_by_stream_and_size(launched, monkeypatch):
    p = layer(8, 160, 96)
    for stream, tokens in ((7, 5), (7, 5), (7, 6), (8, 5)):
        monkeypatch.setattr(launch, "raw_stream", lambda index, stream=stream: stream)
        run(p, *call_of(tokens, 3))
    gemms = tiling.cut_layer(p.shape, 8)
    assert [*kernel_module.compiled(gemms, None).launches] == [(7, 5, 3), (7, 6, 3), (8, 5, 3)]


def test_threads_do_not_see_each_others_calls(launched):
    """Every launch is handed its own call's addresses, with one layer and one number of tokens."""
    p = layer(8, 160, 96)
    workspace = torch.empty(NarrowKernel().workspace_bytes(p, 5, 3), dtype=torch.uint8)
    calls = [call_of(5, 3) for _ in range(4)]
    idents = {}

    def work(n):
        idents[n] = threading.get_ident()
        for _ in range(300):
            run(p, *calls[n], workspace=workspace)
        done.wait()  # else its ident may be given to the next

    done = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (x, ids, weights, out) in enumerate(calls):
        seen = [arguments for _, _, arguments in launched[idents[n]]]
        assert len(seen) == 900
        assert {one.x for one in seen[::3]} == {x.data_ptr()}
        assert {(one.pairs.topk_ids, one.topk_weights) for one in seen[1::3]} == {
            (ids.data_ptr(), weights.data_ptr())
        }
        assert {one.out for one in seen[2::3]} == {out.data_ptr()}
