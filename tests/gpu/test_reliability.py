"""What has hurt users of such kernels, tried often on a Hopper GPU:
docs/dev/evidence/reliability.md is made from what these tests record.
"""

import gc
import logging
import math
import threading
from dataclasses import replace

import pytest
import torch

from hopper_mxfp4 import (
    ExpertWeights,
    LayerShape,
    PreparedExperts,
    SwiGLU,
    allocate_weights,
    env,
    fused_moe,
    prepare_experts,
    reference_moe,
    restore_weights,
    workspace_bytes,
)
from hopper_mxfp4.arrange import gate_and_up, restore_in_place
from hopper_mxfp4.kernels.flashinfer import staging
from hopper_mxfp4.kernels.support import log_once
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer

FAMILIES = ("gpt_oss", "deepseek_v4")
MIB = 1 << 20
KERNELS = ("native", "flashinfer")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    """What layers are prepared for. Numbers of tokens are such that of native both kernels have
    their turn. Where a test doesn't ask for it, that is FlashInfer's.
    """
    monkeypatch.setenv(env.KERNEL.name, request.param)
    return request.param


both_kernels = pytest.mark.usefixtures("kernel")


def prepare(w: ExpertWeights, family: str, deterministic: bool = True) -> PreparedExperts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.DETERMINISTIC.name, str(int(deterministic)))
        p = prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family])
    assert p.kernel.name == env.KERNEL.read()
    return p


def reference(call, w: ExpertWeights, family: str) -> torch.Tensor:
    return reference_moe(*call, w, family=FAMILY[family], swiglu=SWIGLU[family])


