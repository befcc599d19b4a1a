"""The rig of benchmarks/engines/vllm in vLLM's CPU engine: experts move while it generates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RIG = Path(__file__).resolve().parents[2] / "benchmarks" / "engines" / "vllm" / "run.py"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the rig itself is for GPUs"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank wants a core of its own"),
]


def test_tokens_stay_the_same_while_experts_move_between_ranks(tmp_path):
    """Two ranks with EPLB and redundant experts, beside one rank without: vLLM rearranges the
    experts at every eighth step, and moves their prepared weights.
    """
    modes = ("qwen_ours", "qwen_ours_eplb")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, RIG, tmp_path, report, "--modes", ",".join(modes), "--limit", "500"],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, moved = json.loads(report.read_text())["modes"]
    assert "failed" not in one, one
    assert "failed" not in moved, moved
    assert moved["layers"] == [{"PackedMethod reference": 2}] * 2
    assert min(moved["rearrangements"]) >= 20
    assert all(slots > 0 for slots in moved["slots_with_another_expert"])
    verdicts = [verdict for round_ in moved["tokens_as_at_first"] for verdict in round_]
    assert set(verdicts) == {"equal"}
    against = moved["against_qwen_ours"]
    assert against["tokens"] == ["equal"] * 4
    assert against["distinct_tokens"] > 20
    assert against["relative_l2"] < 0.01
