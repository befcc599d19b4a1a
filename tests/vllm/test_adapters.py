"""LoRA adapters on attention, in vLLM's CPU engine, against transformers on merged weights."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss
from hopper_mxfp4.cli.demo import PROMPTS, compare_tokens, oracle

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU engine")

RANK, ALPHA, TARGETS, TOKENS = 8, 16, ("q_proj", "o_proj"), 8
ENGINE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
import vllm
from vllm.lora.request import LoRARequest
from hopper_mxfp4_vllm.demo import _count_layers

job = json.loads(sys.argv[1])
llm = vllm.LLM(
    model=job["model"],
    quantization="hopper_mxfp4",
    skip_tokenizer_init=True,
    enforce_eager=True,
    enable_prefix_caching=False,
    max_model_len=512,
    max_num_batched_tokens=512,
    max_num_seqs=4,
    enable_lora=True,
    max_lora_rank=8,
    lora_target_modules=job["targets"],
)
sampling = vllm.SamplingParams(
    temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
)
prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
answer = {"layers": sum(llm.apply_model(_count_layers))}
for name, request in (("base", None), ("adapted", LoRARequest("mine", 1, job["adapter"]))):
    outputs = llm.generate(prompts, sampling, lora_request=request)
    answer[name] = [list(output.outputs[0].token_ids) for output in outputs]
print("ANSWER", json.dumps(answer))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint, an adapter in PEFT's format, and the checkpoint with the adapter merged."""
    folder = tmp_path_factory.mktemp("adapters")
    base, merged, adapter = (folder / name for name in ("base", "merged", "adapter"))
    write_gpt_oss(base, layers=2, hidden=192, intermediate=192, experts=8, top_k=4)
    shutil.copytree(base, merged)
    tensors, g = load_file(base / "model.safetensors"), torch.Generator().manual_seed(5)
    low_rank = {}
    for layer in range(2):
        for target in TARGETS:
            name = f"model.layers.{layer}.self_attn.{target}"
            out, inputs = tensors[f"{name}.weight"].shape
            a = (torch.randn(RANK, inputs, generator=g) * 0.06).bfloat16()
            b = (torch.randn(out, RANK, generator=g) * 0.06).bfloat16()
            low_rank |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            changed = tensors[f"{name}.weight"].float() + ALPHA / RANK * (b.float() @ a.float())
            tensors[f"{name}.weight"] = changed.bfloat16()
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    save_file(low_rank, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    said |= {"target_modules": list(TARGETS), "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    return base, merged, adapter


def engine(checkpoints, targets):
    base, _, adapter = checkpoints
    job = {"model": str(base), "adapter": str(adapter), "targets": targets}
    job |= {"prompts": PROMPTS, "tokens": TOKENS}
    command = [sys.executable, "-c", ENGINE, json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_adapters_that_leave_the_experts_alone(checkpoints):
    done = engine(checkpoints, [*TARGETS])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    answer = json.loads(line.removeprefix("ANSWER "))
    assert answer["layers"] == 2
    assert answer["base"] != answer["adapted"]
    for folder, tokens in zip(checkpoints, (answer["base"], answer["adapted"]), strict=False):
        job = {"model": str(folder), "prompts": PROMPTS, "forced": tokens}
        wanted = oracle(job)
        for row in zip(PROMPTS, tokens, wanted["tokens"], wanted["margins"], strict=True):
            assert compare_tokens(*row).same, row


def test_adapters_that_may_change_the_experts(checkpoints):
    done = engine(checkpoints, None)
    assert done.returncode != 0
    assert "name the modules that yours change with --lora-target-modules" in done.stderr
