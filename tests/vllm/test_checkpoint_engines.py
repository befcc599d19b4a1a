"""Whole engines on checkpoints by whatever tool, against transformers on the same model in BF16."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_checkpoints import (
    LAYERS,
    auto_round,
    compressed_tensors,
    quark,
    write,
    write_dequantised,
)

PROMPTS = [[5, 17, 99, 3], [400, 1, 1, 2, 250, 77]]
TOKENS = 8


def greedy(folder):
    """transformers' tokens, and by how much of the best logit each leads the next."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens, leads = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(TOKENS):
                best, second = model(torch.tensor([ids])).logits[0, -1].float().topk(2).values
                leads.append(((best - second) / best.abs()).item())
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            tokens.append(ids[len(prompt) :])
    return tokens, min(leads)


@pytest.mark.parametrize(
    "how",
    [compressed_tensors(), quark(), auto_round()],
    ids=["compressed-tensors", "quark", "auto-round"],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path, how):
    tensors = write(tmp_path / "checkpoint", how)
    write_dequantised(tmp_path / "plain", how, tensors)
    job = {
        "model": str(tmp_path / "checkpoint"),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "answer": str(tmp_path / "answer.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "hopper_mxfp4_vllm.demo", str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    wanted, lead = greedy(tmp_path / "plain")
    assert lead > 2**-8  # what engines round differently decides no token
    assert answer["layers"] == LAYERS
    assert answer["calls"] == LAYERS * TOKENS  # once a step, both prompts in one batch
    assert answer["tokens"] == wanted
    halved = {k: t - 1 if k.endswith(how.scale) else t for k, t in tensors.items()}
    write_dequantised(tmp_path / "other", how, halved)
    assert greedy(tmp_path / "other")[0] != wanted  # the experts have a say
