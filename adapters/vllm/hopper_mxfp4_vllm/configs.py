"""vLLM's config classes, whose routed experts are this package's: which layers, and how its
checkpoint declares them. Heavy to import.
"""

import inspect
import logging
from typing import Any

import torch
import vllm.envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import (
    GptOssMxfp4Config,
    Mxfp4Config,
    Mxfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.platforms import current_platform

from hopper_mxfp4 import (
    GENERIC,
    CheckpointFamily,
    SwiGLU,
    env,
)
from hopper_mxfp4.loading import activations_in_words, activations_to_run

from .experts import INTERLEAVED, SWIGLU_OF
from .layer import DeepseekV4Method, GptOssMethod, PackedMethod, PreparedMoEMethod
from .reasons import (
    ACTIVATION_FLAG,
    ACTIVATION_NAMES,
    Declined,
    activation_flag,
    declared_decline_reason,
    lora_decline_reason,
    quantised_activations,
    requantised_decline_reason,
    server_decline_reason,
    serving_kernel,
)
from .selection import Order, family_of, logger, told

# vLLM shows loggers below its own only: with this it shows the core's lines as well.
logging.getLogger("hopper_mxfp4").parent = logger


class TakeoverConfig:
    """Mixed into a stock config: the routed experts are ours, all else is the stock one's."""

    method: "type[PreparedMoEMethod]"
    order = Order()  # an instance made by the Selector has its own
    # Whether stock vLLM on Hopper runs 8-bit activations where the checkpoint declares such.
    stock_runs_them = False

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        """Of the activations that the checkpoint declares for the experts at this prefix.

        None where they are not MXFP4. Raises Declined where what this package has will not do.
        """
        return 16

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            try:
                bits = self.activation_bits(layer, prefix)
                if bits is not None:
                    return self.takeover(layer, prefix, bits)
            except Exception as error:  # `auto` stops no server, whatever a later vLLM lacks
                if not self.order.auto:
                    raise ValueError(
                        f"hopper-mxfp4 can't take over {prefix}: {told(error)}, or set "
                        f"{env.MODE.name}=auto to stay with stock vLLM"
                    ) from error
                logger.warning_once(
                    "hopper-mxfp4 leaves the MXFP4 MoE layers to stock vLLM: %s", told(error)
                )
        return super().get_quant_method(layer, prefix)  # type: ignore[misc]

    def stock_activations(self, bits: int, device: torch.device) -> str:
        """What vLLM would run there with declared activations of so many bits, as the core calls
        it.
        """
        return "fp8" if self.stock_runs_them and bits == 8 and device.type == "cuda" else "bf16"

    def takeover(self, layer: RoutedExperts, prefix: str, bits: int) -> "PreparedMoEMethod":
        """The method that runs the layer. Raises ValueError with the reason where it must not.

        bits: of the activations that the checkpoint declares.
        """
        config, moe = get_current_vllm_config(), layer.moe_config
        hf_config = config.model_config.hf_config
        family = family_of(hf_config) or GENERIC
        reason = (
            server_decline_reason(config)
            or lora_decline_reason(config, self, prefix)
            or requantised_decline_reason(self, layer, prefix)
            or declared_decline_reason(layer, config.model_config.hf_text_config)
        )
        if reason is not None:
            raise Declined(reason)
        swiglu = swiglu_of(layer, family, hf_config)
        invariant = self.order.batch_invariant or bool(vllm.envs.VLLM_BATCH_INVARIANT)
        deterministic = self.order.deterministic or invariant
        device = torch.device(current_platform.device_type)
        activations = activations_to_run(
            self.order.activations,
            ACTIVATION_NAMES.get(activation_flag(config)),
            ACTIVATION_FLAG,
            self.stock_activations(bits, device),
        )
        kernel = serving_kernel(
            moe,
            self.method.layer_shape(moe),
            family,
            swiglu,
            device,
            # This process's own variable, if it sees one, is the one that messages name.
            "auto" if env.KERNEL.read() != "auto" else self.order.kernel,
            deterministic,
            activations,
        )
        method = self.method(
            moe,
            family,
            swiglu,
            kernel,
            device,
            deterministic,
            invariant,
            activations,
        )
        logger.info_once(
            "hopper-mxfp4 takes over the MXFP4 MoE layers with kernel %s and %s; %s%s",
            kernel.name,
            swiglu,
            activations_in_words(activations, bits, "vLLM", self.stock_runs_them),
            "; batch invariant" if invariant else "",
        )
        return method


def swiglu_of(layer: RoutedExperts, family: CheckpointFamily, hf_config: Any) -> SwiGLU:
    """From the model's config; what vLLM's model told the layer, where it did, must be the same.

    The layer alone has the say where nobody registered the model's family.
    """
    if family is GENERIC:
        activation = layer.moe_config.activation
        named = SWIGLU_OF.get(activation) if activation not in INTERLEAVED else None
        # What has another name is declined by that name.
        alpha, beta = named or (family.alpha, family.beta)
        swiglu = SwiGLU(alpha, beta, getattr(layer, "swiglu_limit", None) or None)
    else:
        swiglu = family.swiglu(hf_config)
    ours = {"alpha": swiglu.alpha, "beta": swiglu.beta, "limit": swiglu.limit or 0.0}
    for name, value in ours.items():
        said = getattr(layer, f"swiglu_{name}", None)
        if said is not None and said != value:
            raise ValueError(
                f"the model's config has swiglu_{name} {value}, and vLLM's layer {said}; report "
                "this with the model's name"
            )
    return swiglu


class GptOssConfig(TakeoverConfig, GptOssMxfp4Config):
    """GPT-OSS checkpoints. Keeps the stock get_name(): vLLM's weight loader goes by it."""

    method = GptOssMethod


class PlainMxfp4Config(TakeoverConfig, Mxfp4Config):
    """Other checkpoints whose experts, and nothing else, are MXFP4."""

    method = DeepseekV4Method


class Fp8StoringMxfp4Config(TakeoverConfig, Fp8Config):
    """fp8 checkpoints whose experts are MXFP4: MiMo's, and Ling's, whose model says so later."""

    method = DeepseekV4Method

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        mode = getattr(self, "ignored_layers_match_mode", None)
        how = {} if mode is None else {"match_mode": mode}
        skipped = is_layer_skipped(prefix, self.ignored_layers, self.packed_modules_mapping, **how)
        return 8 if getattr(self, "store_dtype", None) == "mxfp4" and not skipped else None


# vLLM has a class of its own for each platform under this name; all are Fp8Configs.
class DeepseekV4Config(TakeoverConfig, get_quantization_config("deepseek_v4_fp8")):  # type: ignore[misc]
    """DeepSeek-V4 checkpoints: fp8 but for the routed experts, MXFP4 unless requantised."""

    method = DeepseekV4Method
    # vLLM before 0.32 knew of no such declaration and ran BF16 too.
    stock_runs_them = "activation_key" in inspect.signature(Mxfp4MoEMethod.__init__).parameters

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        if self.expert_dtype != "fp4" or is_layer_skipped(
            prefix, self.ignored_layers, self.packed_modules_mapping
        ):
            return None
        if hasattr(self, "_is_nvfp4_expert_layer"):
            nvfp4 = self._is_nvfp4_expert_layer(prefix)
        else:
            nvfp4 = getattr(self, "moe_quant_algo", None) == "NVFP4"
        return None if nvfp4 else 8


class CompressedTensorsConfig(TakeoverConfig, get_quantization_config("compressed-tensors")):  # type: ignore[misc]
    """What llm-compressor writes, with a scheme for each group of layers."""

    method = PackedMethod

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        self._add_fused_moe_to_target_scheme_map()  # vLLM's way to have "Linear" mean experts too
        projections = (
            layer.ckpt_gate_proj_name,
            layer.ckpt_up_proj_name,
            layer.ckpt_down_proj_name,
        )
        schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in projections]
        scheme = schemes[0]
        if scheme is None or any(other != scheme for other in schemes):
            return None
        weights, inputs = scheme["weights"], scheme["input_activations"]
        if not self._is_mxfp4(weights):
            return None
        # Before 0.32 vLLM ran BF16 whatever was declared; since then, all but this scheme.
        is_w4a8 = getattr(self, "_is_mxfp4_w4a8_fp8", None)
        if is_w4a8 is not None and is_w4a8(weights, inputs):
            raise Declined(quantised_activations("fp8"))
        return 16 if inputs is None else int(inputs.num_bits)


