"""The heavy half: SGLang's MoE method around the core's prepare_experts and fused_moe, and the hooks that put it in place."""

import logging
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.moe.utils import (
    get_moe_a2a_backend,
    get_moe_runner_backend,
    is_sbo_enabled,
    is_tbo_enabled,
)
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizeMethodBase
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config, Mxfp4MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    CheckpointFamily,
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
)
from hopper_mxfp4.layout import NEUTRAL_SCALE
from hopper_mxfp4.weights import GROUP, expert_chunks, round_up

try:
    from sglang.srt.runtime_context import get_parallel, get_server_args
except ImportError:  # up to 0.5.13
    from sglang.srt.distributed import get_tp_group
    from sglang.srt.server_args import get_global_server_args as get_server_args
else:

    def get_tp_group() -> Any:
        return get_parallel().tp_group


logger = logging.getLogger(__name__)

NAME = "hopper_mxfp4"
Loader = Callable[..., None]

# The loaders of SGLang find parameters by these names.
_WEIGHTS = {"w13": "w13_weight", "w2": "w2_weight"}
PARAMETERS = {
    GPT_OSS.name: _WEIGHTS
    | {
        "w13_scale": "w13_weight_scale",
        "w2_scale": "w2_weight_scale",
        "w13_bias": "w13_weight_bias",
        "w2_bias": "w2_weight_bias",
    },
    DEEPSEEK_V4.name: _WEIGHTS
    | {"w13_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"},
}
# And copy by value, so that a parameter must have the checkpoint's dtype: weights, scales.
DTYPES = {
    GPT_OSS.name: (torch.uint8, torch.uint8),
    DEEPSEEK_V4.name: (torch.int8, torch.float8_e8m0fnu),
}

# Server options that put something between the layer and its method, or its memory elsewhere: the values that don't.
OPTIONS = (
    ("enable_lora", (False, None), "it has no LoRA; drop --enable-lora"),
    ("lora_paths", (None, [], {}), "it has no LoRA; drop --lora-paths"),
    (
        "kt_weight_path",
        (None, ""),
        "KTransformers splits the experts between CPU and GPU; drop --kt-weight-path",
    ),
    (
        "enable_paged_experts",
        (False,),
        "paged experts keep weights in host memory; drop --enable-paged-experts",
    ),
    ("cpu_offload_gb", (0,), "its weights stay on the GPU; drop --cpu-offload-gb"),
    ("offload_group_size", (-1, 0), "its weights stay on the GPU; drop --offload-group-size"),
    ("dwdp_size", (0, 1, None), "DWDP exchanges the experts' memory; drop --dwdp-size"),
    ("elastic_ep_backend", (None,), "it does not follow elastic EP; drop --elastic-ep-backend"),
    (
        "weight_cache_mode",
        ("off",),
        "the weight cache's own process would hold stock weights; pass --weight-cache-mode off",
    ),
)


def family_of(config: Any, stock: Any) -> CheckpointFamily | None:
    """The family whose MXFP4 experts the stock method would serve; None if it serves something else."""
    if isinstance(stock, Mxfp4MoEMethod) and config.is_static_cfg():
        return GPT_OSS
    if (
        not isinstance(config, Fp8Config)
        or isinstance(stock, UnquantizedFusedMoEMethod)
        or getattr(config, "dequant_fp4_to_fp8", False)
    ):
        return None
    return (
        DEEPSEEK_V4
        if getattr(config, "is_fp4_experts", False) and getattr(config, "is_dsv4_fp4_experts", True)
        else None
    )


def layer_shape(layer: FusedMoE, family: CheckpointFamily) -> LayerShape:
    """What this rank's loader fills: GPT-OSS's cuts shards in whole blocks of 32 (2880 over 4 ranks: 736, 736, 736, 672)."""
    config = layer.moe_runner_config
    hidden = getattr(layer, "hidden_size_unpadded", config.hidden_size)
    intermediate = config.intermediate_size_per_partition
    return LayerShape(
        layer.num_local_experts,
        hidden,
        round_up(intermediate, GROUP) if family is GPT_OSS else intermediate,
    )


