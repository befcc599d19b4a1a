"""Speculative decoding in vLLM's CPU engine: steps of several tokens, against transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss
from hopper_mxfp4.cli.demo import PROMPTS, compare_tokens, oracle

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU engine")

HIDDEN, LAYERS, TOKENS, DRAFTED = 192, 3, 8, 2


def write_eagle3_head(folder):
    """A random draft head of one layer, which sees the hidden states of two of the model's."""
    g = torch.Generator().manual_seed(7)
    heads, kv_heads, head_dim, inner, vocabulary = 16, 8, 64, 256, 1024

    def weight(*shape):
        return (torch.randn(*shape, generator=g) * 0.02).bfloat16()

    sizes = {
        "fc": (HIDDEN, 2 * HIDDEN),
        "lm_head": (vocabulary, HIDDEN),
        "midlayer.self_attn.q_proj": (heads * head_dim, 2 * HIDDEN),
        "midlayer.self_attn.k_proj": (kv_heads * head_dim, 2 * HIDDEN),
        "midlayer.self_attn.v_proj": (kv_heads * head_dim, 2 * HIDDEN),
        "midlayer.self_attn.o_proj": (HIDDEN, heads * head_dim),
        "midlayer.mlp.gate_proj": (inner, HIDDEN),
        "midlayer.mlp.up_proj": (inner, HIDDEN),
        "midlayer.mlp.down_proj": (HIDDEN, inner),
    }
    tensors = {f"{name}.weight": weight(*size) for name, size in sizes.items()}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    for name in ("norm", *(f"midlayer.{norm}" for norm in norms)):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "draft_vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [1, 2],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_an_eagle3_head(tmp_path):
    """The head is dense and stays vLLM's. Greedy tokens are the model's own, whatever it drafts."""
    write_gpt_oss(
        tmp_path / "model", layers=LAYERS, hidden=HIDDEN, intermediate=192, experts=8, top_k=4
    )
    write_eagle3_head(tmp_path / "draft")
    drafting = {"method": "eagle3", "model": str(tmp_path / "draft")}
    job = {
        "model": str(tmp_path / "model"),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "answer": str(tmp_path / "answer.json"),
        "options": {"speculative_config": drafting | {"num_speculative_tokens": DRAFTED}},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "hopper_mxfp4_vllm.demo", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "Loading drafter model" in log
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["layers"] == LAYERS
    wanted = oracle(job | {"forced": answer["tokens"]})
    for row in zip(PROMPTS, answer["tokens"], wanted["tokens"], wanted["margins"], strict=True):
        assert compare_tokens(*row).same, row
