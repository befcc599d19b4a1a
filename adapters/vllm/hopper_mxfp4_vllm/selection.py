"""Which checkpoints are ours, and how the server was asked for.

Every vLLM process imports this, so it is light: layer.py and all behind it waits until asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from hopper_mxfp4 import GENERIC, CheckpointFamily, env
from hopper_mxfp4.registry import config_get, families

NAME = "hopper_mxfp4"
# vLLM only shows loggers below its own.
logger = init_logger("vllm.hopper_mxfp4")


@dataclass(frozen=True)
class Declaration:
    """One way in which a checkpoint's config declares MXFP4 experts.

    quant_methods: what it calls its quantisation, and what vLLM rewrites that to.
    reads: vLLM's own config that reads it, by the family's name, or else by the order of the
        family's rows: vLLM's loaders know each order in one format. None: vLLM's model for that
        family can't work with that config.
    holds: whether its quantization_config holds MXFP4 experts.
    any_model: vLLM's layers say themselves which activation they have, so that GENERIC does for
        models of which nobody registered a family.
    """

    quant_methods: tuple[str, ...]
    reads: Mapping[str, str | None]
    holds: Callable[[Any], bool] = lambda quant_cfg: True
    any_model: bool = False


def _is_mxfp4(weights: Any) -> bool:
    """Whether compressed-tensors or Quark so describes weights of E2M1, 32 to a scale."""
    if isinstance(weights, list):  # Quark's, of one entry
        weights = weights[0] if len(weights) == 1 else None
    if not weights:
        return False
    kinds = (config_get(weights, "num_bits"), config_get(weights, "type"))
    is_e2m1 = kinds == (4, "float") or config_get(weights, "dtype") == "fp4"
    return is_e2m1 and config_get(weights, "group_size") == 32


def _compressed_tensors_holds(quant_cfg: Any) -> bool:
    groups = config_get(quant_cfg, "config_groups") or {}
    return any(_is_mxfp4(config_get(group, "weights")) for group in groups.values())


def _quark_holds(quant_cfg: Any) -> bool:
    parts = [config_get(quant_cfg, "global_quant_config")]
    for some in ("layer_quant_config", "layer_type_quant_config"):
        parts += (config_get(quant_cfg, some) or {}).values()
    return any(_is_mxfp4(config_get(part, "weight")) for part in parts if part)


def _auto_round_holds(quant_cfg: Any) -> bool:
    parts = [quant_cfg, *(config_get(quant_cfg, "extra_config") or {}).values()]
    is_mx = "mx_fp" in str(config_get(quant_cfg, "data_type"))
    return is_mx and any(config_get(part, "bits") == 4 for part in parts)


def _fp8_holds(quant_cfg: Any) -> bool:
    keys = ("store_dtype", "routed_experts_quant_method")  # MiMo's and Ling's
    return "mxfp4" in (config_get(quant_cfg, key) for key in keys)


DECLARATIONS = (
    Declaration(
        ("mxfp4", "gpt_oss_mxfp4"),
        {"interleaved": "gpt_oss_mxfp4", "gate_up": "mxfp4", "deepseek_v4": None},
    ),
    Declaration(("fp8", "deepseek_v4_fp8"), {"deepseek_v4": "deepseek_v4_fp8"}),
    Declaration(("fp8",), {"gate_up": "fp8"}, _fp8_holds, any_model=True),
    Declaration(
        ("compressed-tensors",),
        {"gate_up": "compressed-tensors"},
        _compressed_tensors_holds,
        any_model=True,
    ),
    Declaration(
        ("quark",), {"gate_up": "quark", "deepseek_v4": None}, _quark_holds, any_model=True
    ),
    Declaration(("auto-round", "inc"), {"gate_up": "inc"}, _auto_round_holds, any_model=True),
)
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
    activations: str = "auto"


def family_of(hf_config: Any) -> CheckpointFamily | None:
    """The registered family that claims the config's model_type, if any."""
    model_type = config_get(hf_config, "model_type")
    known = families().values()
    return next((family for family in known if model_type in family.model_types), None)


def reader(quant_cfg: Any, family: CheckpointFamily | None) -> str | None:
    """The name of vLLM's own config that reads such a checkpoint; None if it is not for us."""
    said = config_get(quant_cfg, "quant_method")
    for declaration in DECLARATIONS:
        of = family or (GENERIC if declaration.any_model else None)
        if of is None or said not in declaration.quant_methods or not declaration.holds(quant_cfg):
            continue
        reads = declaration.reads
        found = reads[of.name] if of.name in reads else reads.get(of.rows)
        if found is not None:
            return found
    return None


def take_order(quant_cfg: Any, user_quant: str | None, hf_config: Any, mode: str) -> Order:
    """What to do with a checkpoint. Raises NotOurs, or anything else that says why not."""
    model_type, said = (
        config_get(hf_config, "model_type"),
        config_get(quant_cfg, "quant_method"),
    )
    reads = reader(quant_cfg, family_of(hf_config))
    if reads is None or (model_type in DRAFTS and user_quant != NAME):
        raise NotOurs(
            f"--quantization {NAME} serves MXFP4 checkpoints of {', '.join(families())}, and those "
            "of other models with MXFP4 experts that compressed-tensors, quark, auto-round or fp8 "
            f"declares; this one is {model_type!r} with quant_method {said!r}: drop the flag to "
            "serve it with stock vLLM"
        )
    # Names that only say what the checkpoint is ask for nobody else's kernel.
    if user_quant not in (None, NAME, said, reads):
        raise ValueError(
            f"--quantization {user_quant} asks for another way to run it; drop that flag or unset "
            f"{env.MODE.name}"
        )
    from .configs import CONFIGS  # imports all that this package uses of vLLM: it must be there

    if reads not in CONFIGS:
        raise ValueError(f"no config of this package reads {reads}; report this")
    return Order(
        reads,
        mode == "auto",
        env.KERNEL.read(),
        env.DETERMINISTIC.enabled(),
        env.BATCH_INVARIANT.enabled(),
        env.ACTIVATIONS.read(),
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
            f"--quantization {NAME} needs a checkpoint with MXFP4 experts, and this one is not "
            "quantised; drop it"
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
        from .configs import CONFIGS

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
