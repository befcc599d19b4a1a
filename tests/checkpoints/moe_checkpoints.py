"""Small random checkpoints of Qwen3-MoE in the formats in which tools write MXFP4 experts.

Each format's quantization_config, tensor names, shapes and dtypes are those of published
checkpoints; only the experts are quantised, since a CPU runs no MXFP4 linear layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hopper_mxfp4 import GENERIC, ExpertWeights, SwiGLU, reference_moe

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS, VOCABULARY = 256, 384, 8, 2, 2, 512
HEADS, KV_HEADS, HEAD_DIM = 8, 8, 32

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * INTERMEDIATE,
    "max_position_embeddings": 4096,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": INTERMEDIATE,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Format:
    """How one tool stores and declares MXFP4 experts.

    weight, scale: what follows the projection's name in a tensor's name; all are uint8.
    """

    quantization_config: dict[str, Any]
    weight: str = "weight"
    scale: str = "weight_scale"


# llm-compressor, one group of compressed-tensors. The scheme MXFP4A16 leaves input_activations
# null; MXFP4 has MXFP4_INPUTS, and a W4A8 recipe FP8_INPUTS.
_MXFP4 = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 32,
    "num_bits": 4,
    "observer": "memoryless_minmax",
    "observer_kwargs": {},
    "scale_dtype": "torch.uint8",
    "strategy": "group",
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}
MXFP4_INPUTS = _MXFP4 | {"dynamic": True, "observer": None}
FP8_INPUTS = MXFP4_INPUTS | {
    "group_size": None,
    "num_bits": 8,
    "scale_dtype": None,
    "strategy": "token",
}


def compressed_tensors(inputs: dict[str, Any] | None = None) -> Format:
    group = {
        "format": "mxfp4-pack-quantized",
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _MXFP4,
    }
    return Format(
        {
            "config_groups": {"group_0": group},
            "format": "mxfp4-pack-quantized",
            "global_compression_ratio": None,
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
        },
        weight="weight_packed",
    )


# AMD's Quark: one scheme for all that is not excluded. A recipe with FP4_INPUTS is W4A4.
_FP4 = {
    "ch_axis": -1,
    "dtype": "fp4",
    "group_size": 32,
    "is_dynamic": False,
    "is_scale_quant": False,
    "observer_cls": "PerBlockMXObserver",
    "qscheme": "per_group",
    "round_method": "half_even",
    "scale_calculation_mode": "even",
    "scale_format": "e8m0",
    "scale_type": "float",
    "symmetric": None,
}
FP4_INPUTS = _FP4 | {"is_dynamic": True}


def quark(inputs: dict[str, Any] | None = None) -> Format:
    attention = [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(LAYERS) for name in "qkvo"
    ]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(LAYERS)]
    return Format(
        {
            "algo_config": None,
            "exclude": ["lm_head", *attention, *gates],
            "export": {
                "kv_cache_group": [],
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
            "global_quant_config": {
                "bias": None,
                "input_tensors": inputs,
                "output_tensors": None,
                "target_device": None,
                "weight": _FP4,
            },
            "kv_cache_post_rope": False,
            "kv_cache_quant_config": {},
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "softmax_quant_spec": None,
            "version": "0.10",
        }
    )


# Intel's AutoRound. Its scheme MXFP4 declares 4-bit activations; act_bits 16 is weight-only.
def auto_round(act_bits: int = 4) -> Format:
    whole = {"act_bits": 16, "act_data_type": "float", "bits": 16, "data_type": "float"}
    exceptions = ["lm_head"]
    for i in range(LAYERS):
        exceptions += [f"model.layers.{i}.self_attn.{name}_proj" for name in "qkvo"]
        exceptions.append(f"model.layers.{i}.mlp.gate")
    return Format(
        {
            "act_bits": act_bits,
            "act_data_type": "mx_fp" if act_bits < 16 else "float",
            "act_dynamic": True,
            "act_group_size": 32,
            "act_sym": True,
            "autoround_version": "0.12.3",
            "bits": 4,
            "data_type": "mx_fp",
            "extra_config": dict.fromkeys(exceptions, whole),
            "group_size": 32,
            "iters": 0,
            "packing_format": "auto_round:llm_compressor",
            "quant_method": "auto-round",
            "sym": True,
        },
        weight="weight_packed",
    )


# MiMo-V2's: fp8 with MXFP4 experts. The attention is fp8 there.
MIMO = Format(
    {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS)],
        "mxfp4_block_size": 32,
        "quant_method": "fp8",
        "store_dtype": "mxfp4",
        "weight_block_size": [128, 128],
    }
)
# Ling-3's.
LING = Format(
    {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8",
        "routed_experts_group_size": 32,
        "routed_experts_quant_method": "mxfp4",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    scale="weight_scale_inv",
)


def expert_tensors(how: Format, layer: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """One layer's experts by the checkpoint's names."""
    g = torch.Generator().manual_seed(seed + layer)
    tensors = {}
    for e in range(EXPERTS):
        for name, rows, k in (
            ("gate", INTERMEDIATE, HIDDEN),
            ("up", INTERMEDIATE, HIDDEN),
            ("down", HIDDEN, INTERMEDIATE),
        ):
            where = f"model.layers.{layer}.mlp.experts.{e}.{name}_proj"
            for suffix, low, high, columns in (
                (how.weight, 0, 256, k // 2),
                (how.scale, 118, 122, k // 32),
            ):
                tensors[f"{where}.{suffix}"] = torch.randint(
                    low, high, (rows, columns), generator=g, dtype=torch.uint8
                )
    return tensors


def expert_weights(how: Format, tensors: dict[str, torch.Tensor], layer: int = 0) -> ExpertWeights:
    """The same as the core wants them: gate over up, experts first."""

    def stack(suffix: str, *names: str) -> torch.Tensor:
        where = f"model.layers.{layer}.mlp.experts"
        each = [
            torch.cat([tensors[f"{where}.{e}.{name}_proj.{suffix}"] for name in names])
            for e in range(EXPERTS)
        ]
        return torch.stack(each)

    return ExpertWeights(
        w13=stack(how.weight, "gate", "up"),
        w2=stack(how.weight, "down"),
        w13_scale=stack(how.scale, "gate", "up"),
        w2_scale=stack(how.scale, "down"),
    )


def model_tensors(
    how: Format, seed: int = 0, vocabulary: int = VOCABULARY
) -> dict[str, torch.Tensor]:
    """All of the checkpoint."""
    g = torch.Generator().manual_seed(seed)

    def bf16(*shape: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * std).bfloat16()

    tensors = {
        "model.embed_tokens.weight": bf16(vocabulary, HIDDEN, std=1.0),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": bf16(vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        part = {
            "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            "post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            "self_attn.q_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
            "self_attn.k_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
            "self_attn.q_proj.weight": bf16(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": bf16(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": bf16(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": bf16(HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate.weight": bf16(EXPERTS, HIDDEN),
        }
        tensors |= {f"model.layers.{layer}.{name}": t for name, t in part.items()}
        tensors |= expert_tensors(how, layer, seed)
    return tensors


def write(
    folder: Path, how: Format, seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write config.json and model.safetensors; returns the tensors."""
    tensors = model_tensors(how, seed, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = QWEN3_MOE | {
        "quantization_config": how.quantization_config,
        "vocab_size": vocabulary,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tensors


def write_dequantised(folder: Path, how: Format, tensors: dict[str, torch.Tensor]) -> None:
    """The same model in plain BF16, which holds every MXFP4 value exactly."""
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.cat((codes, -codes))
    plain = {}
    for name, t in tensors.items():
        if t.dtype != torch.uint8:
            plain[name] = t
        elif name.endswith(f".{how.weight}"):
            where = name.removesuffix(how.weight)
            scale = torch.exp2(tensors[where + how.scale].float() - 127).repeat_interleave(32, -1)
            values = codes[torch.stack((t & 15, t >> 4), -1).flatten(-2).long()]
            plain[f"{where}weight"] = (values * scale).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE, indent=1) + "\n")


Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def calls(tokens: int = 9, seed: int = 0) -> Call:
    """x, topk_ids and topk_weights, with rows of padding, as the frameworks mark them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(tokens)]).int()
    ids[2, 1] = ids[5] = -1
    weights = torch.rand(tokens, TOP_K, generator=g)
    return torch.randn(tokens, HIDDEN, generator=g).bfloat16(), ids, weights


def reference(
    how: Format,
    tensors: dict[str, torch.Tensor],
    call: Call,
    layer: int = 0,
    swiglu: SwiGLU | None = None,
) -> torch.Tensor:
    """What one layer's experts have to give."""
    weights = expert_weights(how, tensors, layer)
    return reference_moe(*call, weights, family=GENERIC, swiglu=swiglu or SwiGLU())


def relative_l2(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((y.float() - wanted).norm() / wanted.norm()).item()
