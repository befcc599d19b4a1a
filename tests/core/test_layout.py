"""The bytes that preparing makes, against a slow second implementation written from the layout's
description.
"""

import numpy as np
import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, SwiGLU, prepare_experts
from hopper_mxfp4.contract import PLAIN
from hopper_mxfp4.kernels.flashinfer.layout import (
    unpack_sm90_scale_by_k,
    unpack_sm90_scale_folded,
    unpack_sm90_weight,
)
from random_layers import (
    ALL_SCALES,
    FAMILIES,
    FAMILY_IDS,
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    bits,
    clone,
    decode_scale,
    random_weights,
)
from sm90 import PACK_SCALE, UNPACK_SCALE, expected, pack_scale_by_k, pack_scale_folded, pack_weight

pytestmark = pytest.mark.usefixtures("sm90_kernels")

# E, H, I. Whole layers: GPT-OSS 20B/120B, DeepSeek-V4 Flash and Pro with one expert; GPT-OSS on 4,
# 8 and 16 ranks (2880/4 = 720 as loaders round it) and shards of other roundings; more experts with
# small sizes.
BIG = [
    (1, 2880, 2880),
    (1, 4096, 2048),
    (1, 7168, 2048),
    (1, 2880, 736),
    (1, 2880, 672),
    (1, 2880, 384),
    (1, 2880, 192),
]
SMALL = [(1, 192, 192), (3, 192, 192), (3, 32, 96), (32, 192, 96), (5, 128, 256)]


def assert_prepared_as_expected(w, family, scales: str | None) -> None:
    wanted = expected(w, family, scales)
    p = prepare_experts(
        w, family=family, swiglu=SwiGLU(), kernel=f"sm90-{scales}" if scales else "reference"
    )
    assert (p.w13_bias is None) == (p.w2_bias is None) == (not family.bias)
    for name, tensor in wanted.items():
        seen = getattr(p, name)
        assert (name, seen.shape, seen.dtype) == (name, tensor.shape, tensor.dtype)
        assert seen.is_contiguous()
        assert torch.equal(bits(seen), bits(tensor)), name


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("sizes", BIG, ids=str)
def test_big_layers(sizes, family, scale_dtype) -> None:
    """The scale layout and the weights' dtype alternate, so that each shape sees both of each."""
    case = SCALE_DTYPES.index(scale_dtype) + FAMILIES.index(family)
    w = random_weights(
        family,
        *sizes,
        weight_dtype=WEIGHT_DTYPES[case % 2],
        scale_dtype=scale_dtype,
        scales=ALL_SCALES,
    )
    assert_prepared_as_expected(w, family, ("folded", "by_k")[case % 2])


@pytest.mark.parametrize("scales", ["folded", "by_k", None])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_small_layers(family, weight_dtype, scale_dtype, scales) -> None:
    """Every combination of family, dtypes and layout, the plain one included, over sizes that need
    padding and sizes that don't.
    """
    for seed, sizes in enumerate(SMALL):
        w = random_weights(
            family,
            *sizes,
            weight_dtype=weight_dtype,
            scale_dtype=scale_dtype,
            scales=ALL_SCALES,
            seed=seed,
        )
        assert_prepared_as_expected(w, family, scales)


def test_random_layers_hold_every_byte() -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    w = random_weights(GPT_OSS, 32, 192, 96, scale_dtype=torch.float32, scales=ALL_SCALES)
    assert w.w13.unique().numel() == w.w2.unique().numel() == 256
    assert decode_scale(w.w13_scale).unique().numel() == 255


