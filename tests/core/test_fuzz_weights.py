"""Preparing weights of any shape, dtype, stride, device and value: right and restorable, or a
documented error and nothing changed.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense import Dense, row_ulps
from hopper_mxfp4 import (
    ExpertWeights,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    allocate_weights,
    family_for,
    fused_moe,
    prepare_experts,
    restore_weights,
)
from random_layers import FAMILIES, assert_restored, bits, clone, random_weights

pytestmark = pytest.mark.usefixtures("sm90_kernels", "one_thread")

CASES = 2_500
FIELDS = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")
SPOILT = (
    *(
        "float32",
        "int32",
        "bool",
        "meta",
        "flat",
        "rank 4",
        "a row more",
        "a column less",
        "an expert more",
        "no experts",
        "gone",
        "a list",
    ),
    *("nan", "not a power of two", "negative", "inf"),
)
STORED = (
    "contiguous",
    "contiguous",
    "contiguous",
    "transposed",
    "stepped",
    "sliced",
    "requires grad",
)
WEIGHTS = {
    "family": st.sampled_from(FAMILIES),
    "as_family": st.sampled_from((0,) * 20 + (1,)),  # 1: prepared as the other family
    "sizes": st.tuples(
        st.integers(1, 3), st.sampled_from((32, 64, 96, 128)), st.sampled_from((32, 64, 128))
    ),
    "true": st.sampled_from(
        ((None, None),) * 8
        + ((32, None), (None, 32), (32, 32), (33, None), (0, None), (None, -32), (4096, 32))
    ),
    "weight_dtype": st.sampled_from((torch.uint8, torch.int8)),
    "scale_dtype": st.sampled_from((torch.uint8, torch.float8_e8m0fnu, torch.float32)),
    "stored": st.sampled_from([(field, how) for field in FIELDS for how in STORED]),
    "spoilt": st.sampled_from([None] * 200 + [(field, how) for field in FIELDS for how in SPOILT]),
    "kernel": st.sampled_from(
        ("reference",) * 20
        + ("auto",) * 5
        + ("sm90-folded", "sm90-by_k", "flashinfer", "no such kernel")
    ),
    "swiglu": st.sampled_from((SwiGLU(), SwiGLU(1.702, 1.0, 7.0), SwiGLU(0.5, -1.0, 0.25))),
    "seed": st.integers(0, 2**31),
}


def stored(t: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "stepped":
        return torch.stack((t, t), -1)[..., 0]
    if how == "sliced":
        larger = torch.empty([n + 3 for n in t.shape], dtype=t.dtype)
        return larger[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)
    return (
        torch.nn.Parameter(t, requires_grad=t.is_floating_point() and t.element_size() > 1)
        if how == "requires grad"
        else t
    )


def spoil(t: torch.Tensor, how: str, where: int):
    """The tensor with one thing wrong, or itself where that can't be wrong of its dtype."""
    if how in ("float32", "int32", "bool"):
        dtype = getattr(torch, how)
        return t.view(torch.uint8).to(dtype) if t.element_size() == 1 else t.to(dtype)
    changes = {
        "meta": lambda: t.to("meta"),
        "flat": lambda: t.flatten(),
        "rank 4": lambda: t[None, None],
        "a row more": lambda: torch.cat((t.view(torch.uint8), t[:, :1].view(torch.uint8)), 1).view(
            t.dtype
        ),
        "a column less": lambda: t[..., :-1],
        "an expert more": lambda: torch.cat((t.view(torch.uint8), t[:1].view(torch.uint8))).view(
            t.dtype
        ),
        "no experts": lambda: t[:0],
        "gone": lambda: None,
        "a list": lambda: t.tolist(),
    }
    if how in changes:
        return changes[how]()
    t = t.clone()
    values = {"nan": math.nan, "not a power of two": 3.0, "negative": -1.0, "inf": math.inf}
    if t.dtype in (torch.float32, torch.bfloat16):
        t.view(-1)[where % t.numel()] = values[how]
    elif how == "nan":
        t.view(torch.uint8).view(-1)[where % t.numel()] = 255
    return t


