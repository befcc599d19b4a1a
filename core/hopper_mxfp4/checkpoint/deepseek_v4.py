"""DeepSeek-V4-Flash's config.json, for checkpoints and engines of random weights."""

from collections.abc import Sequence
from typing import Any


def deepseek_v4_config(
    *,
    layers: int,
    hash_layers: int = 3,
    compress_ratios: Sequence[int] | None = None,
    hidden: int = 4096,
    intermediate: int = 2048,
    experts: int = 256,
    heads: int = 64,
    query_rank: int = 1024,
    output_rank: int = 1024,
    vocabulary: int = 129280,
) -> dict[str, Any]:
    """A checkpoint's config.json; what is left out is V4-Flash's, without draft heads.

    hash_layers: how many of the first layers route by token id. compress_ratios: of each layer's
    attention: 0 (only a sliding window, which is also what all have where nothing is given; it
    needs the fewest packages), 4 or 128.
    Raises ValueError where there are more layers that route by token id than layers, or another
    number of ratios.
    """
    ratios = [0] * layers if compress_ratios is None else list(compress_ratios)
    if len(ratios) != layers or hash_layers > layers:
        raise ValueError(
            f"{layers} layers with {len(ratios)} compress ratios and {hash_layers} that route by "
            "token id; give a ratio for each layer, and at most as many that route by token id"
        )
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 16384,
        "moe_intermediate_size": intermediate,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 6,
        "num_hidden_layers": layers,
        "num_hash_layers": hash_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": 8,
        "o_lora_rank": output_rank,
        "q_lora_rank": query_rank,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "compress_rope_theta": 160000,
        "compress_ratios": ratios,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }
