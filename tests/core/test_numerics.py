"""Results against float64 from the bytes' definition: 200 random layers a family, the ends of every
range, and rows that must not touch.
"""

import math
from dataclasses import replace

import pytest
import torch

from dense import Dense, row_ulps
from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, SwiGLU, fused_moe, prepare_experts, restore_weights
from hopper_mxfp4.plugin import Layout
from random_layers import (
    FAMILIES,
    FAMILY_IDS,
    assert_restored,
    bits,
    clone,
    encode_scale,
    random_weights,
)
from sm90 import Plugin, Sm90Kernel
from test_flashinfer_kernel import StandIn

pytestmark = pytest.mark.usefixtures("sm90_kernels", "one_thread")

SEEDS = 200
SWIGLU = {"gpt_oss": SwiGLU(1.702, 1.0, 7.0), "deepseek_v4": SwiGLU(1.0, 0.0, 10.0)}


def random_call(
    tokens: int, experts: int, hidden: int, top_k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g).bfloat16()
    return (
        x,
        torch.randint(-1, experts, (tokens, top_k), generator=g),
        torch.randn(tokens, top_k, generator=g).softmax(-1),
    )


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_random_layers(family, record_property) -> None:
    """Other sizes, top-k and amplitudes each time; every element within 4 bf16 ulps of its row's
    largest.
    """
    ulps = []
    for seed in range(SEEDS):
        e, h, i, top_k = 1 + seed % 5, 32 * (1 + seed % 4), 32 * (1 + seed % 3), 1 + seed % 8
        w = random_weights(family, e, h, i, scales=(114, 123), seed=seed)
        call = random_call(1 + seed % 13, e, h, top_k, seed)
        call[0].mul_(2.0 ** (seed % 11 - 5))
        wanted = Dense(w, family, SWIGLU[family.name])(*call)
        p = prepare_experts(
            w,
            family=family,
            swiglu=SWIGLU[family.name],
            kernel="reference" if seed % 10 else "sm90-folded",
        )
        ulps.append(row_ulps(fused_moe(*call, p), wanted).max().item())
    record_property("times", SEEDS)
    record_property("worst_ulps", max(ulps))
    assert all(u <= 4 for u in ulps), ulps
    assert max(ulps) > 0


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32], ids=str)
@pytest.mark.parametrize("byte", [0, 1, 253, 254])
def test_scales_at_their_ends(byte, scale_dtype) -> None:
    """All of w13 at that scale, x as much the other way: the layer's numbers are ordinary ones, and
    so must the result be.
    """
    w = random_weights(DEEPSEEK_V4, 2, 64, 64, seed=byte)
    kept = 0xBB if byte > 252 else 0xFF  # at most 1.5, which 2**127 keeps within float32
    w = replace(
        w, w13=w.w13 & kept, w13_scale=encode_scale(torch.full_like(w.w13_scale, byte), scale_dtype)
    )
    x, ids, weights = random_call(9, 2, 64, 2, seed=byte)
    x = (x.float() * (2.0**-118 if byte > 252 else 2.0**122)).bfloat16()
    assert x.isfinite().all()
    wanted = Dense(w, DEEPSEEK_V4, SwiGLU())(x, ids, weights)
    assert 1e-3 < wanted.abs().max() < 1e10
    before = clone(w)
    p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="reference")
    assert row_ulps(fused_moe(x, ids, weights, p), wanted).le(4).all()
    assert_restored(restore_weights(p), before)


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(
    ("name", "place"),
    [("w13_scale", (0, 0, 0)), ("w13_scale", (2, 127, 1)), ("w2_scale", (1, 63, 1))],
    ids=str,
)
def test_scale_byte_255_is_refused(name, place, scale_dtype) -> None:
    """NaN in E8M0: a NaN in the sums of every token that the expert gets."""
    w = random_weights(GPT_OSS, 3, 64, 64)
    getattr(w, name)[place] = 255
    w = replace(w, **{n: getattr(w, n).view(scale_dtype) for n in ("w13_scale", "w2_scale")})
    before = clone(w)
    with pytest.raises(
        ValueError,
        match=rf"{name}\[{place[0]}, {place[1]}, {place[2]}\] is 255; which is NaN in E8M0",
    ):
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="reference")
    assert not w.consumed
    assert torch.equal(bits(getattr(w, name)), bits(getattr(before, name)))


class Flushing(Sm90Kernel):
    """Cannot multiply by 2**-127, as FlashInfer's."""

    name = "flushing"

    def __init__(self) -> None:
        super().__init__("folded")
        self.name = "flushing"

    def warm_up(self, p):
        pass

    def layout(self, device: torch.device) -> Layout:
        return replace(super().layout(device), least_scale=1)


@pytest.fixture
def _flushing(registered):
    with registered(Plugin(Flushing())):
        yield


def test_flashinfer_cannot_multiply_by_the_smallest_scale(monkeypatch) -> None:
    """Its kernels shift the byte to a float32's exponent, so that 0 is 0.0 and not 2**-127: its
    layout says so.
    """
    from hopper_mxfp4.kernels.flashinfer import compat
    from hopper_mxfp4.kernels.flashinfer import kernel as flashinfer

    monkeypatch.setattr(compat, "flashinfer_moe", StandIn)
    monkeypatch.setattr(compat, "compiled_module", lambda: "fused_moe_90.so")
    assert flashinfer._layout.__wrapped__(torch.device("cpu")).least_scale == 1


@pytest.mark.usefixtures("_flushing")
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize(
    ("name", "place"), [("w13_scale", (1, 97, 2)), ("w2_scale", (2, 95, 2))], ids=str
)
def test_a_scale_that_the_kernel_cannot_multiply_by(name, place, family, scale_dtype) -> None:
    """Fine over zeros of either sign, which is how quantisers leave dead groups; refused, with its
    place, over anything else.
    """
    e, row, group = place
    w = random_weights(family, 3, 128, 96, scale_dtype=scale_dtype)
    getattr(w, name)[place] = 2.0**-127 if scale_dtype == torch.float32 else 0
    if scale_dtype == torch.float8_e8m0fnu:
        getattr(w, name).view(torch.uint8)[place] = 0
    codes = getattr(w, name.removesuffix("_scale"))[e, row, 16 * group : 16 * group + 16]
    codes.fill_(0x88)
    p = prepare_experts(clone(w), family=family, swiglu=SwiGLU(), kernel="flushing")
    assert_restored(restore_weights(p), w)
    codes[15] = 0x80 | 1
    before = clone(w)
    with pytest.raises(
        ValueError,
        match=rf"{name}\[{e}, {row}, {group}\] is 0; which kernel flushing .*"
        "use kernel='reference'",
    ):
        prepare_experts(w, family=family, swiglu=SwiGLU(), kernel="flushing")
    assert not w.consumed
    for field, t in before.tensors().items():
        assert torch.equal(bits(getattr(w, field)), bits(t)), field
    assert_restored(
        restore_weights(
            prepare_experts(clone(w), family=family, swiglu=SwiGLU(), kernel="reference")
        ),
        w,
    )


@pytest.mark.usefixtures("_flushing")
def test_such_a_scale_late_in_a_large_layer_and_beyond_the_true_size(monkeypatch) -> None:
    """The place named is that in the whole tensor; what is beyond the true size is nobody's."""
    from hopper_mxfp4.checkpoint import weights as checks

    monkeypatch.setattr(checks, "CHUNK_BYTES", 1 << 10)  # an expert a chunk
    w = random_weights(DEEPSEEK_V4, 5, 128, 128)
    w.w2_scale[3, 100, 3] = 0
    with pytest.raises(ValueError, match=r"w2_scale\[3, 100, 3\] is 0"):
        prepare_experts(clone(w), family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="flushing")
    small = replace(clone(w), hidden_size=96)
    assert (
        prepare_experts(
            small, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="flushing"
        ).shape.hidden_size
        == 96
    )


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_experts_of_zeros(family) -> None:
    """Zeros of either sign at any scale: what an expert's bias alone gives, and no NaN."""
    w = random_weights(family, 3, 64, 32, scales=(0, 254))
    for t in (w.w13, w.w2):
        t[0], t[1] = 0, 0x88
        t[2] &= 0x77
    for t in (w.w13_scale, w.w2_scale):
        t[2] = 120
    x, ids, weights = random_call(8, 3, 64, 2, seed=1)
    wanted = Dense(w, family, SWIGLU[family.name])(x, ids, weights)
    y = fused_moe(
        x,
        ids,
        weights,
        prepare_experts(w, family=family, swiglu=SWIGLU[family.name], kernel="reference"),
    )
    assert row_ulps(y, wanted).le(4).all()


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 2.0**-133, 2.0**-126, 2.0**-60], ids=lambda v: f"{v:g}"
)
def test_small_x(family, value) -> None:
    """Zeros of either sign, bfloat16's smallest subnormal and normal numbers, alone in a row and
    among ordinary ones.
    """
    w = random_weights(family, 3, 64, 32)
    x, ids, weights = random_call(6, 3, 64, 2, seed=2)
    x[0] = value
    x[1, ::2] = value
    wanted = Dense(w, family, SWIGLU[family.name])(x, ids, weights)
    y = fused_moe(
        x,
        ids,
        weights,
        prepare_experts(w, family=family, swiglu=SWIGLU[family.name], kernel="reference"),
    )
    assert row_ulps(y, wanted).le(4).all()


