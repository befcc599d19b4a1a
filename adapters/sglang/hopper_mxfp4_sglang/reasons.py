"""Why a layer stays stock, and what a user has to change, each in a sentence."""

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any, NoReturn

import torch
from sglang.srt.layers.moe import utils
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import (
    get_moe_a2a_backend,
    get_moe_runner_backend,
    is_sbo_enabled,
    is_tbo_enabled,
)
from sglang.srt.lora.utils import get_normalized_target_modules

from hopper_mxfp4 import GENERIC, KernelUnavailable, env
from hopper_mxfp4.loading import activations_to_run
from hopper_mxfp4.plugin import BLOCK, Kernel, choose_kernel

from .selection import MXFP4, NAME, Checkpoint, asked_backend, layer_shape, setting, swiglu_of

logger = logging.getLogger(__name__)

PRECISION = "flashinfer_mxfp4_moe_precision"  # SGLang's option: default, bf16 or fp8
# Server options that put something between the layer and its method, or its memory elsewhere: each
# with the values that don't, and with what to say of the others.
OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
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

declined: set[str] = set()  # reasons that this process has logged


class Declined(ValueError):
    """A layer that can't be taken over; the message says why and what to change."""


def asked_activations() -> str:
    """Of the core's ACTIVATIONS, what the server runs with. Stock SGLang runs BF16 unasked.

    Raises Declined where what was asked contradicts itself.
    """
    flag, precision = "--flashinfer-mxfp4-moe-precision", setting(PRECISION, "default")
    by_flag = None if precision == "default" else precision
    try:
        return activations_to_run(env.ACTIVATIONS.read(), by_flag, f"{flag} {precision}", "bf16")
    except ValueError as contradiction:
        raise Declined(str(contradiction)) from contradiction


def serving_kernel(
    layer: FusedMoE,
    checkpoint: Checkpoint,
    device: torch.device,
    deterministic: bool | None,
    activations: str = "bf16",
) -> Kernel:
    """The kernel that runs a layer. Raises Declined where it stays with stock SGLang.

    deterministic, activations: as in `choose_kernel`.
    """
    reason = layer_decline_reason(layer, checkpoint, device)
    if reason is not None:
        raise Declined(reason)
    try:
        shape = layer_shape(layer, checkpoint)
        return choose_kernel(
            "auto", shape, device, deterministic=deterministic, activations=activations
        )
    except (KernelUnavailable, ValueError) as unavailable:
        raise Declined(str(unavailable)) from unavailable


def layer_decline_reason(
    layer: FusedMoE, checkpoint: Checkpoint, device: torch.device
) -> str | None:
    """Why a layer stays stock, whatever kernels there are; None if it need not."""
    reasons = chain(_server_reasons(checkpoint), _layer_reasons(layer, checkpoint, device))
    return next(reasons, None)


def _server_reasons(checkpoint: Checkpoint) -> Iterator[str]:
    asked = asked_backend(checkpoint.is_draft)
    if asked is not None:
        yield f"{asked} asks for another kernel; drop it"
    for option, neutral, reason in OPTIONS:
        if setting(option, neutral[0]) not in neutral:
            yield reason
    yield from _adapter_reasons()
    yield from _all_to_all_reasons()


def _adapter_reasons() -> Iterator[str]:
    """SGLang gives the experts to its own LoRA kernels where adapters may change them, as a whole:
    gate, up and down.
    """
    if not (setting("enable_lora") or setting("lora_paths")):
        return
    named = setting("lora_target_modules")
    if not named:
        yield (
            "with LoRA adapters may change the experts, and it runs none there; name the modules "
            "that yours change with --lora-target-modules, without the experts' gate, up and down"
        )
        return
    targets = get_normalized_target_modules(named)
    if "all" in targets or "experts" in targets or targets >= {"gate_up_proj", "down_proj"}:
        yield (
            f"--lora-target-modules {' '.join(sorted(named))} lets adapters change the experts, "
            "and it runs none there; leave out gate_proj and up_proj, or down_proj"
        )


