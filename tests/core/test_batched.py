"""`batched_moe`: tokens sorted by expert, of which only the device knows how many came."""

import pytest
import torch

from hopper_mxfp4 import (
    SwiGLU,
    batched_moe,
    observe,
    prepare_experts,
    reference_moe,
    workspace_bytes,
)
from hopper_mxfp4 import batched as batched_module
from no_sync import NoSync, dense_kernel
from random_layers import FAMILIES, FAMILY_IDS, clone, random_weights

EXPERTS, SLOTS, HIDDEN, INTERMEDIATE = 5, 7, 160, 96
SWIGLU = SwiGLU(1.702, 1.0, 7.0)
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _dense():
    with dense_kernel():
        yield


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILY_IDS)
def weights(request):
    return random_weights(request.param, EXPERTS, HIDDEN, INTERMEDIATE), request.param


@pytest.fixture(scope="module", params=["reference", "dense", "sm90-folded"])
def layer(request, weights, sm90_kernels):
    w, family = weights
    return w, family, prepare_experts(clone(w), family=family, swiglu=SWIGLU, kernel=request.param)


def slots(counts, seed=0) -> torch.Tensor:
    """x whose slots behind the counts are NaN, as memory that nobody wrote may be."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(EXPERTS, SLOTS, HIDDEN, generator=g).bfloat16()
    for e, count in enumerate(counts):
        x[e, count:] = NAN
    return x


def wanted(w, family, x, counts) -> torch.Tensor:
    """The reference, an expert at a time, over the tokens that came."""
    y = torch.zeros(x.shape)
    for e, count in enumerate(counts):
        ids, ones = torch.full((count, 1), e), torch.ones(count, 1)
        y[e, :count] = reference_moe(x[e, :count], ids, ones, w, family=family, swiglu=SWIGLU)
    return y.bfloat16()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "counts",
    [(3, 0, SLOTS, 1, 2), (0,) * EXPERTS, (SLOTS,) * EXPERTS, (0, 0, 0, 0, 1)],
    ids=["some", "none", "full", "one"],
)
def test_each_expert_gets_its_own_slots(layer, counts, dtype) -> None:
    """Slots behind the counts come out as zeros, whatever lay there: nothing that a framework
    could sum turns into NaN."""
    w, family, p = layer
    x = slots(counts)
    before = x.clone()
    y = batched_moe(x, torch.tensor(counts, dtype=dtype), p)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, torch.bfloat16, True)
    # Float32 products of other numbers of rows may differ in their last bits.
    assert torch.allclose(y.float(), wanted(w, family, x, counts).float(), rtol=2e-2, atol=1e-3)
    for e, count in enumerate(counts):
        assert not y[e, count:].any()
        assert count == 0 or y[e, :count].abs().max() > 0
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))


def test_a_count_above_the_slots_is_all_of_them(layer) -> None:
    _, _, p = layer
    x = slots((SLOTS,) * EXPERTS)
    full = batched_moe(x, torch.full((EXPERTS,), SLOTS), p)
    assert torch.equal(batched_moe(x, torch.full((EXPERTS,), 2**31), p), full)


def test_counts_change_between_calls_that_share_everything_else(layer) -> None:
    """As under a CUDA graph: the same tensors again, with other values in them."""
    w, family, p = layer
    x, counts = (
        torch.empty(EXPERTS, SLOTS, HIDDEN, dtype=torch.bfloat16),
        torch.empty(EXPERTS).int(),
    )
    out = torch.full_like(x, NAN)
    for seed, now in enumerate([(1, 2, 3, 4, 5), (0, SLOTS, 0, 2, 0), (SLOTS, 0, 1, 0, 3)]):
        x.copy_(slots(now, seed))
        counts.copy_(torch.tensor(now))
        assert batched_moe(x, counts, p, out=out) is out
        assert torch.allclose(out.float(), wanted(w, family, x, now).float(), rtol=2e-2, atol=1e-3)


def test_nothing_waits_for_the_device(weights) -> None:
    w, family = weights
    p = prepare_experts(clone(w), family=family, swiglu=SWIGLU, kernel="dense")
    counts = (3, 0, SLOTS, 1, 2)
    x, out = slots(counts), torch.empty(EXPERTS, SLOTS, HIDDEN, dtype=torch.bfloat16)
    p.launch_plans.clear()
    batched_moe(x, torch.tensor(counts), p)  # the first call prepares, before any graph
    with NoSync():
        batched_moe(x, torch.tensor(counts), p, out=out)
    assert torch.allclose(out.float(), wanted(w, family, x, counts).float(), rtol=2e-2, atol=1e-3)
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.tensor(counts).max().item()
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        x[x > 0]
    with NoSync(), pytest.raises(AssertionError, match="waits for a copy"):
        x.to("meta")


def test_what_a_kernel_is_handed(weights) -> None:
    """One token a slot with one expert of weight 1; views of x and out, not copies."""
    w, family = weights
    p = prepare_experts(clone(w), family=family, swiglu=SWIGLU, kernel="reference")
    counts = (3, 0, SLOTS, 1, 2)
    x, out = slots(counts), torch.empty(EXPERTS, SLOTS, HIDDEN, dtype=torch.bfloat16)
    room = torch.empty(workspace_bytes(p, EXPERTS * SLOTS, 1) + 64, dtype=torch.uint8)
    calls = []
    end = observe.watch(lambda p, call: calls.append(call))
    batched_moe(x, torch.tensor(counts), p, out=out, workspace=room)
    end()
    (call,) = calls
    assert (call.x.data_ptr(), call.out.data_ptr()) == (x.data_ptr(), out.data_ptr())
    assert call.workspace is room
    ids = torch.full((EXPERTS, SLOTS), -1)
    for e, count in enumerate(counts):
        ids[e, :count] = e
    assert call.topk_ids.dtype == torch.int32
    assert torch.equal(call.topk_ids, ids.view(-1, 1).int())
    assert torch.equal(call.topk_weights, torch.ones(EXPERTS * SLOTS, 1))


def test_no_slots(layer) -> None:
    _, _, p = layer
    y = batched_moe(torch.empty(EXPERTS, 0, HIDDEN).bfloat16(), torch.zeros(EXPERTS).int(), p)
    assert y.shape == (EXPERTS, 0, HIDDEN)


def test_constants_of_a_graph_are_not_kept(monkeypatch) -> None:
    """What is made while a graph is captured holds nothing until that graph runs; and what another
    stream made may not have been written yet."""
    cpu, stream = torch.device("cpu"), [1]
    monkeypatch.setattr(batched_module, "_kept", {})
    monkeypatch.setattr(batched_module, "_stream", lambda device: stream[0])
    monkeypatch.setattr(batched_module, "_capturing", lambda device: True)
    captured = batched_module._constants(cpu, 3, 4)
    assert not batched_module._kept
    monkeypatch.setattr(batched_module, "_capturing", lambda device: False)
    kept = batched_module._constants(cpu, 3, 4)
    assert kept is not captured
    assert batched_module._constants(cpu, 3, 4) is kept
    monkeypatch.setattr(batched_module, "_capturing", lambda device: True)
    assert batched_module._constants(cpu, 3, 4) is kept  # made before the capture began
    stream[0] = 2
    assert batched_module._constants(cpu, 3, 4) is not kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(EXPERTS * SLOTS, HIDDEN).bfloat16()}, r"x is bfloat16 \[35, 160\]"),
        (
            {"x": torch.zeros(EXPERTS + 1, SLOTS, HIDDEN).bfloat16()},
            r"give contiguous bfloat16 \[5",
        ),
        ({"x": torch.zeros(EXPERTS, SLOTS, HIDDEN)}, "x is float32"),
        ({"x": torch.zeros(EXPERTS, HIDDEN, SLOTS).bfloat16().mT}, "with strides"),
        ({"counts": torch.zeros(EXPERTS + 1).int()}, r"counts is int32 \[6\]"),
        ({"counts": torch.zeros(EXPERTS)}, "counts is float32"),
        ({"counts": torch.zeros(EXPERTS, 1).int()}, r"counts is int32 \[5, 1\]"),
        ({"counts": torch.zeros(EXPERTS, device="meta").int()}, "on meta"),
        ({"out": torch.zeros(EXPERTS * SLOTS, HIDDEN).bfloat16()}, "out is bfloat16"),
        ({"out": torch.zeros(EXPERTS, SLOTS, HIDDEN)}, "out is float32"),
        ({"workspace": torch.zeros(8)}, "workspace is float32"),
    ],
)
def test_bad_arguments_are_named(weights, changes, message) -> None:
    w, family = weights
    p = prepare_experts(clone(w), family=family, swiglu=SWIGLU, kernel="reference")
    arguments = {
        "x": torch.zeros(EXPERTS, SLOTS, HIDDEN).bfloat16(),
        "counts": torch.zeros(EXPERTS).int(),
        "p": p,
    }
    with pytest.raises(ValueError, match=message):
        batched_moe(**arguments | changes)


def test_out_must_not_be_x(weights) -> None:
    w, family = weights
    p = prepare_experts(clone(w), family=family, swiglu=SWIGLU, kernel="reference")
    x = slots((1,) * EXPERTS)
    with pytest.raises(ValueError, match="out shares memory with x"):
        batched_moe(x, torch.ones(EXPERTS).int(), p, out=x)
