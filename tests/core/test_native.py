"""The choice of native between narrow and wide and of native8 between narrow8 and wide8, and what
they ask of both.
"""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from hopper_mxfp4 import (
    GPT_OSS,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    env,
    prepare_experts,
    restore_weights,
)
from hopper_mxfp4.kernels import native
from hopper_mxfp4.kernels.native import Native8Kernel, NativeKernel
from hopper_mxfp4.kernels.select import choose_kernel
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.registry import kernels
from hopper_mxfp4.tuning.cards import card_of
from random_layers import assert_same_bits, clone, random_weights
from test_wide import CUDA, hopper

__all__ = ["hopper"]  # a fixture

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
        w13=torch.empty(0),
        w13_scale=torch.tensor([120, greatest_scale], dtype=torch.uint8),
        w2_scale=torch.tensor([127], dtype=torch.uint8),
    )
    kernel = NativeKernel()
    kernel._narrow = kernel._wide = SimpleNamespace(warm_up=lambda p: None)
    kernel.warm_up(p)
    return p


FLASH = {"experts": 256, "hidden": 4096, "intermediate": 2048}


@pytest.mark.parametrize(
    ("options", "top_k", "h100", "h200"),
    [
        ({}, 4, 32, 56),
        ({"experts": 128}, 4, 32, 224),
        (FLASH, 6, 21, 298),
        ({"experts": 8, "ep_size": 4}, 4, 40, 56),
        ({"ep_size": 4}, 4, 128, 224),
        ({"ep_size": 17}, 4, 512, 512),  # as many pairs as narrow takes at once
        ({"batch_invariant": True}, 4, 0, 0),
        ({"greatest_scale": 129}, 4, sys.maxsize, sys.maxsize),
        ({"greatest_scale": 129, "batch_invariant": True}, 4, sys.maxsize, sys.maxsize),
    ],
)
def test_where_wide_takes_over(options, top_k, h100, h200, monkeypatch):
    for fast, wanted in ((False, h100), (True, h200)):
        monkeypatch.setattr(native, "has_fast_memory", lambda device, fast=fast: fast)
        assert NativeKernel()._narrow_tokens(layer(**options), top_k) == wanted


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("NVIDIA H100 80GB HBM3", False),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA H100 NVL", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA H20", True),
    ],
)
def test_cards_with_fast_memory(name, fast, monkeypatch):
    card = card_of(name)
    properties = SimpleNamespace(multi_processor_count=card.multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert native.has_fast_memory.__wrapped__(CUDA) is fast


@pytest.mark.parametrize("fast", [False, True], ids=["H100", "H200"])
@pytest.mark.parametrize(
    ("options", "top_k", "h100", "h200"),
    [
        ({}, 4, 32, 8),
        (FLASH, 6, 21, 5),
        ({"ep_size": 4}, 4, 128, 32),
        ({"ep_size": 1000}, 4, 512, 512),  # as many pairs as narrow8 takes at once
        ({"greatest_scale": 250}, 4, 32, 8),
        ({"batch_invariant": True}, 4, 0, 0),
        ({"hidden": 1 << 14}, 4, 0, 0),  # too large for narrow8
    ],
)
def test_where_wide8_takes_over(options, top_k, h100, h200, fast, monkeypatch):
    monkeypatch.setattr(native, "has_fast_memory", lambda device: fast)
    wanted = h200 if fast else h100
    native8 = Native8Kernel()
    p = layer(**options)
    assert native8._narrow_tokens(p, top_k) == wanted
    native8._narrow, native8._wide = (
        SimpleNamespace(make_runner=lambda p, m, top_k, name=name: name, gemm=native8._narrow.gemm)
        for name in ("narrow8", "wide8")
    )
    assert not wanted or native8.make_runner(p, wanted, top_k) == "narrow8"
    assert native8.make_runner(p, wanted + 1, top_k) == "wide8"


def test_native8_has_both_on_one_copy_of_the_weights(monkeypatch):
    native8 = kernels()["native8"]
    assert native8.layout(CPU) is native8._narrow.layout(CPU) is native8._wide.layout(CPU)
    assert (native8._narrow.name, native8._wide.name) == ("narrow8", "wide8")
    seen = []
    for name in ("narrow", "wide"):
        one = SimpleNamespace(warm_up=lambda p, name=name: seen.append(name))
        monkeypatch.setattr(Native8Kernel, f"_{name}", one)
    native8.warm_up(layer(greatest_scale=250))
    assert seen == ["narrow", "wide"]


def test_native8_asks_the_kernels_for_scratch():
    native8, p = Native8Kernel(), layer()
    sizes = [native8.workspace_bytes(p, tokens, 4) for tokens in (1, 16, 300, 2048, 1 << 20)]
    assert sizes == sorted(sizes)
    few = native8._narrow_tokens(p, 4)
    assert native8.workspace_bytes(p, few, 4) == native8._narrow.workspace_bytes(p, few, 4)
    assert sizes[2] >= native8._wide.workspace_bytes(p, 300, 4)


@pytest.mark.usefixtures("hopper")
def test_auto_takes_native8_for_fp8_alone(monkeypatch):
    shape = LayerShape(32, 2880, 2880)
    assert choose_kernel("auto", shape, CUDA, activations="fp8").name == "native8"
    assert choose_kernel("auto", shape, CUDA, activations="bf16").name != "native8"
    monkeypatch.setenv(env.ACTIVATIONS.name, "fp8")
    assert choose_kernel("auto", shape, CUDA).name == "native8"
    monkeypatch.setenv(env.KERNEL.name, "native")
    with pytest.raises(KernelUnavailable, match="native can't run: it multiplies bf16 activations"):
        choose_kernel("auto", shape, CUDA)


def test_it_asks_for_what_the_kernel_it_takes_needs():
    native = NativeKernel()
    native._narrow, native._wide = (
        SimpleNamespace(
            workspace_bytes=lambda p, tokens, top_k, each=each: each * tokens,
            make_runner=lambda p, tokens, top_k, name=name: (name, tokens),
            gemm=NativeKernel._narrow.gemm,
        )
        for name, each in (("narrow", 100), ("wide", 7))
    )
    p = layer()
    assert [native.make_runner(p, m, 4) for m in (1, 56, 57, 4096)] == [
        ("narrow", 1), ("narrow", 56), ("wide", 57), ("wide", 4096)
    ]  # fmt: skip
    assert native.workspace_bytes(p, 50, 4) == 5000
    assert native.workspace_bytes(p, 200, 4) == 5600, "calls of fewer tokens get the same buffer"
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
    nothing = SimpleNamespace(warm_up=lambda p: None, compilations=lambda shape: [])
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
