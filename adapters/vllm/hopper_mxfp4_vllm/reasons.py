"""Why a layer stays stock, and what a user has to change, each in a sentence."""

from collections.abc import Iterator
from typing import Any

import torch
import vllm.envs
from vllm.config import VllmConfig, quantization
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts

from hopper_mxfp4 import CheckpointFamily, KernelUnavailable, LayerShape, SwiGLU, env
from hopper_mxfp4.plugin import BLOCK, Kernel, choose_kernel
from hopper_mxfp4.registry import config_get

from .experts import SWIGLU_OF

# vLLM's variables by which users ask its own kernels for activations of another precision.
PRECISION_VARIABLES = ("VLLM_HUMMING_INPUT_QUANT_CONFIG", "VLLM_MARLIN_INPUT_DTYPE")
ACTIVATION_FLAG = "--quantization-config.moe.activation"
ACTIVATION_NAMES = {"fp8_per_block_dynamic": "fp8"}  # vLLM's name for groups of 128: ours


class Declined(ValueError):
    """A layer that can't be taken over; the message says why and what to change."""


def serving_kernel(
    moe: FusedMoEConfig,
    shape: LayerShape,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    device: torch.device,
    kernel: str = "auto",
    deterministic: bool = False,
    activations: str = "bf16",
) -> Kernel:
    """The kernel that runs a layer with such activations.

    Raises Declined where the layer stays with stock vLLM.
    """
    reason = layer_decline_reason(moe, shape, family, swiglu)
    if reason is not None:
        raise Declined(reason)
    try:
        return choose_kernel(
            kernel, shape, device, deterministic=deterministic, activations=activations
        )
    except KernelUnavailable as unavailable:
        raise Declined(str(unavailable)) from unavailable


def server_decline_reason(config: VllmConfig) -> str | None:
    """Why all layers of a server with these arguments stay stock; None if they need not."""
    return next(_server_reasons(config), None)


def layer_decline_reason(
    moe: FusedMoEConfig, shape: LayerShape, family: CheckpointFamily, swiglu: SwiGLU
) -> str | None:
    """Why a layer stays stock, whatever kernels there are; None if it need not."""
    return next(_layer_reasons(moe, shape, family, swiglu), None)


def activation_flag(config: VllmConfig) -> Any:
    """What --quantization-config.moe.activation asks for, by vLLM's name; None: not given."""
    asked = getattr(getattr(config.model_config, "quantization_config", None), "moe", None)
    key = getattr(asked, "activation", None)
    names = getattr(quantization, "QUANT_KEY_NAMES", {}).items()
    return next((name for name, known in names if known == key), key)


def requantised_decline_reason(quant_config: Any, layer: RoutedExperts, prefix: str) -> str | None:
    """Why a layer stays stock whose experts vLLM would quantise anew, whatever method runs them."""
    online = getattr(quant_config, "online_quantization_config", None)
    if online is None or online.resolve_quant_method_cls(type(layer), prefix) is None:
        return None
    return (
        "--quantization-config asks for experts quantised anew; leave them out of its moe and "
        "targets"
    )


def declared_decline_reason(layer: RoutedExperts, hf_text_config: Any) -> str | None:
    """Why a layer stays stock by what its model says, of which its config in vLLM knows nothing."""
    if getattr(layer, "apply_router_weight_on_input", False):
        return "it weights the experts' output, and this model wants their input weighted"
    # Ling-3's. Its layers name the limit alone, as DeepSeek-V4's do, which clamp before SiLU.
    limit = getattr(layer, "swiglu_limit", None)
    if limit and config_get(hf_text_config, "expert_swiglu_limit_list"):
        return (
            f"the model clamps to {limit} after SiLU (expert_swiglu_limit_list), and it clamps "
            "before; serve this model with stock vLLM"
        )
    return None


