"""The `tiles-e5m2` layout's bytes, against a slow second statement of them written from its
description, what the kernel makes of them, and preparing, restoring and reloading with it.
"""

import numpy as np
import pytest
import torch

from hopper_mxfp4 import (
    GPT_OSS,
    LayerShape,
    SwiGLU,
    allocate_weights,
    prepare_experts,
    restore_weights,
)
from hopper_mxfp4.arrange import restore_in_place
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from random_layers import (
    FAMILIES,
    FAMILY_IDS,
    SCALE_DTYPES,
    assert_restored,
    bits,
    clone,
    dequantize,
    random_weights,
)
from test_tiles import OCTAVES as SCALES
from test_tiles import E5m2Kernel, fill, source_row


def slow_weight(w: np.ndarray, gated: bool) -> np.ndarray:
    """uint8 [e, R, K/2] to the layout's bytes, a word of a thread at a time."""
    e, rows, half_k = w.shape
    codes = np.stack((w & 15, w >> 4), axis=-1).reshape(e, rows, 2 * half_k).astype(np.uint32)
    tiles, blocks = half_k // 64, rows // 64
    out = np.zeros((e, tiles, blocks, 2, 128, 4), dtype="<u4")
    for thread in range(128):
        warp, r, t = thread // 32, thread % 32 // 4, thread % 4
        for group in range(4):
            for half in range(2):
                i = 16 * warp + 8 * half + r
                row = np.array([source_row(b, i, rows, gated) for b in range(blocks)])
                word = np.zeros((e, blocks, tiles), dtype=np.uint32)
                for n in range(8):
                    k = 128 * np.arange(tiles) + 32 * group + 16 * (n // 4) + 4 * t + n % 4
                    code = codes[:, row][:, :, k]
                    sign_of = 2 * n + 1 if n < 4 else 2 * (n - 4)  # nibble
                    word |= (code & np.uint32(7)) << np.uint32(4 * n)
                    word |= (code >> np.uint32(3)) << np.uint32(4 * sign_of + 3)
                out[:, :, :, group // 2, thread, 2 * (group % 2) + half] = word.transpose(0, 2, 1)
    return out.view(np.uint8).reshape(w.shape)


def slow_scale(s: np.ndarray, gated: bool) -> np.ndarray:
    """uint8 [e, R, K/32] to the layout's bytes, a byte of a block at a time."""
    e, rows, groups = s.shape
    base = np.minimum(s.min(axis=-1, keepdims=True), 241)
    out = np.empty((e, groups // 4, rows // 64, 256), dtype=np.uint8)
    for block in range(rows // 64):
        for at in range(256):
            warp, r, half, group = at // 64, at // 8 % 8, at // 4 % 2, at % 4
            row = source_row(block, 16 * warp + 8 * half + r, rows, gated)
            octaves = s[:, row, group::4] - base[:, row]
            out[:, :, block, at] = octaves | (base[:, row] >> 2 * group & 3) << 6
    return out.reshape(s.shape)


@pytest.mark.parametrize("gated", [False, True], ids=["w2", "w13"])
@pytest.mark.parametrize("sizes", [(1, 128, 128), (3, 256, 384), (2, 5888, 256)])
@pytest.mark.parametrize("scales", [(0, 27), (101, 128), (228, 255)], ids=str)
def test_bytes_are_as_described(sizes, gated, scales) -> None:
    e, rows, k = sizes
    rows *= 1 + gated
    packing = TILES_E5M2.packing("w13" if gated else "w2")
    random = np.random.default_rng(rows + k)
    for columns, values, slow, pack, unpack in (
        (k // 2, (0, 256), slow_weight, packing.pack_weight, packing.unpack_weight),
        (k // 32, scales, slow_scale, packing.pack_scale, packing.unpack_scale),
    ):
        plain = random.integers(*values, (e, rows, columns), dtype=np.uint8)
        packed = pack(torch.from_numpy(plain))
        assert packed.is_contiguous()
        assert packed.shape == plain.shape
        assert np.array_equal(packed.numpy(), slow(plain, gated))
        assert np.array_equal(unpack(packed).numpy(), plain)
        spread = packed.repeat_interleave(2, dim=-1)[..., ::2]
        assert np.array_equal(unpack(spread).numpy(), plain), "strided input"


def decoded(word: int, octaves: int) -> list[int]:
    """What e5m2.cuh makes of a word: eight bytes."""

    def permuted(low: int, high: int, which: int) -> int:
        table = [*low.to_bytes(4, "little"), *high.to_bytes(4, "little")]
        return int.from_bytes(bytes(table[which >> 4 * n & 15] for n in range(4)), "little")

    small = octaves * 0x04040400 + 0x0A080400
    large = octaves * 0x04040404 + 0x12100E0C
    magnitudes = word & 0x77777777
    first = permuted(small, large, magnitudes & 0xFFFF) | word & 0x80808080
    second = permuted(small, large, magnitudes >> 16) | word << 4 & 0x80808080
    return [*first.to_bytes(4, "little"), *second.to_bytes(4, "little")]


def test_words_become_e5m2_exactly() -> None:
    """Every code at every scale of a row, in each of a word's places."""
    codes = np.arange(256, dtype=np.uint8)
    for place in range(4):
        row = np.full((256, 128, 64), 0x5A, dtype=np.uint8)  # other weights must not leak in
        byte = (0, 1, 8, 9)[place]  # of those of t = 0 in the first group
        row[:, :, byte] = codes[:, None]
        words = TILES_E5M2.pack_weight(torch.from_numpy(row)).view(torch.int32)[:, 0, 0].tolist()
        for octaves in range(27):
            values = torch.tensor(
                [decoded(word & 0xFFFFFFFF, octaves) for word in words], dtype=torch.uint8
            )
            seen = values[:, 2 * place : 2 * place + 2].contiguous().view(torch.float8_e5m2)
            wanted = dequantize(
                torch.from_numpy(codes[:, None].repeat(16, 1)),
                torch.full((256, 1), 127 + octaves - 13, dtype=torch.uint8),
            )[:, :2]
            assert torch.equal(seen.double(), torch.as_tensor(wanted).double())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("sizes", [(2, 2880, 192), (3, 64, 128), (2, 96, 160), (1, 512, 288)])
def test_prepared_weights_are_restored(sizes, family, scale_dtype) -> None:
    w = random_weights(family, *sizes, scale_dtype=scale_dtype, scales=SCALES)
    before = clone(w)
    p = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=E5m2Kernel())
    e, h, i = (sizes[0], *(-(-n // 128) * 128 for n in sizes[1:]))
    assert (p.w13.shape, p.w2.shape) == ((e, 2 * i, h // 2), (e, h, i // 2))
    assert_restored(restore_weights(p), before)


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("sizes", [(3, 96, 160), (2, 128, 256), (1, 288, 32)])
def test_reloading_in_place(sizes, family) -> None:
    """Twice through the same memory, with scales far from what padding holds."""
    kernel = E5m2Kernel()
    allocated = allocate_weights(LayerShape(*sizes), family=family, device="cpu", kernel=kernel)
    addresses = {name: t.data_ptr() for name, t in allocated.tensors().items()}
    for seed, scales in enumerate(((3, 29), (200, 226))):
        w = random_weights(family, *sizes, scales=scales, seed=seed)
        for name, t in w.tensors().items():
            fill(getattr(allocated, name), t, name.startswith("w13") and family != GPT_OSS)
        p = prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel=kernel)
        assert {name: getattr(p, name).data_ptr() for name in addresses} == addresses
        assert_restored(restore_weights(p), w)
        allocated = restore_in_place(p)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize(
    ("name", "row", "spread"), [("w13_scale", (1, 97), 27), ("w2_scale", (2, 95), 60)], ids=str
)
def test_a_row_that_does_not_fit_is_refused(name, row, spread, family, scale_dtype) -> None:
    """Before anything is changed."""
    w = random_weights(family, 3, 96, 96, scale_dtype=scale_dtype, scales=(110, 120))

    def put(scale: int, column: int) -> None:
        value = torch.tensor(2.0 ** (scale - 127)) if scale_dtype == torch.float32 else scale
        getattr(w, name).view(torch.uint8 if isinstance(value, int) else value.dtype)[
            (*row, column)
        ] = value

    put(110, 0)
    put(110 + spread, 2)
    put(115, 1)
    before = clone(w)
    with pytest.raises(ValueError, match="activations='bf16' or kernel='reference'") as refused:
        prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=E5m2Kernel())
    for part in (f"{name}{list(row)} has E8M0 bytes from 110 to {110 + spread};", "at most 26"):
        assert part in str(refused.value)
    assert not w.consumed
    for tensor, t in before.tensors().items():
        assert torch.equal(bits(getattr(w, tensor)), bits(t)), tensor
    put(136, 2)
    prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=E5m2Kernel())
