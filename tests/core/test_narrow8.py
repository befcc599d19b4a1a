"""What of the narrow8 kernel needs no GPU: that its addresses, fragments and arithmetic give the
product of the weights with the quantised x, followed in NumPy; how layers are cut; what is compiled
and what the driver is handed.
"""

import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, LayerShape, SwiGLU, env, prepare_experts
from hopper_mxfp4.bench.workloads import WORKLOADS, Workload, random_weights
from hopper_mxfp4.kernels.narrow import launch, tiling
from hopper_mxfp4.kernels.narrow8.kernel import Narrow8Kernel
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8
from hopper_mxfp4.kernels.reference.moe import quantise
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from sass import disassemble
from test_e5m2_layout import decoded
from test_narrow import CPU, call_of, dense, launched, layer, needs_nvrtc, output_row, run
from test_tiles import E5m2Kernel
from test_wide import needs_disassembler

__all__ = ["launched"]  # a fixture
LANES = np.arange(32)


# ---- Followed -----------------------------------------------------------------------------------


def fp16_bytes(numbers):
    """[.., n] numbers of e4m3, each exact in fp16, to uint8 [.., 2n]."""
    return torch.tensor(numbers).half().view(torch.uint8).numpy()


class Warp:
    """A streamer's shared memory: x of a segment and its scales, as streamer.cuh leaves them."""

    def __init__(self, gemm, warp, x):
        """x: what fc1 or fc2 loads, float32 [tokens, K]."""
        self.gemm = gemm
        tiles = -(-gemm.k // 128)
        self.first_tile = min(warp * gemm.tiles_per_warp, tiles - gemm.tiles_per_warp)
        pieces = gemm.tiles_per_warp * 16
        self.row_bytes = gemm.tiles_per_warp * 256 + 16
        self.x = np.full((gemm.segment, self.row_bytes), 0xFF, np.uint8)  # NaN
        self.scales = np.full((gemm.tiles_per_warp, gemm.segment), np.nan)
        for n, token in enumerate(x):
            own = np.zeros((pieces, 8), np.float32)
            for piece in range(pieces):
                k = self.first_tile * 128 + piece * 8
                if warp * gemm.tiles_per_warp * 128 <= k < gemm.k:
                    own[piece] = token[k : k + 8]
            groups = torch.tensor(own).view(-1, 128)
            largest = groups.abs().amax(1, keepdim=True).clamp(min=1e-30)  # of 16 lanes
            scale = largest * (1 / 448)
            self.scales[:, n] = scale[:, 0]
            numbers = (groups / scale).to(torch.float8_e4m3fn).float().view(pieces, 4, 2)
            for piece in range(pieces):
                at = piece // 4 * 64 + piece // 2 % 2 * 32 + piece % 2 * 8
                pairs = fp16_bytes(numbers[piece].numpy())
                self.x[n, at : at + 8] = pairs[[0, 2]].reshape(-1)
                self.x[n, at + 16 : at + 24] = pairs[[1, 3]].reshape(-1)

    def fragments(self, n_tile, tile, group):
        """ldmatrix_x4: of each lane, two numbers of each of four matrices [4, 32, 2]."""
        found = np.empty((4, 32, 2))
        for matrix in range(4):
            for lane in LANES:
                address_of = 8 * matrix + lane // 4  # the lane whose address has that row
                row, at = 8 * n_tile + address_of % 8, address_of // 8 * 16
                at += tile * 256 + group * 64 + lane % 4 * 4
                found[matrix, lane] = self.x[row, at : at + 4].copy().view(np.float16)
        return found


def mma(a, b):
    """mma.m16n8k16 as PTX prescribes it: a [4, 32, 2] and b [2, 32, 2] of lanes, to [16, 8]."""
    rows, columns = np.zeros((16, 16)), np.zeros((16, 8))
    for i in range(2):
        for register in range(4):
            k = LANES % 4 * 2 + i + 8 * (register // 2)
            rows[LANES // 4 + 8 * (register % 2), k] = a[register][:, i]
        for register in range(2):
            columns[LANES % 4 * 2 + i + 8 * register, LANES // 4] = b[register][:, i]
    return rows @ columns


def fp16_pairs(four, half):
    """e5m2_to_fp16x2: of [32, 4] bytes."""
    two = np.zeros((32, 4), np.uint8)
    two[:, 1::2] = four[:, 2 * half : 2 * half + 2]
    return two.view(np.float16).astype(np.float64)


def unit_products(warp, weights, scales, unit, weight_rows):
    """A warp's part of the sums [2 slices, 16 rows, segment] of a unit of one expert, by the
    kernel's addresses. weights, scales: the expert's bytes.
    """
    gemm = warp.gemm
    sums = np.zeros((2, 16, gemm.segment))
    for i in range(gemm.tiles_per_warp):
        tile = warp.first_tile + i
        for piece in range(2):
            at = tile * weight_rows * 64 + unit // 2 * 4096 + unit % 2 * 1024 + piece * 512
            words = np.stack(
                [
                    weights[(at + k64 * 2048 + LANES * 16)[:, None] + np.arange(16)].view("<u4")
                    for k64 in range(2)
                ]
            )
            at = tile * weight_rows * 4 + unit * 128 + piece * 64 + LANES // 4 * 8
            octaves = scales[at[:, None] + np.arange(8)] & 0x1F
            parts = np.zeros((16, gemm.segment))
            for group in range(4):
                fours = np.array(  # [row or row + 8, lane, low or high, byte]
                    [
                        [
                            np.reshape(
                                decoded(
                                    int(words[group // 2, lane, 2 * (group % 2) + half]),
                                    int(octaves[lane, 4 * half + group]),
                                ),
                                (2, 4),
                            )
                            for lane in LANES
                        ]
                        for half in range(2)
                    ]
                ).astype(np.uint8)
                for n in range(gemm.segment // 8):
                    x = warp.fragments(n, i, group)
                    for step in range(2):
                        a = [
                            fp16_pairs(fours[half][:, step], pair)
                            for pair in range(2)
                            for half in range(2)
                        ]
                        parts[:, 8 * n : 8 * n + 8] += mma(a, x[2 * step : 2 * step + 2])
            sums[piece] += parts * warp.scales[i]
    return sums


def row_factors(scales, unit, piece):
    """rows.cuh's of a slice's 16 rows."""
    found = np.empty(16)
    for row in range(8):
        at = unit * 128 + piece * 64 + row * 8
        for half in range(2):
            word = int(scales[at + 4 * half : at + 4 * half + 4].view("<u4")[0])
            base = (
                (word >> 6 & 0x03) | (word >> 12 & 0x0C) | (word >> 18 & 0x30) | (word >> 24 & 0xC0)
            )
            found[row + 8 * half] = 2.0 ** (base + 13 - 127)
    return found


@pytest.mark.parametrize("segment", [8, 16])
@pytest.mark.parametrize("family", [GPT_OSS, DEEPSEEK_V4], ids=lambda f: f.name)
@pytest.mark.parametrize("sizes", [(160, 96), (32, 672), (288, 32), (2080, 32)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_addresses_and_fragments_give_the_dense_product(family, sizes, segment):
    """2080 columns are 17 k-tiles for nine warps of two: the last has one of its neighbour's."""
    hidden, inter = sizes
    odd = Workload("odd", family, SwiGLU(), 2, 1, hidden, inter)
    w = random_weights(odd, CPU)
    p = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=E5m2Kernel(), activations="fp8")
    expert, rng, tokens = 1, np.random.default_rng(0), segment - 3
    w13 = dense(w.w13[expert].numpy(), w.w13_scale[expert].numpy())
    gate, up = (
        (w13[0::2], w13[1::2]) if family.rows == "interleaved" else (w13[:inter], w13[inter:])
    )
    w2 = dense(w.w2[expert].numpy(), w.w2_scale[expert].numpy())
    for gated, k, rows in ((True, hidden, inter), (False, inter, hidden)):
        gemm = tiling.cut_gemm(gated, k, rows, 2, segment, Gemm8)
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        x[0, :7] = 0
        x[:, 31] *= 100
        warps = [Warp(gemm, warp, x) for warp in range(gemm.streamers)]
        weights, scales = (
            t[expert].reshape(-1).numpy()
            for t in ((p.w13, p.w13_scale) if gated else (p.w2, p.w2_scale))
        )
        found = np.full((2, rows, tokens), np.nan)
        for unit in range(gemm.units):
            weight_rows = (1 + gated) * -(-rows // 128) * 128
            sums = sum(unit_products(warp, weights, scales, unit, weight_rows) for warp in warps)
            for piece in range(2):
                of_slice = sums[piece] * row_factors(scales, unit, piece)[:, None]
                for row in range(8):
                    for half in range(2):
                        to = output_row(gated, unit, piece, row, half)
                        found[half if gated else 0, to] = of_slice[row + 8 * half, :tokens]
        held = quantise(torch.tensor(x)).double().numpy()
        for seen, matrix in zip(found, (gate, up) if gated else (w2,), strict=False):
            np.testing.assert_allclose(seen, matrix @ held.T, rtol=1e-6, atol=1e-6)


# ---- How layers are cut -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (2880, (12, 2)),
        (4096, (16, 2)),
        (2048, (8, 2)),
        (7168, (14, 4)),
        (736, (3, 2)),
        (384, (3, 1)),
    ],
)
def test_how_a_dot_product_is_cut(k, wanted):
    assert tiling.cut_product(k, Gemm8) == wanted


def test_segments_of_the_workloads():
    for name, wanted in (("gpt-oss-20b", (8, 16)), ("gpt-oss-120b", (8, 16)), ("dsv4-flash", (8,))):
        assert tiling.segments(WORKLOADS[name].shape, Gemm8) == wanted
    assert tiling.segments(LayerShape(256, 7168, 2048), Gemm8) == (8,)
    assert not tiling.segments(LayerShape(8, 1 << 14, 2880), Gemm8)


def test_shared_memory_is_what_the_source_lays_out():
    """moe_gemm: each warp's x, as fp16 and as it comes, sums, scales, then the routing."""
    for gated, number_bytes in ((True, 2), (False, 4)):
        gemm = Gemm8(gated, 2880, 2880, 32, 16, 12, 2, 1)
        x = 12 * (16 * (256 * 2 + 16) + 4 * 256 * number_bytes)
        sums, scales = 2 * 12 * 2 * 2 * 32 * 16, 12 * 2 * 16 * 4
        routing = 4 * 32 + 4 * 100 + 8 * (32 + 100 // 16) + 2 * 100
        assert gemm.shared_bytes(100) == x + sums + scales + routing


# ---- Compiled -----------------------------------------------------------------------------------


def test_its_source_has_headers_of_narrow_and_its_own():
    own, narrows = launch.source(Gemm8), launch.source()
    assert own.text == narrows.text
    differing = {name for name, text in own.headers.items() if text != narrows.headers.get(name)}
    of_its_own, shared = {"tile", "rows", "x", "streamer"}, {"e5m2", "quantise"}
    assert differing == {f"{name}.cuh" for name in of_its_own | shared}
    for name, wanted in (("SLICES", 2), ("TILE_K", 128), ("X_AT_ONCE", 4)):
        text = "\n".join(own.headers.values())
        assert re.findall(rf"constexpr int {name} = (\d+);", text) == [str(wanted)]


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize(
    "name", ["gpt-oss-20b", "gpt-oss-120b-tp8", "dsv4-flash", "dsv4-flash-tp8"]
)
def test_it_compiles_without_spills(name, tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    for segment in tiling.segments(WORKLOADS[name].shape, Gemm8):
        gemms = tiling.cut_layer(WORKLOADS[name].shape, segment, Gemm8)
        for gemm, cubin in zip(gemms, launch.compile_cubins(gemms), strict=True):
            path = tmp_path / "gemm.cubin"
            path.write_bytes(cubin)
            text = "\n".join(disassemble(path))
            assert not re.search(r"\b(STL|LDL)\b", text), (segment, gemm)
            # Of each slice and k-tile, for each 8 tokens, 16 of K at a time: one unit's worth.
            products = 2 * gemm.tiles_per_warp * 8 * (segment // 8)
            assert len(re.findall(r"HMMA\.16816\.F32 ", text)) == products


# ---- What is launched ---------------------------------------------------------------------------


def test_it_wants_the_weights_of_wide8():
    kernel = Narrow8Kernel()
    assert kernel.layout(CPU) is TILES_E5M2
    assert "runs on a GPU" in kernel.unsupported_reason(LayerShape(8, 64, 64), CPU)


def test_what_a_call_is_given(launched):
    """fc1's rows are float32."""
    tokens, top_k = 5, 3
    p = layer(8, 160, 96)
    call = call_of(tokens, top_k)
    workspace = run(p, *call, kernel=Narrow8Kernel())
    seen = launched[threading.get_ident()]
    fc1, fc2, total = (arguments for _, _, arguments in seen)
    assert fc2.x == fc1.out >= workspace.data_ptr()
    assert total.partial == fc2.out >= fc1.out + 4 * tokens * top_k * 96
    assert fc2.out + 4 * tokens * top_k * 160 <= workspace.data_ptr() + workspace.numel()
    assert (fc1.x, fc1.x_stride, fc2.x_stride) == (call[0].data_ptr(), 160, 96)
    gemms = tiling.cut_layer(p.shape, 8, Gemm8)
    assert [config[1:3] for _, config, _ in seen[:2]] == [
        (gemm.threads, gemm.shared_bytes(tokens * top_k)) for gemm in gemms
    ]


def test_more_choices_than_its_mask_has_bits_are_refused():
    p = SimpleNamespace(shape=LayerShape(8, 160, 96))
    with pytest.raises(ValueError, match=r"has 65 columns; the narrow8 kernel takes at most 64"):
        Narrow8Kernel().workspace_bytes(p, 3, 65)