class QuarkConfig(TakeoverConfig, get_quantization_config("quark")):  # type: ignore[misc]
    """What AMD's Quark writes, with a scheme for each layer or for all."""

    method = DeepseekV4Method

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        ignored = self.quant_config.get("exclude")
        if should_ignore_layer(
            prefix, ignored, fused_mapping=self.packed_modules_mapping, check_children=True
        ):
            return None
        scheme = self._find_matched_config(prefix, layer)
        weights, inputs = (
            given[0] if isinstance(given, list) and len(given) == 1 else given
            for given in (scheme.get("weight"), scheme.get("input_tensors"))
        )
        wanted = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
        is_mxfp4 = isinstance(weights, dict) and wanted.items() <= weights.items()
        if not is_mxfp4 or scheme.get("output_tensors") or scheme.get("bias"):
            return None
        if inputs is not None:
            raise Declined(quantised_activations(inputs["dtype"]))
        return 16


class AutoRoundConfig(TakeoverConfig, get_quantization_config("inc")):  # type: ignore[misc]
    """What Intel's AutoRound writes, with a scheme for all layers and exceptions by name."""

    method = PackedMethod
    act_bits = 16

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AutoRoundConfig":
        found: AutoRoundConfig = super().from_config(config)
        found.act_bits = config.get("act_bits") or 16  # vLLM reads nothing of activations
        return found

    def activation_bits(self, layer: RoutedExperts, prefix: str) -> int | None:
        exceptions = self.extra_config or {}
        if any(
            exceptions.get(name, {"bits": 0}).get("bits", 16) >= 16
            for name in (prefix, f"model.{prefix}")
        ):
            return None
        scheme = self.config_parser.resolve(layer, prefix)
        return self.act_bits if scheme.quantized and scheme.is_mxfp4 else None


# By vLLM's name of the stock config behind each.
CONFIGS: dict[str, Any] = {
    "gpt_oss_mxfp4": GptOssConfig,
    "mxfp4": PlainMxfp4Config,
    "fp8": Fp8StoringMxfp4Config,
    "deepseek_v4_fp8": DeepseekV4Config,
    "compressed-tensors": CompressedTensorsConfig,
    "quark": QuarkConfig,
    "inc": AutoRoundConfig,
}