def why_not(layer: FusedMoE, family: CheckpointFamily) -> str | None:
    """Why a layer stays with stock SGLang and what to change, in a sentence; None if we take it."""
    options, config, shape = get_server_args(), layer.moe_runner_config, layer_shape(layer, family)
    for option, neutral, reason in OPTIONS:
        if getattr(options, option, neutral[0]) not in neutral:
            return reason
    if (
        getattr(options, "enable_deterministic_inference", False)
        and not env.BATCH_INVARIANT.enabled()
    ):
        return f"it is not batch invariant; set {env.BATCH_INVARIANT.name}=1 or drop --enable-deterministic-inference"
    if not get_moe_a2a_backend().is_none():
        return f"it takes tokens from no all-to-all, and --moe-a2a-backend is {get_moe_a2a_backend().value}; pass none"
    if is_tbo_enabled() or is_sbo_enabled():
        return "it does not run in two or single batch overlap; drop --enable-two-batch-overlap or --enable-single-batch-overlap"
    if config.params_dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the model in {config.params_dtype}; pass --dtype bfloat16"
    if config.activation != "silu" or not config.is_gated:
        return f"the activation is {config.activation}{'' if config.is_gated else ' without a gate'}, and {family.name} has a gated silu"
    if config.apply_router_weight_on_input or config.no_combine:
        return "it weights and sums the experts' outputs, and this model wants their inputs weighted or the outputs apart"
    if config.num_fused_shared_experts:
        return "shared experts are fused into the routed ones; drop --enforce-shared-experts-fusion"
    is_gpt_oss = (
        config.gemm1_alpha is not None
        and config.gemm1_clamp_limit is not None
        and getattr(config, "gate_up_interleaved", True)
    )
    if is_gpt_oss != (family is GPT_OSS):
        return f"alpha {config.gemm1_alpha} and limit {config.gemm1_clamp_limit} of its SwiGLU are not {family.name}'s"
    if shape.intermediate_size % GROUP or shape.hidden_size % GROUP:
        return f"its shard of {shape.intermediate_size} x {shape.hidden_size} cuts blocks of {GROUP}; choose another --tp-size"
    backend = get_moe_runner_backend().value
    if (
        backend == "flashinfer_mxfp4"
        and family is GPT_OSS
        and not hasattr(layer, "hidden_size_unpadded")
    ):  # up to 0.5.18
        return f"this SGLang pads the hidden size for --moe-runner-backend {backend}; pass triton instead"
    if (
        backend == "triton_kernel"
        and family is DEEPSEEK_V4
        and not hasattr(TopK, "bind_runner_backend")
    ):  # up to 0.5.22
        return f"this SGLang transposes the weights for --moe-runner-backend {backend}; pass auto instead"
    if torch.get_default_device().type == "meta":
        return "this --load-format makes a model without memory first; choose another"
    try:
        choose_kernel("auto", shape, torch.get_default_device())
    except (KernelUnavailable, ValueError) as unavailable:
        return str(unavailable)
    return None


class MoEMethod(FusedMoEMethodBase):
    """Owns a layer's parameters, which hold the checkpoint's bytes while weights are loaded and the kernel's otherwise."""

    runner = None  # a kernel called directly, on standard top-k output with local ids
    fuse_routed_scaling_factor_in_topk = True  # from 0.5.19 on; `apply` sees to it before

    def __init__(self, layer: FusedMoE, family: CheckpointFamily):
        config = layer.moe_runner_config
        self.family = family
        self.shape = layer_shape(layer, family)
        self.swiglu = (
            SwiGLU(
                config.gemm1_alpha,
                getattr(config, "gemm1_beta", None) or family.beta,
                config.gemm1_clamp_limit,
            )
            if family is GPT_OSS
            else SwiGLU(family.alpha, family.beta, config.swiglu_limit or None)
        )
        self.device = torch.get_default_device()
        self.kernel = choose_kernel("auto", self.shape, self.device).name
        self.prepared: PreparedExperts | None = None
        self.serving = False
        self.lock = threading.Lock()  # SGLang loads experts in parallel

    def create_weights(self, layer: FusedMoE, *, weight_loader: Loader, **attributes: Any) -> None:
        weight_dtype, scale_dtype = DTYPES[self.family.name]
        weights = allocate_weights(
            self.shape,
            family=self.family,
            device=self.device,
            kernel=self.kernel,
            weight_dtype=weight_dtype,
            scale_dtype=scale_dtype,
        )
        for name, tensor in weights.tensors().items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader(layer, name, weight_loader)
            if name.endswith("scale"):
                parameter.quant_method = "block"
            layer.register_parameter(PARAMETERS[self.family.name][name], parameter)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
        """There is none."""

    def _loader(self, layer: FusedMoE, name: str, loader: Loader) -> Loader:
        """SGLang's loader, given the part of a parameter that it is to fill."""
        is_scale, i, h = (
            name.endswith("scale"),
            self.shape.intermediate_size,
            self.shape.hidden_size,
        )
        rows, k = (2 * i, h) if name.startswith("w13") else (h, i)
        columns = k // (GROUP if is_scale else 2)

        def load(
            param: Any,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str | None,
            expert_id: int | None,
        ) -> None:
            self.restore_weights_before_loading(layer)
            if (
                expert_id is None
            ):  # GPT-OSS: all of this rank's experts, into the corner of what must be empty
                param.data.fill_(NEUTRAL_SCALE if is_scale else 0)
                for part in expert_chunks(
                    loaded_weight
                ):  # copying from the CPU, torch brings all it is given to the GPU first
                    loader(
                        part_of(param, param.data[part]),
                        loaded_weight[part],
                        weight_name,
                        shard_id,
                        expert_id,
                    )
                return
            if is_scale and loaded_weight.dtype == torch.uint8:
                loaded_weight = loaded_weight.view(
                    param.dtype
                )  # else the bytes would be converted as numbers
            # SGLang takes w13 for two halves of equal size: begin where the one it fills is in its place.
            start = param.shape[1] // 2 - i if shard_id == "w3" else 0
            loader(
                part_of(param, param.data[:, start : start + rows, :columns]),
                loaded_weight,
                weight_name,
                shard_id,
                expert_id,
            )

        return load

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Repack what was loaded, at the same addresses. A second call changes nothing."""
        if not self.serving:
            tensors = {
                name: getattr(layer, parameter)
                for name, parameter in PARAMETERS[self.family.name].items()
            }
            weights = ExpertWeights(
                **tensors,
                hidden_size=self.shape.hidden_size,
                intermediate_size=self.shape.intermediate_size,
            )
            prepared = prepare_experts(
                weights,
                family=self.family,
                swiglu=self.swiglu,
                kernel=self.kernel,
                ep_size=layer.moe_ep_size,
            )
            # CUDA graphs hold the first one's constants; its weights are views of the same parameters.
            self.prepared = self.prepared or prepared
            for name, parameter in tensors.items():
                if name.endswith("scale"):
                    parameter.data = parameter.data.view(
                        torch.uint8
                    )  # NCCL, by which EPLB moves experts, has no float8_e8m0fnu
            self.serving = True
        assert self.prepared is not None
        self.prepared.reset_constants()  # sleep drops them
        report(self)

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """The checkpoint's bytes again, at the same addresses: a weight update may bring only some of them."""
        with self.lock:
            if self.serving and self.prepared is not None:
                for name, tensor in self.prepared.restore_in_place().tensors().items():
                    if name.endswith("scale"):
                        getattr(layer, PARAMETERS[self.family.name][name]).data = tensor.view(
                            DTYPES[self.family.name][1]
                        )
                self.serving = False

    @torch.compiler.disable  # FlashInfer's call is nothing to trace
    def apply(self, layer: FusedMoE, dispatch_output: Any) -> StandardCombineInput:
        if not self.serving or layer.w13_weight.data_ptr() != self.prepared.w13.data_ptr():
            reason = (
                "was replaced after loading"
                if self.serving
                else "was loaded and not prepared; call end_weight_update"
            )
            raise RuntimeError(
                f"w13_weight of {self.family.name}'s layer {layer.layer_id} {reason}: hopper-mxfp4 can't run on it"
            )
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        if hasattr(topk, "to_standard"):  # SGLang left the routing to the kernel
            topk = topk.to_standard()
        ids, weights = topk.topk_ids, topk.topk_weights.float()
        if (
            layer.dispatcher.skip_local_expert_mapping and layer.moe_ep_rank
        ):  # global ids; those of other ranks fall outside ours
            ids = ids - layer.moe_ep_rank * self.shape.num_experts
        if not layer.should_fuse_routed_scaling_factor_in_topk:
            weights = weights * (layer.moe_runner_config.routed_scaling_factor or 1.0)
        with use_symmetric_memory(get_tp_group(), disabled=not is_allocation_symmetric()):
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return StandardCombineInput(
            hidden_states=fused_moe(x, ids, weights, self.prepared, out=out)
        )


