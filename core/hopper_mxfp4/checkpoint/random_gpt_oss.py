"""Random GPT-OSS checkpoints in the Hugging Face format, for the demo, the tests and benchmarks."""

import json
from pathlib import Path
from typing import Any

import torch

from hopper_mxfp4.contract import BLOCK

VOCABULARY = 1024
HEAD_DIM = 64


def write_gpt_oss(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    seed: int = 3,
) -> int:
    """Write config.json and model.safetensors; returns the bytes written. Equal arguments, equal
    bytes.

    Names, shapes and dtypes are those of openai/gpt-oss-20b: bf16 throughout but for the experts,
    whose projections are MXFP4 blocks [E, rows, K/32, 16] with scales [E, rows, K/32], both uint8.
    There is no tokenizer; the vocabulary has 1024 entries. GPT-OSS-20B's own expert layer is hidden
    2880, intermediate 2880, 32 experts, top_k 4.

    The experts are large enough to decide the tokens. Random logits lie close together: with the
    default seed and the demo's sizes the best is always 0.9 % ahead, so that engines that round
    differently agree.

    Raises ValueError where a size can't be: hidden and intermediate need multiples of 32, top_k at
    most experts.
    """
    for name, value in (("hidden", hidden), ("intermediate", intermediate)):
        if value <= 0 or value % BLOCK:
            raise ValueError(f"{name} is {value}; give a positive multiple of {BLOCK}")
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k is {top_k} with {experts} experts; give 1 to {experts}")
    from safetensors.torch import save_file

    heads, kv_heads, head_dim = 16, 8, HEAD_DIM  # enough for eight tensor-parallel ranks
    generator = torch.Generator().manual_seed(seed)

    def bf16(*shape: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(torch.bfloat16)

    def blocks(rows: int, k: int) -> torch.Tensor:
        return torch.randint(
            256, (experts, rows, k // BLOCK, BLOCK // 2), generator=generator, dtype=torch.uint8
        )

    def scales(rows: int, k: int) -> torch.Tensor:
        return torch.randint(
            121, 125, (experts, rows, k // BLOCK), generator=generator, dtype=torch.uint8
        )

    tensors = {
        # A unit embedding and a small head give logits whose best is well apart from the next.
        "model.embed_tokens.weight": bf16(VOCABULARY, hidden, std=1.0),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": bf16(VOCABULARY, hidden),
    }
    attention = {
        "q_proj": heads * head_dim,
        "k_proj": kv_heads * head_dim,
        "v_proj": kv_heads * head_dim,
    }
    for layer in range(layers):
        part = {
            "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            "self_attn.sinks": bf16(heads),
            "self_attn.o_proj.weight": bf16(hidden, heads * head_dim),
            "self_attn.o_proj.bias": bf16(hidden),
            "mlp.router.weight": bf16(experts, hidden),
            "mlp.router.bias": bf16(experts),
            "mlp.experts.gate_up_proj_blocks": blocks(2 * intermediate, hidden),
            "mlp.experts.gate_up_proj_scales": scales(2 * intermediate, hidden),
            "mlp.experts.gate_up_proj_bias": bf16(experts, 2 * intermediate),
            "mlp.experts.down_proj_blocks": blocks(hidden, intermediate),
            "mlp.experts.down_proj_scales": scales(hidden, intermediate),
            "mlp.experts.down_proj_bias": bf16(experts, hidden),
        }
        for name, rows in attention.items():
            part[f"self_attn.{name}.weight"] = bf16(rows, hidden)
            part[f"self_attn.{name}.bias"] = bf16(rows)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in part.items()}

    config = gpt_oss_config(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        experts=experts,
        top_k=top_k,
        heads=heads,
        vocabulary=VOCABULARY,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return (folder / "model.safetensors").stat().st_size


def gpt_oss_config(
    *,
    layers: int,
    hidden: int = 2880,
    intermediate: int = 2880,
    experts: int,
    top_k: int = 4,
    heads: int = 64,
    vocabulary: int = 201088,
) -> dict[str, Any]:
    """A GPT-OSS checkpoint's config.json; what is left out is gpt-oss-20b's and -120b's."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "experts_per_token": top_k,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 0,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }
