"""Ranks in processes of vLLM's CPU engine, against transformers on the whole.

Their shards are of unequal size.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
    check_tokens(job, answer["tokens"])


def check_tokens(job, tokens):
    """Partial sums are rounded where one sum is not: near ties may fall either way."""
    wanted = oracle(job | {"forced": tokens})
    for row in zip(job["prompts"], tokens, wanted["tokens"], wanted["margins"], strict=True):
        assert compare_tokens(*row).same, row


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["", "sequence parallel"])
def test_two_data_parallel_engines(job, tensor_parallel):
    """Each with its own prompt, experts spread over all ranks. With tensor parallelism inside, vLLM
    splits the tokens of an engine over its ranks as well.
    """
    folder, job = job
    options = {
        "tensor_parallel_size": tensor_parallel,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "cpu_all_to_all.Extension",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engines, jobs = [], []
    for r, prompt in enumerate(PROMPTS):
        mine = job | {"prompts": [prompt], "options": options, "answer": f"{folder}/answer{r}.json"}
        Path(mine["answer"]).unlink(missing_ok=True)
        (folder / f"job{r}.json").write_text(json.dumps(mine))
        surroundings = {
            "VLLM_DP_RANK": str(r),
            "VLLM_DP_SIZE": str(len(PROMPTS)),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(["0|1"] * tensor_parallel),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        command = [sys.executable, "-m", "hopper_mxfp4_vllm.demo", str(folder / f"job{r}.json")]
        log = (folder / f"log{r}").open("w")
        engines.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | surroundings)
        )
        jobs.append(mine)
    try:
        codes = [engine.wait(timeout=600) for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    logs = [(folder / f"log{r}").read_text() for r in range(len(PROMPTS))]
    assert codes == [0, 0], "".join(log[-2000:] for log in logs)
    assert "allgather_reducescatter all2all manager" in logs[0]
    for mine in jobs:
        answer = json.loads(Path(mine["answer"]).read_text())
        assert answer["layers"] == 2 * tensor_parallel
        check_tokens(mine, answer["tokens"])
