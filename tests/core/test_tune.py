"""Tune's choices, with a clock that is made up: what is dropped, what is measured again, and when the default stays."""

import pytest

from hopper_mxfp4.tactics import DEFAULT, Bucket
from hopper_mxfp4.tune import FINALISTS, Timer, fixed_pair, prune, tune_bucket


def test_prune():
    assert prune({4: 100.0, 7: 149.0, 9: 151.0, 2: 120.0}) == [4, 2, 7]
    assert prune({}) == []
    assert len(prune(dict.fromkeys(range(30), 100.0))) == FINALISTS


class Clock:
    """A call's time is 10 us and what each GEMM's tactic takes; single measurements are off by what `noise` says."""

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

    def properly(self, pair, seconds):
        self.exactly.append(pair)
        return self.time(pair)

    def timer(self):
        return Timer(self.once, self.properly)


FIRST, SECOND = {0: 50.0, 1: 20.0, 2: 500.0, 3: 21.0}, {10: 50.0, 11: 400.0, 12: 30.0}


def test_every_tactic_once_and_the_good_ones_again():
    clock = Clock(FIRST, SECOND)
    assert tune_bucket(64, clock.timer(), (list(FIRST), list(SECOND))) == Bucket(64, (1, 12), 60.0, 110.0)
    assert clock.roughly == [(t, DEFAULT) for t in FIRST] + [(1, t) for t in SECOND]
    assert (2, DEFAULT) not in clock.exactly
    assert (1, 11) not in clock.exactly
    assert clock.exactly.count((1, 12)) >= 3, "confirmed beside the default, in turn"


def test_a_lucky_single_measurement_does_not_win():
    clock = Clock(FIRST, SECOND, noise={(3, DEFAULT): 0.7})
    assert tune_bucket(64, clock.timer(), (list(FIRST), list(SECOND))).pair == (1, 12)


def test_the_default_stays_where_nothing_is_faster():
    """Together the two are slower than each promised, which only the side-by-side measurement sees."""
    clock = Clock({0: 50.0, 1: 45.0}, {10: 50.0, 11: 45.0})
    honest = clock.time
    clock.time = lambda pair: 130.0 if pair == (1, 11) and len(clock.exactly) > 4 else honest(pair)
    assert tune_bucket(1, clock.timer(), ([0, 1], [10, 11])) == Bucket(1, (DEFAULT, DEFAULT), 110.0, 110.0)


@pytest.mark.parametrize("which", [0, 1])
def test_tactics_that_do_not_run_are_dropped(which):
    first, second = dict(FIRST), dict(SECOND)
    (first, second)[which][(1, 12)[which]] = None
    bucket = tune_bucket(8, Clock(first, second).timer(), (list(first), list(second)))
    assert bucket.pair == ((3, 12), (1, 10))[which]


def test_no_tactics_at_all():
    assert tune_bucket(8, Clock({}, {}).timer(), ([], [])) == Bucket(8, (DEFAULT, DEFAULT), 110.0, 110.0)


def test_a_default_that_does_not_run_is_told():
    clock = Clock({DEFAULT: None}, {})
    with pytest.raises(RuntimeError, match="does not fit"):
        tune_bucket(8, clock.timer(), ([], []))


def test_one_pair_for_all():
    """Best on the geometric mean; one that is hopeless somewhere is not measured further."""
    times = {(1, 10): {1: 10.0, 64: 30.0, 4096: 40.0}, (2, 11): {1: 12.0, 64: 20.0, 4096: 22.0}, (3, 12): {1: 500.0, 64: 20.0, 4096: 20.0}}
    asked = []

    def time_at(tokens, pair):
        asked.append((tokens, pair))
        return times[pair][tokens]

    assert fixed_pair(times, {1: 10.0, 64: 20.0, 4096: 20.0}, time_at) == (2, 11)
    assert [tokens for tokens, pair in asked if pair == (3, 12)] == [1]
    assert fixed_pair([], {1: 10.0}, time_at) is None
