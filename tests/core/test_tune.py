"""Tune's choices, with a clock that is made up: what is dropped, what is measured again, and when
the default stays.
"""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from hopper_mxfp4.kernels.smallbatch.kernel import REVISION

from hopper_mxfp4.bench import tune
from hopper_mxfp4.bench.tune import (
    FINALISTS,
    PRUNE,
    TOKENS,
    Timer,
    fixed_pair,
    gpu_timer,
    last_win,
    prune,
    tune_bucket,
    tune_smallbatch,
)
from hopper_mxfp4.bench.workloads import parse_workload
from hopper_mxfp4.tuning.tables import DEFAULT, Bucket, Build, SmallBatch, TunedShape


def test_prune():
    assert prune({4: 100.0, 7: 149.0, 9: 151.0, 2: 120.0}) == [4, 2, 7]
    assert prune({}) == []
    assert len(prune(dict.fromkeys(range(30), 100.0))) == FINALISTS


class Clock:
    """A call's time is 10 us and what each GEMM's tactic takes; single measurements are off by what
    `noise` says.
    """

    def __init__(self, first, second, noise=None):
        self.gemms, self.noise = ({DEFAULT: 50.0} | first, {DEFAULT: 50.0} | second), noise or {}
        self.roughly, self.exactly = [], []

    def time(self, pair):
        for gemm, tactic in zip(self.gemms, pair, strict=True):
            if gemm[tactic] is None:
                raise RuntimeError("does not fit")
        return 10 + sum(gemm[tactic] for gemm, tactic in zip(self.gemms, pair, strict=True))

    def once(self, pair):
        self.roughly.append(pair)
        return self.time(pair) * self.noise.get(pair, 1.0)

    def beside(self, pairs, seconds):
        self.exactly.append(tuple(pairs))
        return [self.time(pair) for pair in pairs]

    def timer(self):
        return Timer(self.once, self.beside)


FIRST, SECOND = {0: 50.0, 1: 20.0, 2: 500.0, 3: 21.0}, {10: 50.0, 11: 400.0, 12: 30.0}


def test_every_tactic_once_and_the_good_ones_again():
    clock = Clock(FIRST, SECOND)
    assert tune_bucket(64, clock.timer(), (list(FIRST), list(SECOND))) == Bucket(
        64, (1, 12), 60.0, 110.0
    )
    assert clock.roughly == [(t, DEFAULT) for t in FIRST] + [(1, t) for t in SECOND]
    good = [((1, DEFAULT), (3, DEFAULT), (0, DEFAULT)), ((1, 12), (1, 10))]
    assert clock.exactly == [*good, ((1, 12), (DEFAULT, DEFAULT))], (
        "2 and 11 are hopeless; the pair is confirmed beside the default"
    )


def test_a_lucky_single_measurement_does_not_win():
    clock = Clock(FIRST, SECOND, noise={(3, DEFAULT): 0.7})
    assert tune_bucket(64, clock.timer(), (list(FIRST), list(SECOND))).pair == (1, 12)


def test_the_default_stays_where_nothing_is_faster():
    """Together the two are slower than each promised, which only the side-by-side measurement
    sees.
    """
    clock = Clock({0: 50.0, 1: 45.0}, {10: 50.0, 11: 45.0})
    honest = clock.time
    clock.time = lambda pair: 130.0 if pair == (1, 11) and len(clock.exactly) > 2 else honest(pair)
    assert tune_bucket(1, clock.timer(), ([0, 1], [10, 11])) == Bucket(
        1, (DEFAULT, DEFAULT), 110.0, 110.0
    )


@pytest.mark.parametrize("which", [0, 1])
def test_tactics_that_do_not_run_are_dropped(which):
    first, second = dict(FIRST), dict(SECOND)
    (first, second)[which][(1, 12)[which]] = None
    bucket = tune_bucket(8, Clock(first, second).timer(), (list(first), list(second)))
    assert bucket.pair == ((3, 12), (1, 10))[which]


def test_no_tactics_at_all():
    assert tune_bucket(8, Clock({}, {}).timer(), ([], [])) == Bucket(
        8, (DEFAULT, DEFAULT), 110.0, 110.0
    )


def test_a_default_that_does_not_run_is_told():
    clock = Clock({DEFAULT: None}, {})
    with pytest.raises(RuntimeError, match="does not fit"):
        tune_bucket(8, clock.timer(), ([], []))


def test_one_pair_for_all():
    """Best on the geometric mean; one that is hopeless somewhere is not measured further."""
    times = {
        (1, 10): {1: 10.0, 64: 30.0, 4096: 40.0},
        (2, 11): {1: 12.0, 64: 20.0, 4096: 22.0},
        (3, 12): {1: 500.0, 64: 20.0, 4096: 20.0},
    }
    asked = []

    def time_at(tokens, pair):
        asked.append((tokens, pair))
        return times[pair][tokens]

    assert fixed_pair(times, {1: 10.0, 64: 20.0, 4096: 20.0}, time_at) == (2, 11)
    assert [tokens for tokens, pair in asked if pair == (3, 12)] == [1]
    assert fixed_pair([], {1: 10.0}, time_at) is None


class Curves:
    """Microseconds of a table's pair and of smallbatch with tiles of 8 and 16 tokens, straight
    lines in the logarithms.
    """

    def __init__(self, tokens, narrow, steep=0.9, tiles=2):
        self.tokens, self.narrow, self.steep, self.tiles, self.asked = (
            tokens,
            narrow,
            steep,
            tiles,
            [],
        )

    def __call__(self, m):
        self.asked.append(m)
        wide = 100 * (m / self.tokens) ** self.steep
        return [100.0, *(wide * (m / self.narrow) ** 0.4, wide)[: self.tiles]]


@pytest.mark.parametrize("crossing", [1.5, 2.2, 9, 37, 64, 90.3, 213, 300.9, 5000])
@pytest.mark.parametrize("points", [TOKENS, (1, 64, 8192), (8192,)], ids=["all", "few", "one"])
def test_a_crossover_is_found(crossing, points):
    """To where choosing by it costs under 2 % at every number of tokens, with the times 1.6x apart
    at each doubling.
    """

    def ratio(m):
        return (m / crossing) ** math.log2(1.6)

    found = last_win(sorted({1, *points}), ratio)
    for m in range(1, 8193):
        taken = ratio(m) if m <= found else 1.0
        assert taken <= 1.02 * min(ratio(m), 1.0), m


def test_no_crossover():
    assert last_win([1, 8, 64], lambda m: 0.9) is None
    assert last_win([1, 8, 64], lambda m: 1.1) == 0
    assert last_win([], lambda m: 0.9) is None


def test_the_last_bucket_it_wins_counts():
    """One that is lost below it, by noise or truly, is not where the search goes."""
    asked = []

    def ratio(m):
        asked.append(m)
        return {1: 0.5, 8: 1.01, 64: 0.9}.get(m, 0.9 if m <= 100 else 1.2)

    assert 97 <= last_win([1, 8, 64, 512, 4096], ratio) <= 103
    assert asked[:5] == [1, 8, 64, 512, 4096]
    assert 64 < min(asked[5:]) < max(asked[5:]) < 512


def test_what_is_hopeless_is_not_measured_further():
    asked = []

    def ratio(m):
        asked.append(m)
        return PRUNE + 0.1 if m >= 64 else 0.5

    assert 60 <= last_win(TOKENS, ratio) < 64
    assert max(asked) == 64


@pytest.mark.parametrize(("tokens", "narrow"), [(64, 40), (200, 3), (30, 50)])
def test_where_smallbatch_changes(tokens, narrow):
    curves = Curves(tokens, narrow)
    found = tune_smallbatch(TOKENS, curves)
    assert found.revision == REVISION
    best = tokens if tokens >= narrow else narrow * (tokens / narrow) ** (0.9 / 1.3)
    assert found.tokens == pytest.approx(best, rel=0.03, abs=1)
    assert found.wide_from == pytest.approx(narrow, rel=0.03, abs=1.5)
    assert len(curves.asked) == len(set(curves.asked)), "measured once"
    assert max(curves.asked) <= 512


def test_smallbatch_without_tiles_of_16():
    found = tune_smallbatch(TOKENS, Curves(213, 213, tiles=1))
    assert found.wide_from is None
    assert found.tokens == pytest.approx(213, rel=0.03)


def test_smallbatch_everywhere_and_nowhere():
    assert tune_smallbatch((1, 8), lambda m: [100, 50, 60]) == SmallBatch(None, None, REVISION)
    assert tune_smallbatch((1, 8), lambda m: [100, 60, 50]) == SmallBatch(None, 1, REVISION)
    assert tune_smallbatch((64, 128), lambda m: [100, 160, 150]) == SmallBatch(0, 1, REVISION)
    asked = []
    assert (
        tune_smallbatch(
            (64, 128),
            lambda m: asked.append(m) or [100, 50 if m < 8 else 120, 125],
        ).tokens
        == 7
    )
    assert asked[0] == 1, "below the first bucket too"


def test_smallbatch_and_the_deadline():
    asked = []
    assert (
        tune_smallbatch(TOKENS, lambda m: asked.append(m) or [100, m, m + 1], time.monotonic() - 1)
        is None
    )
    assert asked == []
    assert tune_smallbatch(TOKENS, lambda m: [100, m, m + 1], time.monotonic() + 60) is not None


WORKLOAD = parse_workload("8,160,96,2")


@pytest.fixture
def bench(monkeypatch):
    """tune() with neither layers nor a GPU; what is timed is kept in `asked`."""
    build, shape = Build("GPU", "1", "m", (2, 2)), TunedShape(8, 256, 128, 2, False, "separate")
    p = SimpleNamespace(shape=WORKLOAD.shape, w13=torch.zeros(1))
    asked = []

    def timer(workload, layers, tokens, device, workspace, loaded):
        def us(candidate):
            asked.append((tokens, candidate))
            if isinstance(candidate, int):
                return 100 * tokens / (50 if candidate == 1 else 40)
            return 100.0 - 10 * sum(
                a == b for a, b in zip(candidate, (0, 2) if tokens < 20 else (1, 3), strict=True)
            )

        return Timer(us, lambda candidates, seconds: [us(candidate) for candidate in candidates])

    for name, value in {
        "choose_kernel": lambda *args: None,
        "prepare_copies": lambda *args: [p],
        "make_plan": lambda *args: SimpleNamespace(build=build, shape=shape),
        "layer_tactics": lambda *args: ([0, 1], [2, 3]),
        "workspace_bytes": lambda *args: 0,
        "gpu_timer": timer,
        "load_smallbatch": lambda *args: (1, 2),
    }.items():
        monkeypatch.setattr(tune, name, value)
    return asked


def test_a_whole_table(bench):
    """Smallbatch is compared with the pair that a call of so many tokens would run, in turn; what
    is known is kept on the candidate.
    """
    kept = []
    table = tune.tune(
        WORKLOAD, torch.device("cpu"), time.monotonic() + 60, (1, 16, 64), kept.append
    )
    assert table == kept[-1]
    assert [(len(t.buckets), t.smallbatch is None, t.fixed is None) for t in kept] == [
        (1, True, True), (2, True, True), (3, True, True), (3, False, True), (3, False, False)
    ]  # fmt: skip
    assert [b.pair for b in table.buckets] == [(0, 2), (0, 2), (1, 3)]
    assert 39 <= table.smallbatch.tokens <= 41
    assert table.smallbatch.wide_from is None
    assert table.smallbatch.revision == REVISION
    between = [(m, candidate) for m, candidate in bench if m not in (1, 16, 64)]
    assert between[:3] == [(32, candidate) for candidate in ((0, 2), 1, 2)], "32 is the edge"
    assert {candidate for m, candidate in between if m > 32} == {(1, 3), 1, 2}


def test_a_table_without_smallbatch(bench, monkeypatch):
    """Where it can't run, and where the time is over before it is compared."""
    monkeypatch.setattr(tune, "load_smallbatch", lambda *args: ())
    table = tune.tune(WORKLOAD, torch.device("cpu"), time.monotonic() + 60, (1, 16, 64))
    assert table.smallbatch is None
    assert not [candidate for _, candidate in bench if isinstance(candidate, int)]
    monkeypatch.setattr(tune, "load_smallbatch", lambda *args: (1, 2))
    now = iter([0.0] * 3 + [9.0] * 100)
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    table = tune.tune(WORKLOAD, torch.device("cpu"), 5.0, (1, 16, 64))
    assert len(table.buckets) == 3
    assert (table.smallbatch, table.fixed) == (None, None)


@pytest.mark.parametrize(
    ("top_k", "device", "why"),
    [(2, "cpu", "the weights are on cpu"), (65, "cuda", "at most 64"), (2, "cuda", "no NVRTC")],
)
def test_smallbatch_is_left_out_with_a_line(top_k, device, why, monkeypatch, caplog):
    monkeypatch.setattr(
        "hopper_mxfp4.kernels.jit.nvrtc.problem", lambda: "no NVRTC" if why == "no NVRTC" else None
    )
    monkeypatch.setattr(
        tune.SmallBatchKernel,
        "layout",
        lambda *args: SimpleNamespace(name="flashinfer-sm90-folded"),
    )
    p = SimpleNamespace(shape=WORKLOAD.shape, w13=SimpleNamespace(device=torch.device(device)))
    assert tune.load_smallbatch(p, top_k) == ()
    (line,) = [record.getMessage() for record in caplog.records]
    assert why in line


def test_the_timer_runs_what_it_is_told(monkeypatch):
    """A pair by FlashInfer, a number by smallbatch, each once before it is timed."""
    ran = []
    monkeypatch.setattr(tune, "make_plan", lambda p, top_k: p)
    monkeypatch.setattr(
        tune, "run_pair", lambda plan, pair, call, p: ran.append((pair, len(call.x)))
    )
    monkeypatch.setattr(
        tune, "tiles_runner", lambda nt, p, tokens, top_k: lambda call, p: ran.append((nt, tokens))
    )
    loaded = set()
    timer = gpu_timer(WORKLOAD, ["p"], 3, torch.device("cpu"), torch.empty(0), loaded)
    assert timer.once((0, 1)) >= 0
    assert min(timer.beside([2, (0, 1)], 0.001)) >= 0
    assert loaded == {(0, 1), 2}
    assert {candidate for candidate, _ in ran} == {(DEFAULT, DEFAULT), (0, 1), 2}
    assert {tokens for _, tokens in ran} == {3}
