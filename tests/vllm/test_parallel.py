"""Two ranks in two processes of vLLM's CPU engine, against transformers on the whole.

Their shards are of unequal size.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss
from hopper_mxfp4.cli.demo import PROMPTS, compare_tokens, oracle

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="vLLM's CPU engine; benchmarks/engines/vllm has the modes of two GPUs",
    ),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank wants a core of its own"),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Intermediate size 160 is five blocks of 32: one rank takes three, the other two."""
    folder = tmp_path_factory.mktemp("parallel")
    write_gpt_oss(folder / "model", layers=2, hidden=192, intermediate=160, experts=8, top_k=4)
    return folder, {"model": str(folder / "model"), "prompts": PROMPTS, "tokens": 8}


@pytest.mark.parametrize(
    "expert_parallel", [False, True], ids=["tensor parallel", "expert parallel"]
)
def test_two_ranks(job, expert_parallel):
    folder, job = job
    options = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": expert_parallel,
        "distributed_executor_backend": "mp",
    }
    answer, file = folder / "answer.json", folder / "job.json"
    answer.unlink(missing_ok=True)
    file.write_text(json.dumps(job | {"options": options, "answer": str(answer)}))
    command = [sys.executable, "-m", "hopper_mxfp4_vllm.demo", str(file)]
    cores = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=cores
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    answer = json.loads(answer.read_text())
    assert answer["layers"] == 2 * 2  # two layers on each of two ranks
    tokens = answer["tokens"]
    wanted = oracle(job | {"forced": tokens})
    for row in zip(PROMPTS, tokens, wanted["tokens"], wanted["margins"], strict=True):
        assert compare_tokens(*row).same, (
            row
        )  # two partial sums are rounded where one sum is not: near ties may fall either way
