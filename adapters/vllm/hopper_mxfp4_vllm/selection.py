"""Which checkpoints are ours, and how the server was asked for.

Every vLLM process imports this, so it is light: layer.py and all behind it waits until asked for.
"""

from dataclasses import asdict, dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from hopper_mxfp4 import CheckpointFamily, env
from hopper_mxfp4.registry import config_get, families

NAME = "hopper_mxfp4"
# vLLM only shows loggers below its own.
logger = init_logger("vllm.hopper_mxfp4")

# vLLM's own config that reads a checkpoint, by what the checkpoint calls its quantisation and by
# its family's name, or else the order of the family's rows: vLLM's loaders know each order in one
# format. None: vLLM's model for that family can't work with that config.
CONTAINERS: dict[tuple[str, str], str | None] = {
    ("mxfp4", "interleaved"): "gpt_oss_mxfp4",
    ("gpt_oss_mxfp4", "interleaved"): "gpt_oss_mxfp4",  # as vLLM rewrites it
    ("mxfp4", "gate_up"): "mxfp4",
    ("mxfp4", "deepseek_v4"): None,
    ("fp8", "deepseek_v4"): "deepseek_v4_fp8",
    ("deepseek_v4_fp8", "deepseek_v4"): "deepseek_v4_fp8",  # as vLLM rewrites it
    ("fp8 storing mxfp4", "gate_up"): "fp8",
}
# Draft heads whose model_type those of other checkpoints have too: ours if their target is, which
# hands its own name on to them.
DRAFTS = frozenset({"deepseek_mtp"})


class NotOurs(ValueError):
    """A checkpoint that nobody promised to take over."""


@dataclass(frozen=True)
class Order:
    """How a server was asked for, decided where its arguments are parsed.

    It travels with the checkpoint's config, because not every process of a server sees the same
    environment: Ray hands on vLLM's variables and not ours.

    reads: vLLM's own config that reads the checkpoint.
    auto: a layer that can't be taken over stays stock, instead of stopping the start.
    """

    reads: str = ""
    auto: bool = False
    kernel: str = "auto"
    deterministic: bool = False
    batch_invariant: bool = False


def family_of(hf_config: Any) -> CheckpointFamily | None:
    """The registered family that claims the config's model_type, if any."""
    model_type = config_get(hf_config, "model_type")
    known = families().values()
    return next((family for family in known if model_type in family.model_types), None)


def reader(quant_cfg: Any, family: CheckpointFamily | None) -> str | None:
    """The name of vLLM's own config that reads such a checkpoint; None if it is not for us."""
    if family is None:
        return None
    said, store = (config_get(quant_cfg, name) for name in ("quant_method", "store_dtype"))
    container = f"{said} storing {store}" if store else str(said)
    every = CONTAINERS.get((container, family.rows))
    return CONTAINERS.get((container, family.name), every)


def take_order(quant_cfg: Any, user_quant: str | None, hf_config: Any, mode: str) -> Order:
    """What to do with a checkpoint. Raises NotOurs, or anything else that says why not."""
    model_type, said = (
        config_get(hf_config, "model_type"),
        config_get(quant_cfg, "quant_method"),
    )
    reads = reader(quant_cfg, family_of(hf_config))
    if reads is None or (model_type in DRAFTS and user_quant != NAME):
        raise NotOurs(
            f"--quantization {NAME} serves MXFP4 checkpoints of {', '.join(families())}; this one "
            f"is {model_type!r} with quant_method {said!r}: drop the flag to serve it with stock "
            "vLLM"
        )
    # Names that only say what the checkpoint is ask for nobody else's kernel.
    if user_quant not in (None, NAME, said, reads):
        raise ValueError(
            f"--quantization {user_quant} asks for another way to run it; drop that flag or unset "
            f"{env.MODE.name}"
        )
    from .layer import CONFIGS  # imports all that this package uses of vLLM: it must be there

    if reads not in CONFIGS:
        raise ValueError(f"no config of this package reads {reads}; report this")
    return Order(
        reads,
        mode == "auto",
        env.KERNEL.read(),
        env.DETERMINISTIC.enabled(),
        env.BATCH_INVARIANT.enabled(),
    )


def leave_note(hf_config: Any, order: Order) -> None:
    """Put the order where vLLM reads the quantisation, for `from_config` in whatever process."""
    for config in (hf_config, config_get(hf_config, "text_config")):
        stored = config_get(config, "quantization_config")
        if isinstance(stored, dict):
            stored[NAME] = asdict(order)
            return
    raise ValueError(
        "the model's config has no quantization_config to read at the top or in text_config; "
        "report this with the model's name"
    )


class Selector(QuantizationConfig):
    """Registered under NAME; hands out the config that does the work. Never instantiated itself."""

    def __init__(self) -> None:
        raise ValueError(
            f"--quantization {NAME} needs an MXFP4 checkpoint of GPT-OSS or DeepSeek-V4, and this "
            "one is not quantised; drop it"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """NAME claims a checkpoint, None leaves it to vLLM, which asks every registered name."""
        mode = env.MODE.read()
        if user_quant != NAME and mode == "off":
            return None
        try:
            leave_note(hf_config, take_order(hf_quant_cfg, user_quant, hf_config, mode))
        except NotOurs:
            if user_quant == NAME:
                # vLLM would go on with its stock method and not say so.
                raise
            if config_get(hf_quant_cfg, "quant_method") == "mxfp4":
                logger.warning_once(
                    "hopper-mxfp4 leaves this MXFP4 checkpoint to stock vLLM: no registered "
                    "family has model_type %r in this format",
                    config_get(hf_config, "model_type"),
                )
            return None
        except Exception as error:  # a later vLLM may lack anything that layer.py builds on
            if mode != "auto":
                raise ValueError(
                    f"hopper-mxfp4 can't take over this checkpoint: {told(error)}, or set "
                    f"{env.MODE.name}=auto to stay with stock vLLM"
                ) from error
            logger.warning_once(
                "hopper-mxfp4 leaves this checkpoint to stock vLLM: %s", told(error)
            )
            return None
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        from .layer import CONFIGS

        order = Order(**config[NAME])
        found = CONFIGS[order.reads].from_config({k: v for k, v in config.items() if k != NAME})
        found.order = order
        return found

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


def told(error: Exception) -> str:
    """A reason of ours as it is; what nobody foresaw with its kind."""
    return str(error) if isinstance(error, ValueError) else repr(error)
