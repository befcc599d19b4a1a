"""What every framework's `bench --engine` shares: how an engine is timed."""

import pytest

from hopper_mxfp4.bench import engine

JOB = {"batches": [1, 8], "prompts": 2, "prompt_tokens": 100, "decoded": (8, 72)}


def test_steps_and_prefill_from_times(monkeypatch):
    """A step is what a longer answer takes more, by its tokens."""
    clock, seen = [0.0], []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])

    def generate(prompts, tokens):
        assert all(3 <= token < 1023 for ids in prompts for token in ids)
        requests, length = len(prompts), len(prompts[0])
        seen.append((requests, length, tokens))
        clock[0] += 0.25 + 0.001 * requests * tokens + length * requests * 1e-5

    timed = engine.time_engine(generate, 1024, JOB)
    assert timed["decode_ms"] == {"1": pytest.approx(1), "8": pytest.approx(8)}
    assert timed["prefill_tokens_s"] == pytest.approx(200 / (0.25 + 0.002 + 0.002), rel=1e-3)
    assert seen.index((8, 64, 4)) < seen.index((8, 64, 8)), "each batch once before it is timed"


def test_counts_of_all_ranks():
    assert engine.sum_counts([{"ours": 2, "stock": 1}, {"ours": 2}]) == {"ours": 4, "stock": 1}
    assert engine.sum_counts([]) == {}
