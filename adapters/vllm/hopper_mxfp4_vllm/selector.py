"""The light half, imported by every vLLM process: which checkpoints are ours. The rest waits in moe.py."""

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, env

NAME = "hopper_mxfp4"
# quant_method as the checkpoint says it, and as vLLM rewrites it
METHODS = {
    "mxfp4": GPT_OSS,
    "gpt_oss_mxfp4": GPT_OSS,
    "fp8": DEEPSEEK_V4,
    "deepseek_v4_fp8": DEEPSEEK_V4,
}


class Selector(QuantizationConfig):
    """Registered under NAME; hands out the config that does the work. Never instantiated itself."""

    def __init__(self) -> None:
        raise ValueError(
            f"--quantization {NAME} needs an MXFP4 checkpoint of GPT-OSS or DeepSeek-V4, and this one is not quantised; drop it"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """vLLM asks every registered name about every quantised checkpoint; NAME claims it, None leaves it."""
        wanted = user_quant == NAME or (user_quant is None and env.MODE.read() in ("auto", "on"))
        if not wanted:
            return None
        method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, dict) else None
        model_type = getattr(hf_config, "model_type", None)
        family = METHODS.get(method)
        if family is not None and model_type in family.model_types:
            return NAME
        if user_quant == NAME:
            # vLLM would go on with its stock method and not say so.
            raise ValueError(
                f"--quantization {NAME} serves MXFP4 checkpoints of GPT-OSS and DeepSeek-V4; this one is {model_type!r} with "
                f"quant_method {method!r}: drop the flag to serve it with stock vLLM"
            )
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        from .moe import CONFIGS

        return CONFIGS[METHODS[config["quant_method"]].name].from_config(config)

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        import torch

        return [torch.bfloat16]

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> None:
        raise NotImplementedError  # abstract in vLLM; there is never an instance