def clamp_layer(family, gate: float, up: float):
    """One expert whose gate and up are these numbers for x = (1, 0, ..) and whose output's first
    element is the activation.

    Through the bias where there is one, since 2.88 bits do not hold 6.96875; else through x and a
    weight of one.
    """
    h = i = 32
    w = random_weights(family, 1, h, i)
    for t in (w.w13, w.w2):
        t.zero_()
    w.w13_scale.fill_(127)
    w.w2_scale.fill_(127)
    w.w2[0, 0, 0] = 0x02  # 1.0
    x = torch.zeros(1, h).bfloat16()
    if family.bias:
        w.w13_bias.zero_()
        w.w2_bias.zero_()
        w.w13_bias[0, 0], w.w13_bias[0, 1] = gate, up
    else:
        w.w13[0, 0, 0], w.w13[0, i, 0] = 0x02, 0x20  # gate reads x[0], up x[1]
        x[0, 0], x[0, 1] = gate, up
    return w, x


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("kernel", ["reference", "sm90-folded"])
def test_values_at_the_clamp_limit(family, kernel) -> None:
    """At the limit, the bfloat16s next to it, far beyond, and minus all that, for gate and up."""
    swiglu = SWIGLU[family.name]
    step = 2.0 ** (math.floor(math.log2(swiglu.limit)) - 7)
    edge = [swiglu.limit - step, swiglu.limit, swiglu.limit + step, 3e38]
    results = {}
    for gate in edge + [-v for v in edge]:
        for up in edge + [-v for v in edge]:
            w, x = clamp_layer(family, gate, up)
            p = prepare_experts(w, family=family, swiglu=swiglu, kernel=kernel)
            y = fused_moe(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), p)
            g, u = min(gate, swiglu.limit), max(-swiglu.limit, min(up, swiglu.limit))
            wanted = g / (1 + math.exp(min(-swiglu.alpha * g, 700))) * (u + swiglu.beta)
            assert y[0, 0].item() == pytest.approx(wanted, rel=2**-8, abs=1e-30)
            assert not y[0, 1:].any()
            results[gate, up] = y[0, 0].item()
    above, at, below = (
        results[edge[2], edge[2]],
        results[edge[1], edge[1]],
        results[edge[0], edge[0]],
    )
    assert above == at == results[3e38, 3e38] != below


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
@pytest.mark.parametrize("kernel", ["reference", "sm90-folded", "sm90-by_k"])
def test_a_broken_row_stays_alone(kernel, family, value) -> None:
    """One element of x, or all of a row, beside rows that share its experts: the others' bits are
    what they were.
    """
    w = random_weights(family, 3, 64, 64)
    p = prepare_experts(w, family=family, swiglu=SWIGLU[family.name], kernel=kernel)
    x, ids, weights = random_call(12, 3, 64, 4, seed=3)
    ids.clamp_(min=0)
    whole = fused_moe(x, ids, weights, p)
    assert whole.isfinite().all()
    for where in (slice(None), slice(5, 6)):
        broken = x.clone()
        broken[7, where] = value
        y = fused_moe(broken, ids, weights, p)
        others = torch.arange(12) != 7
        assert torch.equal(y[others], whole[others])
        assert not torch.equal(y[7], whole[7])
