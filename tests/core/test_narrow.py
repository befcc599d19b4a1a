"""What of the narrow kernel needs no GPU: that its addresses, fragments and arithmetic give the
dense product, followed in NumPy; how layers are cut; and that every cut compiles.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, LayerShape, SwiGLU, env, prepare_experts
from hopper_mxfp4.bench.workloads import WORKLOADS, Workload, random_weights
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.narrow import launch, tiling
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))
sizes = st.integers(1, 240).map(lambda n: 32 * n)
CPU = torch.device("cpu")
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


@given(experts=st.integers(1, 512), hidden=sizes, intermediate=sizes)
def test_a_cut_covers_the_layer_and_fits_the_gpu(experts, hidden, intermediate):
    shape = LayerShape(experts, hidden, intermediate)
    for segment in (8, 16):
        gemms = tiling.cut_layer(shape, segment)
        for gemm, k, rows in zip(
            gemms, (hidden, intermediate), (intermediate, hidden), strict=True
        ):
            tiles = -(-k // 64)
            assert gemm.tiles_per_warp <= tiles
            assert gemm.streamers * gemm.tiles_per_warp >= tiles
            assert (gemm.streamers - 1) * gemm.tiles_per_warp < tiles, "a warp without work"
            assert 1 <= gemm.streamers <= tiling.MAX_STREAMERS
            assert gemm.blocks_per_sm * gemm.threads <= 20 * 32, "no 96 registers a thread"
            assert gemm.units * (16 if gemm.gated else 32) == rows
            if segment in tiling.segments(shape):
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