def is_good(w: ExpertWeights, c: dict, family) -> bool:
    """What ExpertWeights, the family and prepare_experts ask, of everything this file can make, in
    their docstrings' words.
    """
    if c["kernel"] in ("flashinfer", "no such kernel") or (
        family.bias != (w.w13_bias is not None) or family.bias != (w.w2_bias is not None)
    ):
        return False
    e, h, i = c["sizes"]
    shapes = {
        "w13": (e, 2 * i, h // 2),
        "w2": (e, h, i // 2),
        "w13_scale": (e, 2 * i, h // 32),
        "w2_scale": (e, h, i // 32),
    }
    shapes |= {"w13_bias": (e, 2 * i), "w2_bias": (e, h)} if family.bias else {}
    for name, shape in shapes.items():
        t = getattr(w, name)
        if not isinstance(t, torch.Tensor) or tuple(t.shape) != shape or t.is_meta:
            return False
        scale, bias = name.endswith("scale"), name.endswith("bias")
        dtypes = (
            [torch.uint8, torch.float8_e8m0fnu, torch.float32]
            if scale
            else [torch.bfloat16]
            if bias
            else [torch.uint8, torch.int8]
        )
        if t.dtype not in dtypes:
            return False
    true_h, true_i = w.hidden_size, w.intermediate_size
    if not all(
        n is None or (0 < n <= most and n % 32 == 0) for n, most in ((true_h, h), (true_i, i))
    ):
        return False
    true = true_corner(w, family)
    biases = [t for t in (true.w13_bias, true.w2_bias) if t is not None]
    return all(b.isfinite().all() for b in biases) and all(
        good_scale(s) for s in (true.w13_scale, true.w2_scale)
    )


def good_scale(s: torch.Tensor) -> bool:
    if s.dtype == torch.float32:
        return bool((s.isfinite() & (s > 0)).all() and (torch.frexp(s).mantissa == 0.5).all())
    return not (s.contiguous().view(torch.uint8) == 255).any()


def true_corner(w: ExpertWeights, family) -> ExpertWeights:
    """The checkpoint's tensors within larger ones, as views."""
    _, rows, half_h = w.w13.shape
    h, i = w.hidden_size or 2 * half_h, w.intermediate_size or rows // 2
    row = (
        torch.arange(2 * i)
        if family.rows == "interleaved"
        else torch.cat((torch.arange(i), torch.arange(rows // 2, rows // 2 + i)))
    )

    def rows_of(t: torch.Tensor | None) -> torch.Tensor | None:
        return (
            None
            if t is None
            else (t.view(torch.uint8) if t.element_size() == 1 else t)[:, row].view(t.dtype)
        )

    return ExpertWeights(
        w13=rows_of(w.w13)[..., : h // 2],
        w2=w.w2[:, :h, : i // 2],
        w13_scale=rows_of(w.w13_scale)[..., : h // 32],
        w2_scale=w.w2_scale[:, :h, : i // 32],
        w13_bias=rows_of(w.w13_bias),
        w2_bias=None if w.w2_bias is None else w.w2_bias[:, :h],
    )


def make(c: dict) -> ExpertWeights:
    w = random_weights(
        c["family"],
        *c["sizes"],
        weight_dtype=c["weight_dtype"],
        scale_dtype=c["scale_dtype"],
        seed=c["seed"],
    )
    (name, how), changes = c["stored"], {}
    if getattr(w, name) is not None:
        changes[name] = stored(getattr(w, name), how)
    if c["spoilt"] is not None:
        name, how = c["spoilt"]
        t = getattr(w, name)
        changes[name] = torch.zeros(2, 2) if t is None else spoil(t, how, c["seed"])
    return replace(w, **changes, hidden_size=c["true"][0], intermediate_size=c["true"][1])


def test_prepare_experts(tell) -> None:
    outcomes = Counter()

    @given(st.fixed_dictionaries(WEIGHTS))
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(c) -> None:
        w, family = make(c), FAMILIES[(FAMILIES.index(c["family"]) + c["as_family"]) % 2]
        good, before = (
            is_good(w, c, family),
            {name: t.clone() for name, t in w.tensors().items() if not t.is_meta},
        )
        try:
            p = prepare_experts(w, family=family, swiglu=c["swiglu"], kernel=c["kernel"])
        except (ValueError, KernelUnavailable) as error:
            refused = str(error)
        else:
            refused = None
        assert good == (refused is None), refused
        if refused:
            assert not w.consumed
            assert "\n" not in refused
            assert "; " in refused or "which is NaN" in refused, refused
            for name, t in before.items():
                assert torch.equal(bits(getattr(w, name).detach()), bits(t.detach())), (
                    f"{name} was changed"
                )
            outcomes[f"documented error ({'kernel' if 'kernel' in refused else 'weights'})"] += 1
            return
        true = true_corner(replace(w, **before), family)
        true = replace(true, **{name: t.detach() for name, t in true.tensors().items()})
        assert_restored(restore_weights(p), true)
        g = torch.Generator().manual_seed(c["seed"])
        h, e = p.shape.hidden_size, p.shape.num_experts
        x, ids, weights = (
            torch.randn(3, h, generator=g).bfloat16(),
            torch.randint(-1, e, (3, 2), generator=g),
            torch.rand(3, 2, generator=g),
        )
        wanted = Dense(clone(true), family, c["swiglu"])(x, ids, weights)
        assert row_ulps(fused_moe(x, ids, weights, p), wanted).le(4).all()
        outcomes["right result"] += 1

    run()
    total = tell(outcomes)
    assert total >= CASES
    assert len(outcomes) == 3
    assert min(outcomes.values()) > total / 50
    assert outcomes["right result"] > total / 4


def test_allocate_weights_and_configs(tell) -> None:
    """Sizes that are none, and configs that hold anything: a layer that prepares, a family, or a
    ValueError.
    """
    outcomes = Counter()
    anything = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-8, 8),
        st.floats(),
        st.text(max_size=3),
        st.lists(st.integers(), max_size=2),
    )

    @given(
        st.integers(-1, 3),
        st.sampled_from((32, 64, 96, 128, 160, 0, -32, 33)),
        st.sampled_from((32, 64, 96, 128, 160, 0, -64, 48)),
        st.sampled_from(FAMILIES),
        st.sampled_from(("reference", "reference", "sm90-folded")),
        st.sampled_from((torch.uint8, torch.int8, torch.float32)),
    )
    @settings(
        max_examples=500,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def allocate(e, h, i, family, kernel, dtype) -> None:
        good = e > 0 and all(n > 0 and n % 32 == 0 for n in (h, i)) and dtype != torch.float32
        try:
            w = allocate_weights(
                LayerShape(e, h, i), family=family, device="cpu", kernel=kernel, weight_dtype=dtype
            )
        except ValueError as error:
            w, refused = None, str(error)
        assert good == (w is not None)
        outcomes["allocated" if good else "allocation refused"] += 1
        if w is None:
            assert "; give " in refused
            return
        y = fused_moe(
            torch.ones(1, h, dtype=torch.bfloat16),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
            prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=kernel),
        )
        assert torch.equal(y, torch.zeros(1, h, dtype=torch.bfloat16))

    @given(
        st.one_of(st.sampled_from(("gpt_oss", "gpt_oss", "deepseek_v4", "deepseek_v41")), anything),
        st.one_of(anything, st.floats(0, 16)),
        st.one_of(anything, st.floats(0, 16)),
    )
    @settings(
        max_examples=2_500,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def configure(model_type, alpha, limit) -> None:
        config = {"model_type": model_type, "swiglu_alpha": alpha, "swiglu_limit": limit}
        known = isinstance(model_type, str) and model_type.startswith(("gpt_oss", "deepseek_v4"))
        swiglu = refused = None
        try:
            name = family_for(config).name
            swiglu = SwiGLU.from_config(config)
        except ValueError as error:
            refused = str(error)
        if swiglu is None:
            assert known == ("model_type" not in refused), refused
            outcomes["config refused"] += 1
            return
        assert known
        assert name in ("gpt_oss", "deepseek_v4")
        outcomes["config read"] += 1
        assert math.isfinite(swiglu.alpha)
        assert swiglu.limit is None or 0 < swiglu.limit < math.inf
        assert swiglu(torch.ones(1), torch.ones(1)).isfinite().all()

    allocate()
    configure()
    assert tell(outcomes) >= 3_000
    assert len(outcomes) == 4
    assert min(outcomes.values()) >= 50
