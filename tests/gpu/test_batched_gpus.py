"""Experts spread over GPUs that exchange tokens in batches, through NCCL."""

import pytest
import torch

from batched_ranks import run_ranks


@pytest.mark.parametrize("kernel", ["native", "narrow", "wide"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_gpus_that_exchange_tokens_in_batches(gpus, kernel, tmp_path, record_property):
    if torch.cuda.device_count() < gpus:
        pytest.skip("needs two GPUs")
    seen = run_ranks(gpus, kernel, "cuda", tmp_path)
    record_property("worst_relative_l2", max(rank["relative_l2"] for rank in seen))
    assert all(rank["relative_l2"] < 6e-3 and not rank["differ"] for rank in seen)
