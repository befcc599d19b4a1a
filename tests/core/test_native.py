"""The native kernel's choice between narrow and wide, and what it asks of both."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from hopper_mxfp4 import GPT_OSS, LayerShape, SwiGLU, prepare_experts, restore_weights
from hopper_mxfp4.kernels.native import NativeKernel, narrow_tokens
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.registry import kernels
from random_layers import assert_same_bits, clone, random_weights

CPU = torch.device("cpu")


def layer(
    experts=32, hidden=2880, intermediate=2880, batch_invariant=False, ep_size=1, greatest_scale=128
):
    p = SimpleNamespace(
        shape=LayerShape(experts, hidden, intermediate),
        batch_invariant=batch_invariant,
        ep_size=ep_size,
        plans={},
        relies_on=set(),
        w13_scale=torch.tensor([120, greatest_scale], dtype=torch.uint8),
        w2_scale=torch.tensor([127], dtype=torch.uint8),
    )
    native = NativeKernel()
    native._narrow = native._wide = SimpleNamespace(warm_up=lambda p: None)
    native.warm_up(p)
    return p


@pytest.mark.parametrize(
    ("options", "top_k", "wanted"),
    [
        ({}, 4, 96),
        ({"experts": 128}, 4, 384),
        ({"experts": 256, "hidden": 4096, "intermediate": 2048}, 6, 298),  # no segments of 16
        ({"ep_size": 4}, 4, 384),
        ({"ep_size": 16}, 4, 512),  # as many pairs as narrow takes at once
        ({"batch_invariant": True}, 4, 0),
        ({"greatest_scale": 129}, 4, sys.maxsize),
        ({"greatest_scale": 129, "batch_invariant": True}, 4, sys.maxsize),
    ],
)
def test_where_wide_takes_over(options, top_k, wanted):
    assert narrow_tokens(layer(**options), top_k) == wanted


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


def test_both_are_warmed_up_and_either_may_refuse(caplog):
    log_once.cache_clear()
    native, seen = NativeKernel(), []
    native._narrow, native._wide = (
        SimpleNamespace(
            warm_up=lambda p, name=name: seen.append(name),
            unsupported_reason=lambda *args, name=name: reasons.get(name),
        )
        for name in ("narrow", "wide")
    )
    native.warm_up(layer())
    assert sorted(seen) == ["narrow", "wide"]
    seen.clear()
    with caplog.at_level(logging.WARNING, "hopper_mxfp4.kernels.native"):
        native.warm_up(layer(greatest_scale=200))
    assert seen == ["narrow"]
    assert "scale bytes up to 200 run narrow at every number of tokens" in caplog.text
    for name in ("narrow", "wide"):
        reasons = {name: f"{name} can't"}
        assert native.unsupported_reason(LayerShape(1, 64, 64), CPU) == f"{name} can't"
    reasons = {}
    assert native.unsupported_reason(LayerShape(1, 64, 64), CPU) is None


def test_weights_are_prepared_for_both_at_once(monkeypatch):
    native = kernels()["native"]
    assert native.layout(CPU) is native._narrow.layout(CPU)
    assert native.layout(CPU).name == native._wide.layout(CPU).name
    monkeypatch.setattr(NativeKernel, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(NativeKernel, "warm_up", lambda *args: None)
    w = random_weights(GPT_OSS, 2, 96, 64)
    w.w13_scale[1, 3, 2] = 254
    p = prepare_experts(clone(w), family=GPT_OSS, swiglu=SwiGLU(), kernel="native")
    assert_same_bits(restore_weights(p), w)


def test_a_reload_that_takes_away_what_graphs_rely_on_is_refused(monkeypatch):
    """Graphs may have captured wide, which would be wrong beyond byte 128; not so narrow."""
    monkeypatch.setattr(NativeKernel, "unsupported_reason", lambda *args: None)
    nothing = SimpleNamespace(warm_up=lambda p: None)
    monkeypatch.setattr(NativeKernel, "_narrow", nothing)
    monkeypatch.setattr(NativeKernel, "_wide", nothing)
    prepared = []
    for byte in (128, 129, 128):
        w = random_weights(GPT_OSS, 2, 96, 64, scales=(100, 120))
        w.w2_scale[1, 2, 1] = byte
        prepared.append(
            prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(limit=7.0), kernel="native")
        )
    first, great, again = prepared
    with pytest.raises(ValueError, match=r"no longer have scale bytes of at most 128, .* restart"):
        first.go_on_after(great)
    for p, reloaded in ((first, again), (great, great), (great, again)):
        p.limit.zero_()
        p.go_on_after(reloaded)
        assert p.limit.tolist() == [7.0, 7.0], "the constants are written again"


def test_auto_chooses_it_first():
    meant = [name for name, kernel in kernels().items() if "cuda" in kernel.auto_devices]
    assert meant[0] == "native"
