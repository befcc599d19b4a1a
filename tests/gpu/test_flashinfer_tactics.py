"""Tactics, determinism and scratch memory on a Hopper GPU. What they cost in time is bench's to
say.
"""

import threading
import time

import pytest
import torch

from hopper_mxfp4 import (
    env,
    fused_moe,
    prepare_experts,
    reference_moe,
    release_workspaces,
    reserve_workspace,
)
from hopper_mxfp4.bench.tune import tune
from hopper_mxfp4.bench.workloads import parse_workload
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer.kernel import (
    layer_tactics,
    make_plan,
    run_pair,
    stock_arguments,
)
from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.tables import DEFAULT
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer

PAIR = (DEFAULT, DEFAULT)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What this machine's user has tuned must not decide what is tested."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    tactics.tables.cache_clear()
    yield
    tactics.tables.cache_clear()


def prepare(family="gpt_oss", e=32, h=2880, i=2880, **variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"HOPPER_MXFP4_{name}", value)
        return prepare_experts(
            random_layer(family, e, h, i), family=FAMILY[family], swiglu=SWIGLU[family]
        )


def same_bytes(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def some(candidates):
    """A few tactics spread over all."""
    return candidates[:: max(len(candidates) // 4, 1)]


@pytest.mark.parametrize("hidden", [2880, 4096], ids=["padded", "unpadded"])
def test_the_direct_call_is_flashinfers_own(hidden, record_property):
    """Recorded on this FlashInfer, and bit for bit what its public function gives with the same
    pair of tactics.
    """
    p = prepare(h=hidden, i=512, DETERMINISTIC="1")
    x, ids, weights = random_call(24, hidden, 32, 4)
    plan = make_plan(p, 4)
    assert plan.direct is not None, "this FlashInfer is called through its wrapper"
    first, second = layer_tactics(plan, p)
    record_property("tactics", len(first) + len(second))
    record_property("finalize", plan.shape.finalize)
    padded = torch.nn.functional.pad(x, (0, p.w2.shape[1] - hidden))
    scratch = torch.empty(p.kernel.workspace_bytes(p, 24, 4), dtype=torch.uint8, device=CUDA)
    for pair in [PAIR, *zip(some(first), some(second), strict=False)]:
        wanted = compat.flashinfer_moe().cutlass_fused_moe(
            input=padded,
            token_selected_experts=ids,
            token_final_scales=weights,
            profile_ids=list(pair),
            **stock_arguments(p),
        )
        wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
        out = torch.full_like(x, float("nan"))
        run_pair(plan, pair, Call(x, ids, weights, out, scratch), p)
        assert same_bytes(out, wanted[:, :hidden].contiguous()), pair


def test_every_tactic_computes_the_layer(record_property):
    """Those that tune may choose from, at a shard's size."""
    w = random_layer("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(40, 2880, 8, 4)
    wanted = reference_moe(x, ids, weights, w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    plan = make_plan(p, 4)
    first, second = layer_tactics(plan, p)
    scratch = torch.empty(p.kernel.workspace_bytes(p, 40, 4), dtype=torch.uint8, device=CUDA)
    out, worst = torch.empty_like(x), 0.0
    for pair in [*((t, DEFAULT) for t in first), *((DEFAULT, t) for t in second)]:
        run_pair(plan, pair, Call(x, ids, weights, out.fill_(float("nan")), scratch), p)
        error = ((out.float() - wanted).norm() / wanted.norm()).item()
        worst = max(worst, error)
        assert error < 5e-3, pair
    record_property("tactics", len(first) + len(second))
    record_property("relative_l2", worst)


def test_deterministic_is_what_runs_anyway(record_property):
    """As long as the second GEMM has no epilogue that sums a token's experts, both modes are the
    same kernels, so the same bytes.
    """
    fused, separate = prepare(), prepare(DETERMINISTIC="1")
    finalize = make_plan(fused, 4).shape.finalize
    record_property("finalize", finalize)
    if finalize == "fused":
        pytest.skip("this FlashInfer has such an epilogue")
    for m in (1, 16, 300):
        call = random_call(m, 2880, 32, 4)
        assert same_bytes(fused_moe(*call, fused), fused_moe(*call, separate))


@pytest.mark.parametrize("m", [1, 64, 512])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_a_thousand_calls_give_the_same_bytes(family, m):
    p = prepare(family, 32, 2880, 736, DETERMINISTIC="1")
    call = random_call(m, 2880, 32, 4)
    first, out = fused_moe(*call, p), torch.empty(m, 2880, dtype=torch.bfloat16, device=CUDA)
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(1000):
        fused_moe(*call, p, out=out)
        differing += (out.view(torch.int16) != first.view(torch.int16)).any()
    assert first.abs().max() > 0
    assert differing.item() == 0


def test_batch_invariance():
    """A token's bytes do not depend on its company, nor on where it stands in it."""
    p = prepare(BATCH_INVARIANT="1")
    assert p.deterministic
    x, ids, weights = random_call(600, 2880, 32, 4)
    whole = fused_moe(x, ids, weights, p)
    assert whole.abs().max() > 0
    for begin, end in ((0, 1), (599, 600), (3, 5), (100, 117), (7, 135), (300, 600)):
        part = slice(begin, end)
        assert same_bytes(fused_moe(x[part], ids[part], weights[part], p), whole[part]), (
            begin,
            end,
        )
    backwards = fused_moe(x.flip(0), ids.flip(0), weights.flip(0), p)
    assert same_bytes(backwards.flip(0), whole)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("hidden", [2880, 4096], ids=["padded", "unpadded"])
def test_a_steady_call_allocates_nothing(hidden, ids_dtype):
    """With a table, as in serving; without one FlashInfer's own Python allocates."""
    release_workspaces()
    p = prepare(h=hidden, i=512, BATCH_INVARIANT="1")
    x, ids, weights = random_call(64, hidden, 32, 4)
    ids, out = ids.to(ids_dtype), torch.empty_like(x)
    reserve_workspace(p, 64, 4)
    for m in (64, 1, 17):
        fused_moe(x[:m], ids[:m], weights[:m], p, out=out[:m])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for m in (64, 1, 17, 64):
        fused_moe(x[:m], ids[:m], weights[:m], p, out=out[:m])
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_scratch_grown_after_a_capture(record_property):
    """A graph's scratch is its own: growing and freeing the core's takes nothing from it."""
    release_workspaces()
    p = prepare(DETERMINISTIC="1")
    x, ids, weights = random_call(8, 2880, 32, 4)
    wanted, out = fused_moe(x, ids, weights, p), torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out)
    before = torch.cuda.memory_allocated()
    fused_moe(*random_call(4096, 2880, 32, 4), p)
    record_property("grown_mib", (torch.cuda.memory_allocated() - before) / 2**20)
    release_workspaces()
    trash = [torch.full((1 << 20,), 255, dtype=torch.uint8, device=CUDA) for _ in range(200)]
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bytes(out, wanted)
    assert all(t.eq(255).all() for t in trash), "the graph wrote to memory that is not its own"


def test_two_streams_and_two_threads_at_once():
    """Each has scratch of its own; nothing runs into another's."""
    p = prepare(DETERMINISTIC="1")
    calls = [random_call(m, 2880, 32, 4, seed=m) for m in (48, 200)]
    wanted = [fused_moe(*call, p) for call in calls]
    torch.cuda.synchronize()
    wrong = []

    def work(call, right):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(100):
                y = fused_moe(*call, p)
                stream.synchronize()
                if not same_bytes(y, right):
                    wrong.append(len(call[0]))

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in zip(calls, wanted, strict=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tuning_a_layer(record_property):
    """From measuring to serving: the table is kept, found, run by, and right."""
    workload = parse_workload("16,2880,384,4,bias")
    begin = time.monotonic()
    table = tune(workload, CUDA, begin + 120, tokens=(1, 64, 1024))
    record_property("seconds", time.monotonic() - begin)
    assert [bucket.tokens for bucket in table.buckets] == [1, 64, 1024]
    for bucket in table.buckets:
        record_property(f"default_over_tuned_at_{bucket.tokens}", bucket.default_us / bucket.us)
        assert bucket.us <= bucket.default_us
    assert table.fixed is not None
    assert tactics.save(table) is not None
    w = random_layer("gpt_oss", 16, 2880, 384)
    x, ids, weights = random_call(100, 2880, 16, 4)
    wanted = reference_moe(x, ids, weights, w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    y = fused_moe(x, ids, weights, p)
    assert p.plans[p.kernel.name, 4].pairs == [bucket.pair for bucket in table.buckets]
    assert ((y.float() - wanted).norm() / wanted.norm()).item() < 5e-3