def part_of(param: Any, data: torch.Tensor) -> torch.nn.Parameter:
    """A view that SGLang's loader takes for the parameter."""
    part = torch.nn.Parameter(data, requires_grad=False)
    part.__dict__.update(param.__dict__)
    return part


taken, reported, declined = 0, 0, set[str]()  # in this process


def report(method: MoEMethod) -> None:
    """One line for a model, when its first layer is ready: then all of them have been made."""
    global reported
    if reported < taken:
        logger.info(
            "hopper-mxfp4 takes over %d MXFP4 MoE layers with kernel %s and %s",
            taken - reported,
            method.kernel,
            method.swiglu,
        )
        reported = taken


def stop(reason: str) -> None:
    """End the process, since SGLang swallows exceptions of plugins and this rank would go on with a stock kernel."""
    logger.error(reason)
    raise SystemExit(reason)


def choose_method(
    stock: Any, config: Any, layer: torch.nn.Module, prefix: str = ""
) -> MoEMethod | None:
    """After get_quant_method of Mxfp4Config and Fp8Config: our method for MXFP4 experts, None to keep the stock one."""
    global taken
    flag = get_moe_runner_backend().value == NAME
    mode = "on" if flag else env.MODE.read()
    if mode == "off" or not isinstance(layer, FusedMoE):
        return None
    family = family_of(config, stock)
    if family is not None:
        reason = why_not(layer, family)
    elif flag:
        reason = "its experts are not MXFP4 ones of GPT-OSS or DeepSeek-V4"
    else:
        return None
    if reason is None and family is not None:
        taken += 1
        return MoEMethod(layer, family)
    if mode == "on":
        instead = f"drop --moe-runner-backend {NAME}" if flag else f"set {env.MODE.name}=auto"
        stop(
            f"hopper-mxfp4 can't take over {prefix}: {reason}, or {instead} to stay with stock SGLang"
        )
    if reason not in declined:
        declined.add(reason)
        logger.warning("hopper-mxfp4 leaves the MXFP4 MoE layers to stock SGLang: %s", reason)
    return None


def want_standard_topk(_: None, block: Any, *args: Any, **kwargs: Any) -> None:
    """After GptOssSparseMoeBlock.__init__ up to 0.5.22, where the router follows the server's backend instead of the layer's."""
    if isinstance(block.experts.quant_method, MoEMethod):
        block.topk.topk_config.output_format = TopKOutputFormat.STANDARD


def prepare_updated(_: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    """After a weight update of SGLang up to 0.5.20, which leaves the layers as loaded."""
    for module in (
        updater.get_model() if hasattr(updater, "get_model") else updater.model
    ).modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MoEMethod):
            method.process_weights_after_loading(module)


def hooks() -> dict[str, Callable[..., Any]]:
    """What runs after which function of this SGLang, by the function's name."""
    found: dict[str, Callable[..., Any]] = {
        f"{c.__module__}.{c.__name__}.get_quant_method": choose_method
        for c in (Mxfp4Config, Fp8Config)
    }
    if not hasattr(TopK, "bind_runner_backend"):
        found["sglang.srt.models.gpt_oss.GptOssSparseMoeBlock.__init__"] = want_standard_topk
    if not hasattr(QuantizeMethodBase, "restore_weights_before_loading"):
        module = "sglang.srt.model_executor.model_runner"
        updater = (
            f"{module}_components.weight_updater.WeightUpdater"
            if find_spec(f"{module}_components")
            else f"{module}.ModelRunner"
        )
        for name in ("update_weights_from_tensor", "update_weights_from_distributed"):
            found[f"{updater}.{name}"] = prepare_updated
    return found


def offer_backend() -> bool:
    """Make --moe-runner-backend hopper_mxfp4 a choice; False where SGLang has no way to, up to 0.5.18."""
    try:
        from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
        from sglang.srt.server_args import (
            MOE_RUNNER_BACKEND_CHOICES,
            add_moe_runner_backend_choices,
        )
    except ImportError:
        return False
    if NAME not in MOE_RUNNER_BACKEND_CHOICES:

        def refuse(config: Any) -> None:
            stop(
                f"--moe-runner-backend {NAME} serves MXFP4 experts of GPT-OSS and DeepSeek-V4, and this model has others; drop it"
            )

        register_moe_runner_core(NAME, refuse)
        add_moe_runner_backend_choices([NAME])
    return True
