"""Experts spread over processes that exchange tokens in batches, on a CPU."""

import pytest

from batched_ranks import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_exchange_tokens_in_batches(ranks, tmp_path):
    for seen in run_ranks(ranks, "reference", "cpu", tmp_path):
        assert seen["relative_l2"] < 5e-3
        assert not seen["differ"]
