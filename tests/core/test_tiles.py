"""The `tiles` layout's bytes, against a slow second statement of them written from its description,
and preparing, restoring and reloading with it through the public functions.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    LayerShape,
    SwiGLU,
    allocate_weights,
    prepare_experts,
    restore_weights,
)
from hopper_mxfp4.arrange import restore_in_place
from hopper_mxfp4.contract import PLAIN
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from hopper_mxfp4.kernels.tiles.layout import MOST_FOR_BF16, TILES
from random_layers import (
    FAMILIES,
    FAMILY_IDS,
    SCALE_DTYPES,
    assert_restored,
    bits,
    clone,
    random_weights,
)
from sm90 import expected

KERNEL_SCALES = (1, 128)  # all that the kernels multiply by
# Where a word has the sign, the exponent's high and low bit and the mantissa of both numbers of
# each pair, written out.
PLACES = (
    ((15, 8, 7, 6), (31, 24, 23, 22)),
    ((21, 14, 13, 12), (5, 30, 29, 28)),
    ((9, 2, 1, 0), (25, 18, 17, 16)),
    ((19, 4, 11, 10), (3, 20, 27, 26)),
)


class TilesKernel(ReferenceKernel):
    """Wants its weights as the tiles kernels do, and computes as the reference."""

    name = "tiles-stand-in"

    def layout(self, device):
        return replace(TILES, greatest_scale=MOST_FOR_BF16)


class E5m2Kernel(ReferenceKernel):
    """Wants its weights as wide8 does, and computes as the reference."""

    name = "e5m2-stand-in"

    def layout(self, device):
        return TILES_E5M2


OCTAVES = (101, 127)  # 27 of them, all that a row of E5m2Kernel holds
each_kernel = pytest.mark.parametrize(
    ("kernel", "scales"),
    [(TilesKernel(), KERNEL_SCALES), (E5m2Kernel(), OCTAVES)],
    ids=["tiles", "tiles-e5m2"],
)


def source_row(block: int, i: int, rows: int, gated: bool) -> int:
    """Of [up; gate] or plain rows, the one that is row i of a block."""
    if not gated:
        return 64 * block + 16 * (i // 16) + 4 * (i % 8 // 2) + 2 * (i % 16 // 8) + i % 2
    column = 32 * block + 8 * (i // 16) + i % 8
    return column if i % 16 >= 8 else rows // 2 + column


def slow_weight(w: np.ndarray, gated: bool) -> np.ndarray:
    """uint8 [e, R, K/2] to the layout's bytes, a word of a thread at a time."""
    e, rows, half_k = w.shape
    codes = np.stack((w & 15, w >> 4), axis=-1).reshape(e, rows, 2 * half_k).astype(np.uint32)
    tiles, blocks = half_k // 32, rows // 64
    out = np.zeros((e, tiles, blocks, 128, 4), dtype="<u4")
    k_tile = 64 * np.arange(tiles)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        r, t = divmod(lane, 4)
        for group in range(2):
            for half in range(2):
                i = 16 * warp + 8 * half + r
                row = np.array([source_row(b, i, rows, gated) for b in range(blocks)])
                word = np.zeros((e, blocks, tiles), dtype=np.uint32)
                for pair in range(4):
                    for number in range(2):
                        k = k_tile + 32 * group + 2 * t + 8 * pair + number
                        code = codes[:, row][:, :, k]
                        for n, place in enumerate(PLACES[pair][number]):
                            word |= (code >> np.uint32(3 - n) & np.uint32(1)) << np.uint32(place)
                out[:, :, :, thread, 2 * group + half] = word.transpose(0, 2, 1)
    return out.view(np.uint8).reshape(w.shape)


