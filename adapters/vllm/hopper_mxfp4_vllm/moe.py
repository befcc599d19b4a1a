"""The heavy half: vLLM's config, method and experts classes around the core's prepare_experts and fused_moe."""

from typing import Any

import torch
import vllm.envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, mxfp4_w4a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from hopper_mxfp4 import (
    GPT_OSS,
    ExpertWeights,
    KernelUnavailable,
    LayerShape,
    PreparedExperts,
    SwiGLU,
    allocate_weights,
    choose_kernel,
    env,
    fused_moe,
    prepare_experts,
    workspace_bytes,
)
from hopper_mxfp4.weights import round_up

# vLLM only shows loggers below its own.
logger = init_logger("vllm.hopper_mxfp4")

# The loaders of vLLM find parameters by these names.
PARAMETERS = {
    "w13": "w13_weight",
    "w2": "w2_weight",
    "w13_scale": "w13_weight_scale",
    "w2_scale": "w2_weight_scale",
    "w13_bias": "w13_bias",
    "w2_bias": "w2_bias",
}


def device() -> torch.device:
    return torch.device(current_platform.device_type)


def layer_shape(moe: FusedMoEConfig) -> LayerShape:
    return LayerShape(moe.num_local_experts, moe.hidden_dim, moe.intermediate_size_per_partition)


def why_not(moe: FusedMoEConfig, activation: MoEActivation) -> str | None:
    """Why a layer stays with stock vLLM and what to change, in a sentence; None if we take it."""
    parallel = moe.moe_parallel_config
    if moe.in_dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the model in {moe.in_dtype}; pass --dtype bfloat16"
    if getattr(moe, "moe_backend", "auto") != "auto":
        return f"--moe-backend {moe.moe_backend} asks for another kernel; drop one of the two flags"
    if moe.is_lora_enabled:
        return "it has no LoRA; drop --enable-lora"
    if moe.activation != activation:
        return f"the activation is {moe.activation}, and this checkpoint family has {activation}"
    if parallel.use_batched_activation_format or getattr(parallel, "use_passthrough_all2all", False):
        return "this all-to-all backend batches tokens by expert; choose another --all2all-backend"
    if vllm.envs.VLLM_BATCH_INVARIANT:
        return "it is not batch invariant; unset VLLM_BATCH_INVARIANT"
    try:
        choose_kernel("auto", layer_shape(moe), device())
    except KernelUnavailable as unavailable:
        return str(unavailable)
    return None


class GptOssConfig(GptOssMxfp4Config):
    """GPT-OSS checkpoints. Keeps the stock get_name(): vLLM's weight loader goes by it."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        moe = layer.moe_config
        reason = why_not(moe, MoEActivation.SWIGLUOAI)
        if reason is None:
            return GptOssMethod(moe, SwiGLU.from_config(get_current_vllm_config().model_config.hf_config))
        if env.MODE.read() != "auto":
            raise ValueError(f"hopper-mxfp4 can't take over {prefix}: {reason}, or set HOPPER_MXFP4=auto to stay with stock vLLM")
        logger.warning_once("hopper-mxfp4 leaves the MXFP4 MoE layers to stock vLLM: %s", reason)
        return super().get_quant_method(layer, prefix)


class GptOssMethod(GptOssMxfp4MoEMethod):
    """Owns the layer's parameters. `apply` is the stock one: it runs self.moe_kernel."""

    supports_pre_processed_weights = False  # what it repacks to is not what stock vLLM would
    skip_forward_padding = False  # hidden size is padded inside the kernel and nowhere else
    has_unpadded_output = False

    def __init__(self, moe: FusedMoEConfig, swiglu: SwiGLU):
        FusedMoEMethodBase.__init__(self, moe)  # the stock __init__ picks one of vLLM's backends
        self.weight_dtype = "gpt_oss_mxfp4"  # what vLLM's streamed loader goes by
        self.experts_cls = Experts
        self.swiglu = swiglu
        self.kernel = choose_kernel("auto", layer_shape(moe), device())
        logger.info_once("hopper-mxfp4 takes over the MXFP4 MoE layers with kernel %s and %s", self.kernel.name, swiglu)

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # The loader cuts shards at the allocated intermediate size, so that is the size to report;
        # hidden is reported as it is: no padding in the model's graph.
        hidden_size, intermediate = FusedMoEMethodBase.maybe_roundup_sizes(
            self, hidden_size, intermediate_size_per_partition, *args, **kwargs
        )
        return hidden_size, round_up(intermediate, self.kernel.layout(device()).multiple)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.params_dtype = params_dtype
        layer.num_experts = num_experts
        self.shape = LayerShape(num_experts, hidden_size, intermediate_size_per_partition)
        weights = allocate_weights(self.shape, family=GPT_OSS, device=device(), kernel=self.kernel.name)
        for name, tensor in weights.tensors().items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(PARAMETERS[name], parameter)
            set_weight_attrs(parameter, extra_weight_attrs)
            if name.endswith("scale"):
                parameter.quant_method = "block"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        weights = ExpertWeights(
            **{name: getattr(layer, parameter) for name, parameter in PARAMETERS.items()},
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
        )
        prepared = prepare_experts(weights, family=GPT_OSS, swiglu=self.swiglu, kernel=self.kernel.name)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        experts = Experts(moe_config=self.moe, quant_config=self.moe_quant_config)
        experts.prepared = prepared
        finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        self.moe_kernel = mk.FusedMoEKernel(finalize, experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        # Tells vLLM not to quantise activations; our experts read only `prepared`.
        return mxfp4_w4a16_moe_quant_config(layer.w13_weight_scale, layer.w2_weight_scale, layer.w13_bias, layer.w2_bias)


class Experts(mk.FusedMoEExpertsModular):
    """The layer's experts in vLLM's modular MoE, on prepared weights."""

    prepared: PreparedExperts

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    # vLLM asks these when it chooses among its own backends; `why_not` has answered them for us.
    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in (MoEActivation.SWIGLUOAI, MoEActivation.SILU)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_batched_activation_format

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()  # fused_moe has already weighted and summed

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *args: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # In elements of the activations' bf16. The first workspace shares its memory with the output: not for scratch.
        return (0,), (-(-workspace_bytes(self.prepared, M, topk) // 2),), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_map is not None:
            # Padding rows are already -1, which must not index the map's end.
            topk_ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])
        fused_moe(hidden_states, topk_ids, topk_weights.float(), self.prepared, out=output, workspace=workspace2.view(torch.uint8))