def quantised_activations(dtype: str) -> str:
    """The reason where stock vLLM may quantise the activations as a checkpoint declares.

    Of Quark's it does so where amd-quark is installed, and where it is not runs BF16 or stops.
    """
    return (
        f"the checkpoint declares {dtype} activations for its experts in a form that it does not "
        "have; serve a weight-only checkpoint (W4A16), or this one with stock vLLM"
    )


def lora_decline_reason(config: VllmConfig, quant_config: Any, prefix: str) -> str | None:
    """Why a layer stays stock for LoRA's sake. vLLM replaces every layer that an adapter may
    change, whether one does or not, by one that needs experts to compute with adapters.
    """
    if config.lora_config is None:
        return None
    targets = config.lora_config.target_modules
    if targets is None:
        return (
            "with --enable-lora any adapter may change the experts, and it runs none there; name "
            "the modules that yours change with --lora-target-modules, without experts"
        )
    packed = getattr(quant_config, "packed_modules_mapping", {})
    named = [t for t in targets if is_in_target_modules(prefix, [t], packed) or "experts" in t]
    if not named:
        return None
    return (
        f"--lora-target-modules {' '.join(sorted(named))} lets adapters change the experts, and it "
        "runs none there; leave that out"
    )


def _server_reasons(config: VllmConfig) -> Iterator[str]:
    offload = getattr(config, "offload_config", None)
    if offload and (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size):
        yield (
            "offloading exchanges the experts' weights behind the kernels' back; drop "
            "--cpu-offload-gb and --offload-group-size"
        )
    if config.parallel_config.enable_elastic_ep:
        yield "elastic EP would build the experts anew without weights; drop --enable-elastic-ep"
    name = activation_flag(config)
    if name is not None and name not in ACTIVATION_NAMES:
        yield (
            f"{ACTIVATION_FLAG} asks for {name}, and it has BF16 activations and "
            f"{', '.join(ACTIVATION_NAMES)}; drop it, or ask for that"
        )
    for name in PRECISION_VARIABLES:
        if value := getattr(vllm.envs, name, None):
            yield (
                f"{name}={value} asks for activations of that precision, which is for vLLM's own "
                f"kernels; unset it, and set {env.ACTIVATIONS.name} where that is what you want"
            )


def _layer_reasons(
    moe: FusedMoEConfig, shape: LayerShape, family: CheckpointFamily, swiglu: SwiGLU
) -> Iterator[str]:
    parallel = moe.moe_parallel_config
    if moe.in_dtype != torch.bfloat16:
        yield f"it computes in bfloat16, and the model in {moe.in_dtype}; pass --dtype bfloat16"
    if getattr(moe, "moe_backend", "auto") != "auto":
        yield f"--moe-backend {moe.moe_backend} asks for another kernel; drop one of the two flags"
    if SWIGLU_OF.get(moe.activation) != (swiglu.alpha, swiglu.beta):
        yield (
            f"the layer's activation is {moe.activation}, and family {family.name} has {swiglu}; "
            "report this with the model's name"
        )
    if moe.has_bias != family.bias:
        yield (
            f"the layer has {'a' if moe.has_bias else 'no'} bias, and family {family.name} has "
            f"{'one' if family.bias else 'none'}; report this with the model's name"
        )
    for backend in ("passthrough_all2all", "moonep_kernels"):
        if getattr(parallel, f"use_{backend}", False):
            yield (
                f"--all2all-backend {parallel.all2all_backend} wants experts that send tokens, or "
                "keep copies of weights, themselves; choose another"
            )
    if shape.hidden_size % BLOCK:
        yield (
            f"hidden size {shape.hidden_size} is no multiple of {BLOCK}, as a scale covers so many"
        )
    if shape.intermediate_size % BLOCK:
        yield (
            f"tensor parallelism leaves a rank {shape.intermediate_size} columns of an expert, no "
            f"multiple of {BLOCK}, as a scale covers so many; choose a smaller "
            "--tensor-parallel-size or --enable-expert-parallel"
        )
