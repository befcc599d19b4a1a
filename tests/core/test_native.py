"""The native kernel's choice between narrow and wide, and what it asks of both."""

import logging
from types import SimpleNamespace

import pytest
import torch

from hopper_mxfp4 import GPT_OSS, LayerShape, SwiGLU, prepare_experts, restore_weights
from hopper_mxfp4.kernels.native import NARROW_PAIRS_PER_EXPERT, NativeKernel, narrow_tokens
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.registry import kernels
from random_layers import assert_same_bits, clone, random_weights

CPU = torch.device("cpu")


def layer(experts=32, batch_invariant=False, ep_size=1):
    return SimpleNamespace(
        shape=LayerShape(experts, 2880, 2880),
        batch_invariant=batch_invariant,
        ep_size=ep_size,
        plans={},
    )


@pytest.mark.parametrize(
    ("options", "top_k", "wanted"),
    [
        ({}, 4, 96),
        ({"experts": 128}, 4, 384),
        ({"experts": 256}, 6, 512),
        ({"ep_size": 4}, 4, 384),
        ({"batch_invariant": True}, 4, 0),
    ],
)
def test_where_wide_takes_over(options, top_k, wanted, caplog):
    log_once.cache_clear()
    p = layer(**options)
    with caplog.at_level(logging.INFO, "hopper_mxfp4.kernels.native"):
        assert narrow_tokens(p, top_k) == wanted
        assert narrow_tokens(p, top_k) == wanted
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (0 if wanted == 0 else 1), "decided, and said, once a layer"
    assert all(f"narrow up to {wanted} tokens, a guess" in line for line in lines)
    assert NARROW_PAIRS_PER_EXPERT == 12


def test_it_asks_for_what_the_kernel_it_takes_needs():
    native = NativeKernel()
    native._narrow, native._wide = (
        SimpleNamespace(
            workspace_bytes=lambda p, tokens, top_k, each=each: each * tokens,
            make_runner=lambda p, tokens, top_k, name=name: (name, tokens),
        )
        for name, each in (("narrow", 100), ("wide", 7))
    )
    p = layer()
    assert [native.make_runner(p, m, 4) for m in (1, 96, 97, 4096)] == [
        ("narrow", 1), ("narrow", 96), ("wide", 97), ("wide", 4096)
    ]  # fmt: skip
    assert native.workspace_bytes(p, 50, 4) == 5000
    assert native.workspace_bytes(p, 200, 4) == 9600, "calls of fewer tokens get the same buffer"
    assert native.workspace_bytes(p, 1 << 14, 4) == 7 << 14
    assert native.workspace_bytes(layer(batch_invariant=True), 50, 4) == 350, "wide alone"


def test_both_are_warmed_up_and_either_may_refuse(monkeypatch):
    native, seen = NativeKernel(), []
    native._narrow, native._wide = (
        SimpleNamespace(
            warm_up=lambda p, name=name: seen.append(name),
            unsupported_reason=lambda *args, name=name: reasons.get(name),
        )
        for name in ("narrow", "wide")
    )
    native.warm_up(None)
    assert sorted(seen) == ["narrow", "wide"]
    for name in ("narrow", "wide"):
        reasons = {name: f"{name} can't"}
        assert native.unsupported_reason(LayerShape(1, 64, 64), CPU) == f"{name} can't"
    reasons = {}
    assert native.unsupported_reason(LayerShape(1, 64, 64), CPU) is None


def test_only_scales_that_both_multiply_by_exactly(monkeypatch):
    layout, native = NativeKernel().layout(CPU), kernels()["native"]
    for kernel in (native._narrow, native._wide):
        each = kernel.layout(CPU)
        assert layout.name == each.name
        assert layout.least_scale >= each.least_scale
        assert layout.greatest_scale <= each.greatest_scale
    assert (layout.least_scale, layout.greatest_scale) == (1, 128)
    monkeypatch.setattr(NativeKernel, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(NativeKernel, "warm_up", lambda *args: None)
    w = random_weights(GPT_OSS, 2, 96, 64)
    p = prepare_experts(clone(w), family=GPT_OSS, swiglu=SwiGLU(), kernel="native")
    assert_same_bits(restore_weights(p), w)
    w.w13_scale[1, 3, 2] = 129
    with pytest.raises(ValueError, match=r"w13_scale\[1, 3, 2\] is 129"):
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="native")


def test_auto_does_not_choose_it_yet():
    assert not kernels()["native"].auto_devices