def word_values(word: int) -> list[tuple[float, float]]:
    """The four pairs of values of a packed word, as the description's table gets them: masks,
    shifts, bf16, times 2**126.
    """
    masked = (
        word & 0x81C081C0,
        (word << 3) & 0x81C081C0,
        (word << 6) & 0x81C081C0,
        ((word << 1) & 0x80008000) | ((word >> 3) & 0x01800180) | ((word >> 7) & 0x00400040),
    )
    as_bf16 = (
        torch.tensor([[m & 0xFFFF, m >> 16] for m in masked], dtype=torch.int32)
        .to(torch.uint16)
        .view(torch.bfloat16)
    )
    return [tuple(pair) for pair in (as_bf16.double() * 2.0**126).tolist()]


def code_value(code: int) -> float:
    """An e2m1 code's value."""
    return (-1.0) ** (code >> 3) * [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]


@pytest.mark.parametrize("unpack", [False, True], ids=["this file's map", "the core's inverse"])
def test_words_hold_the_values_that_the_kernel_reads(unpack) -> None:
    """Word by word in plain Python on a 32 x 128 matrix, by value and not by bit: what each mma
    register would hold.
    """
    random = np.random.default_rng(7).integers(0, 256, (1, 32, 64), dtype=np.uint8)
    packed = random if unpack else pack_weight(random)
    plain = unpack_sm90_weight(torch.from_numpy(random)).numpy() if unpack else random
    values = [
        [code_value(byte >> shift & 15) for byte in row.tolist() for shift in (0, 4)]
        for row in plain[0]
    ]
    words = packed.view("<u4")[0].tolist()  # 32 rows of 16 words
    checked = 0
    for row_block in range(0, 32, 16):
        for k_block in range(2):
            for r in range(8):
                for h in range(2):
                    for c in range(8):
                        k0 = 64 * k_block + 16 * (2 * (c // 4) + h) + 2 * (c % 4)
                        first, second = values[row_block + r], values[row_block + r + 8]
                        wanted = [
                            (row[k], row[k + 1]) for k in (k0, k0 + 8) for row in (first, second)
                        ]
                        assert word_values(words[row_block + r + 8 * h][8 * k_block + c]) == wanted
                        checked += 1
    assert checked == 512


@pytest.mark.parametrize("sizes", [(1, 16, 64), (3, 48, 192), (2, 256, 128)], ids=str)
def test_unpacking_weights_undoes_packing(sizes) -> None:
    e, rows, k = sizes
    w = np.random.default_rng(1).integers(0, 256, (e, rows, k // 2), dtype=np.uint8)
    packed = torch.from_numpy(pack_weight(w))
    assert not np.array_equal(packed, w)
    assert torch.equal(unpack_sm90_weight(packed), torch.from_numpy(w))
    spread = torch.from_numpy(np.repeat(packed.numpy(), 2, axis=2))[:, :, ::2]
    assert not spread.is_contiguous()
    assert torch.equal(unpack_sm90_weight(spread), torch.from_numpy(w)), "strided input"


@pytest.mark.parametrize("name", list(PACK_SCALE))
@pytest.mark.parametrize("sizes", [(1, 64, 4), (3, 128, 12), (2, 320, 8)], ids=str)
def test_unpacking_scales_undoes_packing(sizes, name) -> None:
    s = np.random.default_rng(2).integers(0, 255, sizes, dtype=np.uint8)
    packed = PACK_SCALE[name](s)
    assert torch.equal(UNPACK_SCALE[name](torch.from_numpy(packed)), torch.from_numpy(s))


def test_where_single_scale_bytes_go() -> None:
    """Row 64 + 16*2 + 5 and group 4*1 + 3, by hand, in both layouts."""
    s = np.zeros((2, 128, 8), dtype=np.uint8)
    s[1, 101, 7] = 200
    folded, by_k = pack_scale_folded(s), pack_scale_by_k(s)
    assert np.argwhere(folded).tolist() == [[1, 1, 1, 5, 4 * 2 + 3]]
    assert np.argwhere(by_k).tolist() == [[1, 1, 4 * 101 + 3]]
    assert unpack_sm90_scale_folded(torch.from_numpy(folded)).nonzero().tolist() == [[1, 101, 7]]
    assert unpack_sm90_scale_by_k(torch.from_numpy(by_k)).nonzero().tolist() == [[1, 101, 7]]


def test_plain_layout_leaves_bytes_where_they_are() -> None:
    """PLAIN pads to nothing beyond a scale group and neither packs nor unpacks; rows become [up;
    gate] all the same.
    """
    assert PLAIN.multiple == 32
    for function in (PLAIN.pack_weight, PLAIN.pack_scale, PLAIN.unpack_weight, PLAIN.unpack_scale):
        t = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
        assert function(t) is t
    w = random_weights(DEEPSEEK_V4, 2, 96, 160)
    p = prepare_experts(clone(w), family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="reference")
    assert torch.equal(p.w13[:, :160], w.w13[:, 160:])
    assert torch.equal(p.w13[:, 160:], w.w13[:, :160])
    assert torch.equal(p.w2, w.w2)


@pytest.mark.parametrize(("limit", "deterministic"), [(7.0, "0"), (None, "1")])
def test_what_else_preparing_keeps(limit, deterministic, monkeypatch) -> None:
    monkeypatch.setenv("HOPPER_MXFP4_DETERMINISTIC", deterministic)
    w = random_weights(GPT_OSS, 3, 96, 32, weight_dtype=torch.int8)
    p = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, limit), kernel="sm90-folded")
    assert p.kernel.name == p.layout.name == "sm90-folded"
    assert (p.shape.num_experts, p.shape.hidden_size, p.shape.intermediate_size) == (3, 96, 32)
    assert p.weight_dtype == torch.int8
    assert p.deterministic == (deterministic == "1")
    assert p.swiglu == SwiGLU(1.702, 1.0, limit)
    for seen, wanted in ((p.alpha, 1.702), (p.beta, 1.0), (p.limit, limit)):
        if wanted is None:
            assert seen is None
        else:
            assert torch.equal(seen, torch.full((3,), wanted, dtype=torch.float32))


@pytest.mark.parametrize(
    ("asked", "variables", "wanted"),
    [
        ({}, "", (False, False)),
        ({}, "DETERMINISTIC", (True, False)),
        ({}, "BATCH_INVARIANT", (True, True)),
        ({"deterministic": True}, "", (True, False)),
        ({"batch_invariant": True}, "", (True, True)),
        ({"deterministic": False, "batch_invariant": True}, "", (True, True)),
        ({"deterministic": False}, "DETERMINISTIC", (False, False)),
        ({"batch_invariant": False}, "BATCH_INVARIANT", (False, False)),
    ],
)
def test_modes_are_arguments_and_else_the_variables(asked, variables, wanted, monkeypatch) -> None:
    for name in variables.split():
        monkeypatch.setenv(f"HOPPER_MXFP4_{name}", "1")
    p = prepare_experts(
        random_weights(DEEPSEEK_V4, 2, 64, 32),
        family=DEEPSEEK_V4,
        swiglu=SwiGLU(),
        kernel="reference",
        **asked,
    )
    assert (p.deterministic, p.batch_invariant) == wanted


@pytest.mark.parametrize("limit", [7.0, None])
def test_constants_are_written_again_in_place(limit) -> None:
    """After a sleep that drops memory: the same addresses, which captured graphs hold, and the
    values of preparation.
    """
    p = prepare_experts(
        random_weights(GPT_OSS, 3, 96, 32),
        family=GPT_OSS,
        swiglu=SwiGLU(1.702, 1.0, limit),
        kernel="sm90-folded",
    )
    constants = [t for t in (p.alpha, p.beta, p.limit) if t is not None]
    before = [(t.data_ptr(), t.clone()) for t in constants]
    for t in constants:
        t.fill_(float("nan"))
    p.reset_constants()
    for t, (address, values) in zip(constants, before, strict=True):
        assert t.data_ptr() == address
        assert torch.equal(t, values)
