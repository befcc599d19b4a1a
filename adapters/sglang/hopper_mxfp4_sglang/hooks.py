"""What runs around SGLang's own functions, and the name that it gets among SGLang's backends."""

import dataclasses
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from sglang.srt.model_loader import loader as model_loader
from sglang.srt.server_args import ServerArgs

from hopper_mxfp4 import env
from hopper_mxfp4.registry import config_get

from . import selection
from .layer import MoEMethod, take_over
from .reasons import Declined, asked_activations, decline, serving_kernel, stop
from .selection import NAME, Model, batch_invariant, checkpoint_of, container_of

logger = logging.getLogger(__name__)

Hook = Callable[..., Any]
# SGLang's configs of checkpoints that may hold MXFP4 experts. An SGLang that reads none of
# compressed-tensors' (0.5.12) gives no method for such experts, and the hook nothing either.
HOLDERS = (Mxfp4Config, Fp8Config, CompressedTensorsConfig)


def choose_method(
    stock: Any, config: Any, layer: torch.nn.Module, prefix: str = ""
) -> MoEMethod | None:
    """After get_quant_method of each config in HOLDERS: our method for MXFP4 experts.

    None keeps the stock one.
    """
    if not isinstance(layer, FusedMoE):
        return None
    flag = get_moe_runner_backend().value == NAME
    if not flag and env.MODE.read() == "off":
        return None
    try:
        method = method_for(stock, config, layer, prefix, flag)
    except Exception as error:  # SGLang has changed, or a plugin's family is wrong
        logger.debug("why hopper-mxfp4 could not decide", exc_info=True)
        method = f"deciding failed with {type(error).__name__}: {error}; please report it"
    if isinstance(method, str):
        decline(method, prefix, flag)
        return None
    return method


def method_for(
    stock: Any, config: Any, layer: FusedMoE, prefix: str, flag: bool
) -> MoEMethod | str | None:
    """Our method for a layer, or why it stays stock; None if it is none of our business."""
    container = container_of(config, stock, prefix)
    if container is None:
        return "its experts are not MXFP4 ones" if flag else None
    try:
        checkpoint = checkpoint_of(container, config, layer)
    except ValueError as unknown:
        return str(unknown)
    device, invariant = torch.get_default_device(), batch_invariant()
    try:
        activations = asked_activations()
        kernel = serving_kernel(layer, checkpoint, device, invariant, activations)
    except Declined as declined:
        return str(declined)
    return take_over(layer, checkpoint, kernel, device, invariant, activations)


def remember_model(result: Any, model_config: Any, *_: Any, **__: Any) -> None:
    """After SGLang's loader made a model's quantisation: remember which model that is.

    And say, or stop, where another --quantization keeps MXFP4 experts from us.
    """
    hf_config = getattr(model_config, "hf_config", None)
    configs = (hf_config, getattr(model_config, "hf_text_config", hf_config))
    holds_experts = isinstance(result, HOLDERS)
    selection.remember_model(
        result if holds_experts else None,
        Model(configs, getattr(model_config, "is_draft_model", False)),
    )
    if holds_experts:
        return
    declared = config_get(getattr(hf_config, "quantization_config", None) or {}, "quant_method")
    holds_mxfp4 = declared == "mxfp4" or getattr(model_config, "is_fp4_experts", False)
    if result is not None and holds_mxfp4 and env.MODE.read() != "off":
        decline(
            f"--quantization {result.get_name()} gives its MXFP4 experts to another kernel; drop "
            "it",
            "the model",
            flag=False,
        )


def remember_backends(args: Any, *_: Any, **__: Any) -> None:
    """Before ServerArgs.__post_init__ of an SGLang that may write over what the user gave."""
    selection.remember_backends(args)


def want_standard_topk(_: None, block: Any, *args: Any, **kwargs: Any) -> None:
    """After GptOssSparseMoeBlock.__init__ up to 0.5.22.

    There the router follows the server's backend instead of the layer's.
    """
    if isinstance(block.experts.quant_method, MoEMethod):
        block.topk.topk_config.output_format = TopKOutputFormat.STANDARD


def prepare_updated(_: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    """After a weight update of SGLang up to 0.5.20, which leaves the layers as loaded."""
    model = updater.get_model() if hasattr(updater, "get_model") else updater.model
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MoEMethod):
            method.process_weights_after_loading(module)


BEFORE: tuple[Hook, ...] = (remember_backends,)  # its function; all others run after theirs


def hooks() -> dict[str, Hook]:
    """What runs around which function of this SGLang, by the function's name."""
    found: dict[str, Hook] = {
        f"{c.__module__}.{c.__name__}.get_quant_method": choose_method for c in HOLDERS
    }
    found[f"{model_loader.__name__}._get_quantization_config"] = remember_model
    server_args = f"{ServerArgs.__module__}.{ServerArgs.__name__}"
    if dataclasses.is_dataclass(ServerArgs):
        found[f"{server_args}.__post_init__"] = remember_backends
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
    """Make --moe-runner-backend hopper_mxfp4 a choice.

    False where SGLang has no way to, up to 0.5.18.
    """
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
                f"--moe-runner-backend {NAME} serves MXFP4 experts, and this model has others; "
                "drop it"
            )

        register_moe_runner_core(NAME, refuse)
        add_moe_runner_backend_choices([NAME])
    return True