def slow_scale(s: np.ndarray, gated: bool) -> np.ndarray:
    """uint8 [e, R, K/32] to the layout's bytes, a byte of a block at a time."""
    e, rows, groups = s.shape
    out = np.empty((e, groups // 2, rows // 64, 128), dtype=np.uint8)
    for block in range(rows // 64):
        for at in range(128):
            warp, r, group, half = at // 32, at // 4 % 8, at // 2 % 2, at % 2
            row = source_row(block, 16 * warp + 8 * half + r, rows, gated)
            out[:, :, block, at] = s[:, row, group::2]
    return out.reshape(s.shape)


@pytest.mark.parametrize("gated", [False, True], ids=["w2", "w13"])
@pytest.mark.parametrize("sizes", [(1, 64, 64), (3, 192, 128), (2, 128, 320), (1, 5760, 192)])
def test_bytes_are_as_described(sizes, gated) -> None:
    if gated:
        sizes = (sizes[0], 128 * (sizes[1] // 64), sizes[2])
    e, rows, k = sizes
    packing = TILES.packing("w13" if gated else "w2")
    random = np.random.default_rng(rows + k)
    for columns, slow, pack, unpack in (
        (k // 2, slow_weight, packing.pack_weight, packing.unpack_weight),
        (k // 32, slow_scale, packing.pack_scale, packing.unpack_scale),
    ):
        plain = random.integers(0, 256, (e, rows, columns), dtype=np.uint8)
        packed = pack(torch.from_numpy(plain))
        assert packed.is_contiguous()
        assert packed.shape == plain.shape
        assert np.array_equal(packed.numpy(), slow(plain, gated))
        assert np.array_equal(unpack(packed).numpy(), plain)
        spread = packed.repeat_interleave(2, dim=-1)[..., ::2]
        assert np.array_equal(unpack(spread).numpy(), plain), "strided input"


def test_a_words_bits_are_all_taken() -> None:
    places = [place for pair in PLACES for number in pair for place in number]
    assert sorted(places) == list(range(32))


def test_words_become_bf16_pairs() -> None:
    """What tiles.cuh does with a word, for every byte of each pair: 2^-126 of the two weights."""

    def rotated(word: int, n: int) -> int:
        return (word >> n | word << 32 - n) & 0xFFFFFFFF

    decoded = (
        lambda word: word & 0x81C081C0,
        lambda word: rotated(word, 6) & 0x81C081C0,
        lambda word: word << 6 & 0x81C081C0,
        lambda word: rotated(word, 4) & 0x80C080C0 | word << 4 & 0x01000100,
    )
    codes = np.arange(256, dtype=np.uint8)
    for pair in range(4):
        row = np.full((256, 64, 32), 0x5A, dtype=np.uint8)  # other pairs must not leak in
        row[:, :, 4 * pair] = codes[:, None]
        words = TILES.pack_weight(torch.from_numpy(row)).view(torch.int32)[:, 0, 0]
        for code, word in enumerate(words.tolist()):
            found = decoded[pair](word & 0xFFFFFFFF)
            for number in range(2):
                nibble = code >> 4 * number & 15
                assert found >> 16 * number & 0xFFFF == (nibble & 8) << 12 | (nibble & 7) << 6


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("sizes", [(2, 2880, 192), (3, 64, 128), (2, 96, 160), (1, 512, 288)])
def test_prepared_tensors(sizes, family, scale_dtype) -> None:
    """Through `prepare_experts`: halves, padding and dtypes as PLAIN has them, then these bytes."""
    w = random_weights(family, *sizes, scale_dtype=scale_dtype, scales=KERNEL_SCALES)
    before = clone(w)
    p = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=TilesKernel())
    e, h, i = (sizes[0], *(-(-n // 64) * 64 for n in sizes[1:]))
    plain = {name: torch.from_numpy(t) for name, t in padded(before, family, h, i).items()}
    for name, slow in (("w13", slow_weight), ("w2", slow_weight)):
        wanted = slow(plain[name].numpy(), name == "w13")
        assert np.array_equal(getattr(p, name).numpy(), wanted), name
        scale = f"{name}_scale"
        wanted = slow_scale(plain[scale].numpy(), name == "w13")
        assert np.array_equal(getattr(p, scale).numpy(), wanted), scale
    assert p.w13.shape == (e, 2 * i, h // 2)
    if family.bias:
        assert (p.w13_bias.shape, p.w2_bias.shape) == ((e, 2 * i), (e, h))
    assert_restored(restore_weights(p), before)


def padded(w, family, h: int, i: int) -> dict[str, np.ndarray]:
    """The tensors as PLAIN has them, at sizes padded to 64."""
    plain = expected(w, family, None)
    out = {}
    true_i = w.w13.shape[1] // 2
    for name, rows, columns, fill in (
        ("w13", i, h // 2, 0),
        ("w2", h, i // 2, 0),
        ("w13_scale", i, h // 32, 127),
        ("w2_scale", h, i // 32, 127),
    ):
        t = plain[name].numpy()
        halves = [t[:, :true_i], t[:, true_i:]] if name.startswith("w13") else [t]
        grown = []
        for half in halves:
            place = np.full((t.shape[0], rows, columns), fill, dtype=np.uint8)
            place[:, : half.shape[1], : half.shape[2]] = half
            grown.append(place)
        out[name] = np.concatenate(grown, axis=1)
    return out


def fill(allocated: torch.Tensor, t: torch.Tensor, split: bool) -> None:
    """Put a checkpoint's tensor where a loader puts it. split: each half of the rows on its own."""
    halves = 2 if split else 1
    for place, piece in zip(allocated.chunk(halves, dim=1), t.chunk(halves, dim=1), strict=True):
        place[tuple(slice(n) for n in piece.shape)] = piece


units = st.integers(1, 8).map(lambda n: 32 * n)


@given(
    family=st.sampled_from(FAMILIES),
    experts=st.integers(1, 4),
    hidden=units,
    intermediate=units,
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_allocated_weights_are_prepared_restored_and_reloaded_in_place(
    family, experts, hidden, intermediate, seed
) -> None:
    """Twice through the same memory, as a server that loads new weights does."""
    shape, kernel = LayerShape(experts, hidden, intermediate), TilesKernel()
    allocated = allocate_weights(shape, family=family, device="cpu", kernel=kernel)
    addresses = {name: t.data_ptr() for name, t in allocated.tensors().items()}
    for step in range(2):
        w = random_weights(
            family, experts, hidden, intermediate, scales=KERNEL_SCALES, seed=seed + step
        )
        for name, t in w.tensors().items():
            fill(getattr(allocated, name), t, name.startswith("w13") and family != GPT_OSS)
        p = prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel=kernel)
        assert {name: getattr(p, name).data_ptr() for name in addresses} == addresses
        assert_restored(restore_weights(p), w)
        allocated = restore_in_place(p)
        assert {name: t.data_ptr() for name, t in allocated.tensors().items()} == addresses


@each_kernel
def test_experts_stand_alone(kernel, scales) -> None:
    """One expert's bytes are its own: expert parallelism moves them between ranks."""
    w = random_weights(GPT_OSS, 4, 96, 64, scales=scales)
    p = prepare_experts(clone(w), family=GPT_OSS, swiglu=SwiGLU(), kernel=kernel)
    one = {name: t[2:3] for name, t in clone(w).tensors().items()}
    alone = prepare_experts(type(w)(**one), family=GPT_OSS, swiglu=SwiGLU(), kernel=kernel)
    for name in w.tensors():
        assert torch.equal(bits(getattr(p, name)[2:3]), bits(getattr(alone, name))), name


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize(
    ("name", "place"), [("w13_scale", (1, 97, 2)), ("w2_scale", (2, 95, 2))], ids=str
)
def test_a_scale_too_great_is_refused_before_anything_is_changed(
    name, place, family, scale_dtype
) -> None:
    w = random_weights(family, 3, 96, 96, scale_dtype=scale_dtype, scales=KERNEL_SCALES)
    value = torch.tensor(2.0**2) if scale_dtype == torch.float32 else torch.tensor(129).byte()
    getattr(w, name).view(value.dtype)[place] = value
    before = clone(w)
    with pytest.raises(ValueError, match="kernel='reference'") as refused:
        prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=TilesKernel())
    for part in (f"{name}{list(place)} is 129;", "above 128", TilesKernel.name):
        assert part in str(refused.value)
    assert not w.consumed
    for tensor, t in before.tensors().items():
        assert torch.equal(bits(getattr(w, tensor)), bits(t)), tensor
    prepare_experts(w, family=family, swiglu=SwiGLU(), kernel="reference")


@each_kernel
def test_scales_beyond_the_true_size_are_nobodys(kernel, scales) -> None:
    """An allocated tensor may hold anything there."""
    w = allocate_weights(LayerShape(2, 96, 32), family=DEEPSEEK_V4, device="cpu", kernel=kernel)
    w.w13_scale[:, :, 3:] = 200
    w.w2_scale[:, 96:] = 200
    prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel=kernel)


def test_other_layouts_arrange_both_projections_alike() -> None:
    assert PLAIN.w13 is None
    assert PLAIN.packing("w13") == PLAIN.packing("w2")
    assert PLAIN.greatest_scale == 254