def _all_to_all_reasons() -> Iterator[str]:
    backend = get_moe_a2a_backend()
    if backend.is_deepep():
        sent = setting("deepep_dispatcher_output_dtype", "auto")
        if sent not in ("auto", "bf16"):
            yield (
                f"--deepep-dispatcher-output-dtype {sent} sends its tokens in another precision "
                "than the BF16 it runs; pass bf16"
            )
        if not hasattr(utils, "get_deepep_output_dtype"):  # up to 0.5.12
            yield "this SGLang's DeepEP sends experts 8-bit tokens; pass --moe-a2a-backend none"
    elif not backend.is_none():
        yield (
            "it takes tokens from no all-to-all but DeepEP, and --moe-a2a-backend is "
            f"{backend.value}; pass deepep or none"
        )
    elif is_tbo_enabled():
        yield (
            "two batches overlap with DeepEP only; drop --enable-two-batch-overlap, or "
            "pass --moe-a2a-backend deepep"
        )
    if is_sbo_enabled():
        yield (
            "its GEMMs give no signals by which a combine could overlap them; drop "
            "--enable-single-batch-overlap"
        )


def _layer_reasons(layer: FusedMoE, checkpoint: Checkpoint, device: torch.device) -> Iterator[str]:
    container, family = checkpoint.container, checkpoint.family
    config, shape = layer.moe_runner_config, layer_shape(layer, checkpoint)
    if config.params_dtype != torch.bfloat16:
        yield (
            f"it computes in bfloat16, and the model in {config.params_dtype}; pass "
            "--dtype bfloat16"
        )
    if config.activation != "silu" or not config.is_gated:
        yield (
            f"the activation is {config.activation}{'' if config.is_gated else ' without a gate'}, "
            f"and {family.name} has a gated silu"
        )
    if config.apply_router_weight_on_input or config.no_combine:
        yield (
            "it weights and sums the experts' outputs, and this model wants their inputs weighted "
            "or the outputs apart"
        )
    if config.num_fused_shared_experts:
        yield "shared experts are fused into the routed ones; drop --enforce-shared-experts-fusion"
    if config.gemm1_alpha is None and config.gemm1_clamp_limit is not None:
        yield (
            f"the model clamps to {config.gemm1_clamp_limit} after the activation (a "
            "gemm1_clamp_limit without gemm1_alpha), and it clamps before"
        )
    said = swiglu_of(config)
    if said != checkpoint.swiglu:
        yield f"SGLang's layer has {said}, and {family.name} {checkpoint.swiglu}"
    interleaved = getattr(config, "gate_up_interleaved", True)  # means GPT-OSS's kind of layer only
    if family.rows not in container.rows or (
        (container is MXFP4 or family is GENERIC)
        and config.gemm1_alpha is not None
        and interleaved != (family.rows == "interleaved")
    ):
        yield f"SGLang's layer has other rows of gate and up than {family.name}'s {family.rows}"
    if getattr(layer, "with_bias", family.bias) != family.bias:
        yield (
            f"SGLang's layer has {'no ' * family.bias}biases, and {family.name} "
            f"{'some' if family.bias else 'none'}"
        )
    if shape.intermediate_size % BLOCK or shape.hidden_size % BLOCK:
        yield (
            f"its shard of {shape.intermediate_size} x {shape.hidden_size} cuts blocks of {BLOCK}; "
            "choose another --tp-size"
        )
    backend = get_moe_runner_backend().value
    if (
        backend == "flashinfer_mxfp4"
        and container is MXFP4
        and not hasattr(layer, "hidden_size_unpadded")
    ):  # up to 0.5.18
        yield f"this SGLang pads the hidden size for --moe-runner-backend {backend}"
    if (
        backend == "triton_kernel"
        and container is not MXFP4
        and not hasattr(TopK, "bind_runner_backend")
    ):  # up to 0.5.22
        yield f"this SGLang transposes the weights for --moe-runner-backend {backend}"
    if device.type == "meta":
        yield "this --load-format makes a model without memory first; choose another"


def decline(reason: str, what: str, flag: bool) -> None:
    """Leave layers to stock SGLang and say so once.

    Where the user would have it ours or nothing, end the process instead.

    flag: whether the user named this package as the backend.
    """
    if flag or env.MODE.read() == "on":
        instead = f"drop --moe-runner-backend {NAME}" if flag else f"set {env.MODE.name}=auto"
        stop(
            f"hopper-mxfp4 can't take over {what}: {reason}, or {instead} to stay with stock SGLang"
        )
    if reason not in declined:
        declined.add(reason)
        logger.warning("hopper-mxfp4 leaves the MXFP4 MoE layers to stock SGLang: %s", reason)


def stop(reason: str) -> NoReturn:
    """End the process.

    SGLang swallows the exceptions of plugins, and this rank would go on with a stock kernel.
    """
    logger.error(reason)
    raise SystemExit(reason)