def worst_ulps(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """The worst error in bf16 ulps of the largest magnitude of its row, at least float32's smallest
    normal; NaN where y has any.
    """
    largest = wanted.abs().amax(1).double().clamp_min(2.0**-126)
    ulp = torch.exp2(torch.floor(torch.log2(largest)) - 7)  # bfloat16 keeps 8 bits
    return ((y.double() - wanted.double()).abs().amax(1) / ulp).max().item()


def ulps_of_few_and_all(call, p: PreparedExperts, wanted: torch.Tensor, few: int) -> list[float]:
    """worst_ulps of a call's first tokens alone, and of all: in native they are of two kernels."""
    return [
        worst_ulps(fused_moe(*(t[:m] for t in call), p), wanted[:m]) for m in (few, len(call[0]))
    ]


def record(ulps: list[float], record_property) -> None:
    """Keep how many and the worst; none may be over 4, nor NaN."""
    record_property("times", len(ulps))
    record_property("worst_ulps", max(ulps))
    assert all(u <= 4 for u in ulps), ulps


def differing_rows(y: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """How many rows have any other bit, on the device."""
    return (y.view(torch.int64) != first.view(torch.int64)).any(1).sum()


def differing(call, p: PreparedExperts, calls: int) -> tuple[int, int]:
    """Of so many calls with equal arguments, those whose bytes differ from the first's, and the
    rows in which they do.
    """
    first, out = fused_moe(*call, p), torch.empty_like(call[0])
    counts = torch.zeros(2, dtype=torch.int64, device=CUDA)
    for _ in range(calls):
        fused_moe(*call, p, out=out)
        rows = differing_rows(out, first)
        counts += torch.stack((rows > 0, rows))
    out.copy_(first)[17, 1000] += 1
    assert differing_rows(out, first).item() == 1, "the counting itself"
    return counts[0].item(), counts[1].item()


def test_the_race_of_flashinfer_5438(record_property) -> None:
    """Its repro: many experts and few k tiles each, so that descriptors are rewritten all the time.
    Control: equal scales hide it.
    """
    e, h, i, top_k, m, calls = 256, 4096, 256, 6, 8192, 2000
    w = random_layer("deepseek_v4", e, h, i)
    call = random_call(m, h, e, top_k)
    some = tuple(t[:48] for t in call)
    wanted = reference(some, w, "deepseek_v4")
    p = prepare(w, "deepseek_v4")
    bad_calls, bad_rows = differing(call, p, calls)
    right = worst_ulps(fused_moe(*call, p)[:48], wanted)
    for name in ("w13_scale", "w2_scale"):
        scale = getattr(p, name)
        scale.copy_(scale[:1].clone().expand(scale.shape))
    control_calls, _ = differing(call, p, calls // 10)
    record_property("times", calls)
    record_property("differing_calls", bad_calls)
    record_property("differing_rows", bad_rows)
    record_property("differing_calls_of_the_control", control_calls)
    record_property("worst_ulps", right)
    assert (bad_calls, bad_rows, control_calls) == (0, 0, 0)
    assert right <= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layers(family, record_property) -> None:
    """Other sizes, routing and amplitudes for each seed; half of them summed with atomics, half in
    a fixed order. FlashInfer's alone: ours are compiled for a shape, and have test_random_cases.py.
    """
    worst = {False: 0.0, True: 0.0}
    seeds = 200
    for seed in range(seeds):
        e, top_k, m = 2 + seed % 15, 1 + seed % 8, 1 + seed * 37 % 211
        h, i = 32 * (5 + seed * 7 % 36), 32 * (5 + seed * 5 % 19)
        w = random_layer(family, e, h, i, seed)
        x, ids, weights = random_call(m, h, e, min(top_k, e), seed)
        call = (x * 2.0 ** (seed % 9 - 4), ids, weights)
        wanted = reference(call, w, family)
        deterministic = seed % 2 == 1
        ulps = worst_ulps(fused_moe(*call, prepare(w, family, deterministic)), wanted)
        assert ulps <= 4, f"seed {seed}: {ulps} ulps"
        worst[deterministic] = max(worst[deterministic], ulps)
    record_property("times", seeds)
    record_property("worst_ulps_with_atomics", worst[False])
    record_property("worst_ulps_in_fixed_order", worst[True])
    assert min(worst.values()) > 0


@both_kernels
@pytest.mark.parametrize("byte", [1, 253, 254])
def test_scales_at_their_ends(byte, record_property) -> None:
    """All of w13 at that scale, x as much the other way, so that the layer's numbers are ordinary
    ones.
    """
    w = random_layer("deepseek_v4", 4, 256, 256, seed=byte)
    if byte > 252:
        w.w13.bitwise_and_(0xBB)  # at most 1.5, which 2**127 keeps within float32
    w.w13_scale.fill_(byte)
    x, ids, weights = random_call(33, 256, 4, 2, seed=byte)
    x = (x.float() * (2.0**-118 if byte > 252 else 2.0**112)).bfloat16()
    wanted = reference_moe(x, ids, weights, w, family=FAMILY["deepseek_v4"], swiglu=SwiGLU())
    assert wanted.isfinite().all()
    assert wanted.abs().max() > 1e-9
    p = prepare_experts(w, family=FAMILY["deepseek_v4"], swiglu=SwiGLU())
    record(ulps_of_few_and_all((x, ids, weights), p, wanted, few=5), record_property)


def test_scales_that_are_refused(kernel, record_property) -> None:
    """255 is NaN; 0 is 2**-127, which the kernel takes for zero: fine over zeros alone. Both with
    their place, nothing changed.
    """
    w = random_layer("gpt_oss", 8, 256, 384)
    before = {name: t.clone() for name, t in w.tensors().items()}
    for byte, text in (
        (255, "which is NaN in E8M0"),
        (0, f"kernel {kernel} takes for a scale of zero"),
    ):
        for name, place in (("w13_scale", (7, 767, 7)), ("w2_scale", (3, 255, 11))):
            scale = getattr(w, name)
            scale[place] = byte
            where = ", ".join(map(str, place))
            with pytest.raises(ValueError, match=rf"{name}\[{where}\] is {byte}; .*{text}"):
                prepare(w, "gpt_oss")
            scale[place] = before[name][place]
    for name, t in before.items():
        assert torch.equal(getattr(w, name), t)
    w.w2_scale[3, 255, 11], w.w2[3, 255, 176:] = 0, 0x80
    x, ids, weights = random_call(80, 256, 8, 4)
    wanted = reference((x, ids, weights), w, "gpt_oss")
    p = prepare(w, "gpt_oss")
    record(ulps_of_few_and_all((x, ids, weights), p, wanted, few=16), record_property)


def test_scales_that_only_narrow_takes(monkeypatch, record_property, caplog) -> None:
    """Bytes above 128, which wide can't turn into bf16: native then runs narrow at every number of
    tokens, and says so.
    """
    log_once.cache_clear()

    def layer() -> ExpertWeights:
        w = random_layer("gpt_oss", 8, 256, 384)
        w.w13_scale[5, 700, 3] = 129
        return w

    call = random_call(300, 256, 8, 4)
    wanted = reference(call, layer(), "gpt_oss")
    made = {}
    for name in ("native", "narrow"):
        monkeypatch.setenv(env.KERNEL.name, name)
        with caplog.at_level(logging.WARNING, "hopper_mxfp4.kernels.native"):
            made[name] = fused_moe(*call, prepare(layer(), "gpt_oss"))
    assert "scale bytes up to 129 run narrow at every number of tokens" in caplog.text
    assert torch.equal(made["native"], made["narrow"])
    monkeypatch.setenv(env.KERNEL.name, "wide")
    with pytest.raises(ValueError, match=r"w13_scale\[5, 700, 3\] is 129; .*kernel wide"):
        prepare(layer(), "gpt_oss")
    ulps = worst_ulps(made["native"], wanted)
    record_property("worst_ulps", ulps)
    assert ulps <= 4


@both_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_and_subnormals(family, record_property) -> None:
    """Experts of zeros, and rows of x that are, or partly are, zeros, subnormals and very small."""
    w = random_layer(family, 8, 512, 256)
    w.w13[1], w.w2[1], w.w13[2] = 0, 0, 0x88
    x, ids, weights = random_call(64, 512, 8, 4)
    for row, value in enumerate((0.0, -0.0, 2.0**-133, -(2.0**-133), 2.0**-126, 2.0**-40)):
        x[row] = value
        x[8 + row, ::2] = value
    wanted = reference((x, ids, weights), w, family)
    p = prepare(w, family)
    record(ulps_of_few_and_all((x, ids, weights), p, wanted, few=16), record_property)


@both_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_values_at_the_clamp_limit(family, record_property) -> None:
    """gate and up at the limit, the bfloat16s next to it, far beyond, and minus all that: what the
    formula says.
    """
    limit, h, i = SWIGLU[family].limit, 256, 256
    step = 2.0 ** (math.floor(math.log2(limit)) - 7)
    edge = [limit - step, limit, limit + step, 2.0**100]
    values = torch.tensor(
        [(g, u) for g in edge + [-v for v in edge] for u in edge + [-v for v in edge]], device=CUDA
    )
    e = len(values) if family == "gpt_oss" else 1
    w = random_layer(family, e, h, i)
    for t in w.tensors().values():
        t.zero_()
    w.w13_scale.fill_(127)
    w.w2_scale.fill_(127)
    w.w2[:, 0, 0] = 0x02  # 1.0
    x = torch.zeros(len(values), h, dtype=torch.bfloat16, device=CUDA)
    ids = torch.zeros(len(values), 1, dtype=torch.int32, device=CUDA)
    if family == "gpt_oss":  # through the biases, an expert each
        w.w13_bias[:, :2] = values
        ids[:, 0] = torch.arange(e)
    else:  # through x
        w.w13[0, 0, 0], w.w13[0, i, 0] = 0x02, 0x20
        x[:, :2] = values
    call = (x, ids, torch.ones(len(values), 1, device=CUDA))
    wanted = reference(call, w, family)
    y = fused_moe(*call, prepare(w, family))
    ulps = worst_ulps(y, wanted)
    record_property("times", len(values))
    record_property("worst_ulps", ulps)
    assert ulps <= 4
    assert not y[:, 1:].any()
    at, beyond, far = (y[n * 8 + n, 0] for n in (1, 2, 3))
    assert at == beyond == far != y[0, 0]


@both_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_row_stays_alone(family, value, record_property) -> None:
    """One element of x or all of a row, few and many tokens, padded and not: every other row keeps
    its bits.
    """
    others_changed = nan_kept = 0
    for hidden, m in ((2880, 24), (4096, 24), (2880, 300)):
        p = prepare(random_layer(family, 8, hidden, 256), family)
        x, ids, weights = random_call(m, hidden, 8, 4)
        whole = fused_moe(x, ids, weights, p)
        assert whole.isfinite().all()
        for where in (slice(None), slice(5, 6)):
            broken = x.clone()
            broken[7, where] = value
            y = fused_moe(broken, ids, weights, p)
            others = torch.arange(m, device=CUDA) != 7
            others_changed += differing_rows(y[others], whole[others]).item()
            assert differing_rows(y[7:8], whole[7:8]).item() == 1
            nan_kept += y[7].isnan().all().item()
    record_property("times", 6)
    record_property("other_rows_changed", others_changed)
    record_property(
        "broken_rows_all_nan", nan_kept
    )  # FlashInfer's clamp turns NaN into the limit: not asserted
    assert others_changed == 0


@both_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_routing(family, record_property) -> None:
    """top-k 1 to 8, all tokens to one expert, ids of no expert; numbers of tokens that are a
    multiple of nothing.
    """
    e, h, ulps = 16, 512, []
    kept, p = kept_and_prepared(family, e, h, 256)
    for top_k in range(1, 9):
        for m in (1, 33, 301):  # FlashInfer sorts more than 256 tokens in another way
            x, distinct, weights = random_call(m, h, e, top_k, seed=top_k)
            g = torch.Generator(CUDA).manual_seed(top_k)
            outside = torch.where(
                torch.rand(m, top_k, generator=g, device=CUDA) < 0.5, -3, e + 3
            ).int()
            masked = torch.where(
                torch.rand(m, top_k, generator=g, device=CUDA) < 0.4, outside, distinct
            )
            one = torch.cat([torch.full_like(distinct[:, :1], e - 1), outside[:, 1:]], dim=1)
            for ids in (distinct, one, masked):
                y = fused_moe(x, ids, weights, p)
                ulps.append(worst_ulps(y, reference((x, ids, weights), kept, family)))
                assert not y[((ids < 0) | (ids >= e)).all(1)].any()
    record(ulps, record_property)


@pytest.mark.parametrize(
    ("kernel", "by"),
    [("native", ""), ("flashinfer", "one launch"), ("flashinfer", "torch's operators")],
    indirect=["kernel"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_twice_in_a_row(family, kernel, by, record_property, monkeypatch) -> None:
    """Which FlashInfer 0.7.2 gets wrong: repeats are made one on the way to it. Twice, thrice, in
    some rows and in all, with masked ids.
    """
    if by == "torch's operators":
        monkeypatch.setattr(staging, "load", lambda index: None)
    kept, p = kept_and_prepared(family, 16, 512, 256)
    ulps = []
    for m in (1, 33, 301):
        x, ids, weights = random_call(m, 512, 16, 4)
        ids[:, 3] = ids[:, 0]
        ids[::3, 1] = ids[::3, 0]
        ids[1::5, 0] = -1
        ids[2::5, 2] = 1 << 20
        for some in (ids, ids.long(), ids.t().contiguous().t()):
            ulps.append(
                worst_ulps(
                    fused_moe(x, some, weights, p), reference((x, some, weights), kept, family)
                )
            )
    record(ulps, record_property)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_what_flashinfer_is_handed(ids_dtype, record_property) -> None:
    """Our kernel against torch's operators: routing and padded rows byte for byte, any strides and
    places, many tokens and few.
    """
    cases = 0
    for case, m in enumerate((1, 2, 7, 64, 1000, 16_384)):
        for hidden, padded, top_k in (
            (2880, 2944, 4),
            (160, 256, 1),
            (32, 128, 33),
            (4096, None, 6),
        ):
            e = 8 + case
            g = torch.Generator(CUDA).manual_seed(case)
            ids = torch.randint(-2, e + 2, (m, top_k), generator=g, device=CUDA, dtype=ids_dtype)
            weights = (
                torch.randint(1, 64, (m, top_k), generator=g, device=CUDA) / 64.0
            )  # sums of these are exact
            if ids_dtype is torch.int64:
                ids[0, 0] += 1 << 32
            wide = torch.randn(m, hidden + 16, generator=g, device=CUDA).bfloat16()
            columns = wide.t().contiguous().t()
            for x in (
                wide[:, :hidden].contiguous(),
                wide[:, 8 : 8 + hidden],
                wide[:, 3 : 3 + hidden],
                columns[:, :hidden],
            ):
                made = []
                for run in (staging.stager(CUDA), staging.by_torch):
                    rows = (
                        None
                        if padded is None
                        else torch.full((m, padded), math.nan, dtype=torch.bfloat16, device=CUDA)
                    )
                    routing = (
                        torch.full((m, top_k), -7, dtype=torch.int32, device=CUDA),
                        torch.full((m, top_k), math.nan, device=CUDA),
                    )
                    made.append(staging.staged(rows, *routing))
                    run(x, ids, weights, e, made[-1])
                for ours, theirs in zip(*(to[:3] for to in made), strict=True):
                    assert ours is theirs is None or torch.equal(ours, theirs)
                cases += 1
            ids, weights = ids.t().contiguous().t(), weights.repeat_interleave(2, 1)[:, ::2]
    record_property("times", cases)


def kept_and_prepared(family, e, h, i):
    w = random_layer(family, e, h, i)
    kept = replace(
        w, **{name: t.clone() for name, t in w.tensors().items()}
    )  # w is prepared in place
    return kept, prepare(w, family)


@both_kernels
@pytest.mark.parametrize("m", [16_385, 65_536])
def test_many_tokens(m, record_property) -> None:
    """Run in parts of 16,384: scratch for one part, and rows on both sides of each boundary are
    right.
    """
    e, h, i, top_k = 32, 2880, 384, 4
    w = random_layer("gpt_oss", e, h, i)
    p = prepare(w, "gpt_oss")
    call = random_call(m, h, e, top_k)
    rows = torch.cat(
        [
            torch.arange(max(b - 16, 0), min(b + 16, m), device=CUDA)
            for b in range(0, m + 1, 1 << 14)
        ]
    )
    kept = restore_weights(p)
    wanted = reference(tuple(t[rows] for t in call), kept, "gpt_oss")
    y = fused_moe(*call, p)
    ulps = worst_ulps(y[rows], wanted)
    record_property("worst_ulps", ulps)
    record_property("workspace_mib", workspace_bytes(p, m, top_k) / MIB)
    assert y.isfinite().all()
    assert ulps <= 4
    assert workspace_bytes(p, m, top_k) == workspace_bytes(p, 1 << 14, top_k)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_kernels
def test_a_gpu_that_is_not_the_current_one() -> None:
    other = torch.device("cuda", 1)
    w = random_layer("gpt_oss", 8, 2880, 384)
    there = replace(w, **{name: t.to(other) for name, t in w.tensors().items()})
    call = random_call(300, 2880, 8, 4)
    here, p = prepare(w, "gpt_oss"), prepare(there, "gpt_oss")
    for m in (3, 300):
        y = fused_moe(*(t[:m].to(other) for t in call), p)
        assert y.device == other
        assert worst_ulps(y.to(CUDA), fused_moe(*(t[:m] for t in call), here).float()) <= 1
    assert torch.cuda.current_device() == 0


def corner(target: torch.Tensor, source: torch.Tensor, name: str, family: str) -> None:
    """Copy a checkpoint's tensor to where a loader puts it in a larger one."""
    rows = FAMILY[family].rows
    pairs = (
        zip(gate_and_up(target, rows), gate_and_up(source, rows), strict=True)
        if name.startswith("w13")
        else [(target, source)]
    )
    for place, piece in pairs:
        place[tuple(slice(n) for n in piece.shape)] = piece


@both_kernels
@pytest.mark.parametrize(
    ("family", "e", "h", "i"),
    [("gpt_oss", 32, 2880, 2880), ("gpt_oss", 128, 2880, 2880), ("deepseek_v4", 256, 4096, 2048)],
    ids=["gpt-oss-20b", "gpt-oss-120b", "deepseek-v4-flash"],
)
def test_peak_memory_of_preparing(family, e, h, i, record_property) -> None:
    """Beside the layer's own memory at most an eighth of its weights and 64 MiB; nothing of that
    stays.
    """
    torch.cuda.empty_cache()
    w = allocate_weights(LayerShape(e, h, i), family=FAMILY[family], device=CUDA)
    for name, t in w.tensors().items():
        t.normal_() if name.endswith("bias") else t.random_(
            *((118, 122) if name.endswith("scale") else (0, 256))
        )
    weights = w.w13.nbytes + w.w2.nbytes
    sample = [getattr(w, name)[e - 1].clone() for name in ("w13", "w13_scale")]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p = prepare(w, family)
    torch.cuda.synchronize()
    extra, left = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    record_property("weights_mib", weights / MIB)
    record_property("peak_extra_mib", extra / MIB)
    record_property("left_kib", left / 1024)
    assert extra <= weights / 8 + 64 * MIB
    assert left <= MIB
    last = restore_weights(p, slice(e - 1, e))
    rows = (h, i)
    for seen, given in zip((last.w13, last.w13_scale), sample, strict=True):
        for got, wanted in zip(
            gate_and_up(seen, FAMILY[family].rows),
            gate_and_up(given[None], FAMILY[family].rows),
            strict=True,
        ):
            assert torch.equal(got, wanted[:, : rows[1], : got.shape[2]])


@both_kernels
def test_fifty_rounds_of_restoring_and_preparing(record_property) -> None:
    """A gpt-oss-20b layer to the checkpoint's bytes and back in place: the same bits, not a byte
    more allocated.
    """
    w = allocate_weights(LayerShape(32, 2880, 2880), family=FAMILY["gpt_oss"], device=CUDA)
    source = random_layer("gpt_oss", 32, 2880, 2880)
    for name, t in source.tensors().items():
        corner(getattr(w, name), t, name, "gpt_oss")
    p = prepare(w, "gpt_oss")
    gc.collect()  # what a failed test before this one holds
    allocated = []
    for _ in range(50):
        p = prepare(restore_in_place(p), "gpt_oss")
        allocated.append(torch.cuda.memory_allocated())
    restored = restore_weights(p)
    for name, t in source.tensors().items():
        assert torch.equal(getattr(restored, name), t), name
    record_property("times", 50)
    record_property("bytes_leaked", allocated[-1] - allocated[0])
    assert max(allocated[10:]) <= max(
        allocated[:10]
    )  # not equal: the allocator rounds up to blocks it happens to have


@both_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_two_streams_and_two_layers_at_once(threads, record_property) -> None:
    """Calls of two layers, launched by one thread in turn or by a thread each: every result is that
    of calls alone.
    """
    rounds, sizes = 200, (("gpt_oss", 32, 2880, 2880), ("deepseek_v4", 32, 4096, 2048))
    layers = [prepare(random_layer(*size), size[0]) for size in sizes]
    calls = [[random_call(m, size[2], size[1], 4, seed=m) for m in (1, 16, 200)] for size in sizes]
    wanted = [[fused_moe(*call, p) for call in own] for own, p in zip(calls, layers, strict=True)]
    bad = [torch.zeros((), dtype=torch.int64, device=CUDA) for _ in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()

    def step(n: int, r: int) -> None:
        with torch.cuda.stream(streams[n]):
            bad[n] += differing_rows(fused_moe(*calls[n][r % 3], layers[n]), wanted[n][r % 3])

    def alone(n: int) -> None:
        for r in range(rounds):
            step(n, r)

    if threads == 1:
        for r in range(rounds):
            step(0, r)
            step(1, r)
    else:
        workers = [threading.Thread(target=alone, args=(n,)) for n in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    torch.cuda.synchronize()
    differing_total = sum(b.item() for b in bad)
    record_property("times", 2 * rounds)
    record_property("differing_rows", differing_total)
    assert differing_total == 0
    for n in range(2):  # the counting itself, and that both layers did run
        before = bad[n].item()
        wanted[n][0].add_(1)
        torch.cuda.synchronize()
        step(n, 0)
        torch.cuda.synchronize()
        assert bad[n].item() == before + 1


@both_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_graph_runs_weights_loaded_later(family, record_property) -> None:
    """Restored in place, overwritten and prepared again: replaying gives the new weights' result,
    and so does the old PreparedExperts.
    """
    e, h, i, ulps = 16, 2880, 512, []
    w = allocate_weights(LayerShape(e, h, i), family=FAMILY[family], device=CUDA)
    for name, t in random_layer(family, e, h, i, seed=0).tensors().items():
        corner(getattr(w, name), t, name, family)
    p = prepare(w, family)
    call, out = random_call(8, h, e, 4), torch.empty(8, h, dtype=torch.bfloat16, device=CUDA)
    fused_moe(*call, p, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(*call, p, out=out)
    graph.replay()
    last = out.clone()
    for seed in range(1, 6):
        source = random_layer(family, e, h, i, seed)
        wanted = reference(call, source, family)
        loaded = restore_in_place(p)
        for name, t in source.tensors().items():
            corner(getattr(loaded, name), t, name, family)
        again = prepare(loaded, family)
        assert again.w13.data_ptr() == p.w13.data_ptr()
        out.fill_(math.nan)
        graph.replay()
        ulps.append(worst_ulps(out, wanted))
        assert differing_rows(out, last).item() == 8
        for same in (p, again):
            assert differing_rows(fused_moe(*call, same), out).item() == 0
        last = out.clone()
    record(ulps, record_property)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_layers(family, kernel, record_property) -> None:
    """Sizes that are padded, the least the kernel takes, and a single expert; but for native, which
    is compiled for each shape.
    """
    ulps = []
    for e in (1, 3) if kernel == "flashinfer" else (3,):
        for h, i in ((32, 32), (128, 128), (96, 160), (1024, 32), (32, 1024)):
            w = random_layer(family, e, h, i, seed=len(ulps))
            call = random_call(50, h, e, 1, seed=len(ulps))
            wanted = reference(call, w, family)
            ulps += ulps_of_few_and_all(call, prepare(w, family), wanted, few=5)
    record(ulps, record_property)
