"""vLLM models and layers for one rank of any tensor- or expert-parallel size.

All in this one process, on vLLM's device.
"""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe import (
    RoutedExperts,
    fused_moe_make_expert_params_mapping,
)
from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.platforms import current_platform
from vllm.v1.worker.workspace import init_workspace_manager

from hopper_mxfp4_vllm.selection import NAME

DEVICE = torch.device(current_platform.device_type)
DEEPSEEK_V4_CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 256,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 384,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "topk_method": "noaux_tc",
    "vocab_size": 1024,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


def configure(model: Path, quantization: str | None = NAME, **options):
    """What `vllm serve` makes of a checkpoint's folder."""
    args = EngineArgs(
        model=str(model),
        quantization=quantization,
        skip_tokenizer_init=True,
        max_model_len=256,
        enforce_eager=True,
        **options,
    )
    return args.create_engine_config()


def write_deepseek_v4_config(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V4_CONFIG | changes))
    return folder


def _plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


# On a CPU with AVX512-BF16 or AMX vLLM packs every linear weight once a model is loaded and drops
# the parameter, so that nothing can be loaded into it again; in a CUDA wheel the op for it is
# missing. These layers are not what is tested: they stay as loaded, whatever the CPU can do.
assert callable(layer_utils.dispatch_cpu_unquantized_gemm)
if DEVICE.type == "cpu":
    layer_utils.dispatch_cpu_unquantized_gemm = _plain_linear


@cache
def _one_process_group() -> None:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        backend=backend,
        distributed_init_method=f"file://{tempfile.mktemp()}",
    )
    parallel_state.initialize_model_parallel(1)
    # A worker's part: vLLM's MoE takes its scratch from here. Before 0.30 it does so on the CPU
    # too, where the CPU worker puts this in place.
    if DEVICE.type == "cpu":
        torch.accelerator.empty_cache = lambda: None
    init_workspace_manager(DEVICE)


class Rank:
    """vLLM's configuration as one rank of `size` sees it.

    Nothing is communicated: results are partial sums.
    """

    def __init__(self, config, size: int = 1, rank: int = 0, expert_parallel: bool = False):
        self.config = copy.deepcopy(config)
        self.config.parallel_config.tensor_parallel_size = size
        self.config.parallel_config.enable_expert_parallel = expert_parallel
        self.size, self.rank = size, rank

    def __enter__(self):
        self.context = set_current_vllm_config(self.config)
        self.context.__enter__()
        _one_process_group()
        for group in (parallel_state._TP, parallel_state._EP):
            if group is not None:
                group.world_size, group.rank_in_group = self.size, self.rank
        self.dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        DEVICE.__enter__()  # vLLM builds and loads its models under the device
        return self.config

    def __exit__(self, *exception):
        DEVICE.__exit__(*exception)
        torch.set_default_dtype(self.dtype)
        for group in (parallel_state._TP, parallel_state._EP):
            if group is not None:
                group.world_size, group.rank_in_group = 1, 0
        self.context.__exit__(*exception)


def experts_of(module) -> RoutedExperts:
    return next(m for m in module.modules() if isinstance(m, RoutedExperts))


def gpt_oss(rank: Rank, tensors: dict[str, torch.Tensor]):
    """vLLM's own GptOssForCausalLM, loaded by its own load_weights."""
    with rank as config:
        model = initialize_model(vllm_config=config)
        load(model, config, tensors)
    return model


def load(model, config, tensors: dict[str, torch.Tensor]) -> None:
    model.load_weights(iter({name: t.clone() for name, t in tensors.items()}.items()))
    process_weights_after_loading(model, config.model_config, DEVICE)


def deepseek_v4_moe(rank: Rank, prefix: str = "model.layers.0.ffn.experts", **options):
    """A MoE layer as vLLM's DeepSeek-V4 model asks for it."""
    make = getattr(fused_moe_layer, "FusedMoEFactory", None) or fused_moe_layer.FusedMoE
    with rank as config:
        hf = config.model_config.hf_config
        return make(
            num_experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.moe_intermediate_size,
            renormalize=hf.norm_topk_prob,
            quant_config=config.quant_config,
            prefix=prefix,
            scoring_func=hf.scoring_func,
            routed_scaling_factor=hf.routed_scaling_factor,
            e_score_correction_bias=torch.zeros(hf.n_routed_experts),
            swiglu_limit=hf.swiglu_limit,
            **options,
        )


def plain_moe(rank: Rank, prefix: str = "model.layers.0.mlp.experts", **options):
    """A MoE layer as most models of vLLM ask for it."""
    make = getattr(fused_moe_layer, "FusedMoEFactory", None) or fused_moe_layer.FusedMoE
    with rank as config:
        hf = config.model_config.hf_config
        return make(
            num_experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.moe_intermediate_size,
            renormalize=hf.norm_topk_prob,
            quant_config=config.quant_config,
            prefix=prefix,
            **options,
        )


def prepared(rank: Rank, layer, tensors: dict[str, torch.Tensor]) -> RoutedExperts:
    """That layer's experts, loaded by the names under which vLLM's models find them, and prepared.

    tensors: by the checkpoint's names, one projection of one expert each.
    """
    experts = experts_of(layer)
    mapping = fused_moe_make_expert_params_mapping(
        layer,
        ckpt_gate_proj_name="gate_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj",
        num_experts=experts.global_num_experts,
    )
    parameters = dict(experts.named_parameters())
    for name, tensor in tensors.items():
        fused, part, expert, shard = next(row for row in mapping if row[1] in name)
        target = name.replace(part, fused).rpartition(".")[2]
        target = target.removesuffix("_inv")  # as vLLM's model for Ling renames it
        parameters[target].weight_loader(
            parameters[target], tensor.clone(), name, shard_id=shard, expert_id=expert
        )
    with rank as config:
        process_weights_after_loading(layer, config.model_config, DEVICE)
    return experts


def run(
    rank: Rank,
    experts: RoutedExperts,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_tokens_across_dp: torch.Tensor | None = None,
    **shared_experts,
) -> torch.Tensor:
    """The routed experts' partial result on this rank, through vLLM's modular kernel."""
    across = {"num_tokens_across_dp": num_tokens_across_dp}
    with (
        rank as config,
        set_forward_context(None, config, num_tokens=len(x), **across),
        torch.inference_mode(),
    ):
        return experts.forward_modular(
            x=x, topk_weights=topk_weights, topk_ids=topk_ids, **shared_experts
        )


def poisoned_memory():
    """torch.empty and its kin give 0xFF bytes instead of whatever lay there.

    As a scale or a bias that is NaN.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Poison(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if (
                func.name() in ("aten::empty.memory_format", "aten::empty_strided")
                and result.device.type == "cpu"
            ):
                result.untyped_storage().fill_(255)
            return result

    return Poison()
