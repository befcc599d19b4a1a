"""Tune's choices, with a clock that is made up: what is dropped, what is measured again, and when
the default stays.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from hopper_mxfp4.bench import tune
from hopper_mxfp4.bench.tune import (
    FINALISTS,
    Timer,
    fixed_pair,
    gpu_timer,
    prune,
    tune_bucket,
)
from hopper_mxfp4.bench.workloads import parse_workload
from hopper_mxfp4.tuning.tables import DEFAULT, Bucket, Build, TunedShape


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
    }.items():
        monkeypatch.setattr(tune, name, value)
    return asked


def test_a_whole_table(bench):
    """What is known is kept after every bucket; the one pair for all comes last, from pairs that
    were found.
    """
    kept = []
    table = tune.tune(
        WORKLOAD, torch.device("cpu"), time.monotonic() + 60, (1, 16, 64), kept.append
    )
    assert table == kept[-1]
    assert [(len(t.buckets), t.fixed) for t in kept] == [
        (1, None), (2, None), (3, None), (3, (0, 2))
    ]  # fmt: skip
    assert [b.pair for b in table.buckets] == [(0, 2), (0, 2), (1, 3)]
    assert {tokens for tokens, _ in bench} == {1, 16, 64}


def test_what_is_not_reached_is_not_in_the_table(bench, monkeypatch):
    """The time over before the pair for all, before the last bucket, and before the first."""

    def found(*clock):
        now = iter(clock)
        monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
        return tune.tune(WORKLOAD, torch.device("cpu"), 5.0, (1, 16, 64))

    table = found(0.0, 0.0, 0.0, 9.0)
    assert (len(table.buckets), table.fixed) == (3, None)
    table = found(0.0, 0.0, 9.0, 9.0)
    assert (len(table.buckets), table.fixed) == (2, None)
    assert found(9.0) is None


def test_the_timer_runs_what_it_is_told(monkeypatch):
    """Each pair once before it is timed, which loads its kernels."""
    ran = []
    monkeypatch.setattr(tune, "make_plan", lambda p, top_k: p)
    monkeypatch.setattr(
        tune, "run_pair", lambda plan, pair, call, p: ran.append((pair, len(call.x)))
    )
    loaded = set()
    timer = gpu_timer(WORKLOAD, ["p"], 3, torch.device("cpu"), torch.empty(0), loaded)
    assert [pair for pair, _ in ran] == [(DEFAULT, DEFAULT)]
    assert timer.once((0, 1)) >= 0
    assert loaded == {(0, 1)}
    assert min(timer.beside([(2, 3), (0, 1)], 0.001)) >= 0
    assert loaded == {(0, 1), (2, 3)}
    assert {pair for pair, _ in ran} == {(DEFAULT, DEFAULT), (0, 1), (2, 3)}
    assert {tokens for _, tokens in ran} == {3}
