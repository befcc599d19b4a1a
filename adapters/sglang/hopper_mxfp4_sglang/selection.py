"""Which checkpoints are ours, and what the server was asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.compressed_tensors.utils import should_ignore_layer
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.server_args import ServerArgs

from hopper_mxfp4 import GENERIC, CheckpointFamily, LayerShape, SwiGLU, family_for
from hopper_mxfp4.loading import round_up
from hopper_mxfp4.plugin import BLOCK

try:
    from sglang.srt import runtime_context
    from sglang.srt.runtime_context import get_server_args
except ImportError:  # up to 0.5.13
    from sglang.srt.server_args import get_global_server_args as get_server_args

    runtime_context = None

NAME = "hopper_mxfp4"


@dataclasses.dataclass(frozen=True)
class Container:
    """How SGLang reads one kind of MXFP4 checkpoint. The family says whose experts lie in it.

    name: SGLang's, of the quantisation.
    parameters: by what names its loaders find a layer's tensors.
    weight_dtype, scale_dtype: the checkpoint's, since the loaders copy by value.
    rows: the orders of w13's rows that the loaders can bring about.
    any_model: SGLang's layers say themselves which activation they have, and the loaders take the
        experts' projections one by one, so that GENERIC does for models of which nobody registered
        a family.
    other_names: what some models' loaders look for instead of a name in parameters.
    """

    name: str
    parameters: Mapping[str, str]
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype
    rows: frozenset[str]
    any_model: bool = False
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


_WEIGHTS = {
    "w13": "w13_weight",
    "w2": "w2_weight",
    "w13_bias": "w13_weight_bias",
    "w2_bias": "w2_weight_bias",
}
MXFP4 = Container(
    "mxfp4",
    _WEIGHTS | {"w13_scale": "w13_weight_scale", "w2_scale": "w2_weight_scale"},
    torch.uint8,
    torch.uint8,
    frozenset(("interleaved", "gate_up")),
)
FP8 = Container(  # fp8 linear layers, MXFP4 experts
    "fp8",
    _WEIGHTS | {"w13_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"},
    torch.int8,
    torch.float8_e8m0fnu,
    frozenset(("gate_up",)),  # expert by expert: gate into the first half, up into the second
    any_model=True,
)
COMPRESSED_TENSORS = Container(
    "compressed-tensors",
    MXFP4.parameters,
    torch.uint8,
    torch.uint8,
    FP8.rows,
    any_model=True,
    # The checkpoint says weight_packed. Some models strip that, most look for the name as it is.
    other_names={"w13": "w13_weight_packed", "w2": "w2_weight_packed"},
)


class Model(NamedTuple):
    """What SGLang's loader knows of the model whose quantisation it makes."""

    configs: tuple[Any, ...]  # Hugging Face's, the whole model's first
    is_draft: bool


class Checkpoint(NamedTuple):
    """What a layer's MXFP4 experts are."""

    container: Container
    family: CheckpointFamily
    swiglu: SwiGLU
    is_draft: bool
    activation_bits: int  # that the checkpoint declares


# The model that SGLang's loader has begun last; a model may make its experts' quantisation itself.
latest_model: Model | None = None


def remember_model(quant_config: Any, model: Model) -> None:
    """Keep with a model's quantisation, which SGLang's loader has made, which model that is."""
    global latest_model
    latest_model = model
    if quant_config is not None:
        quant_config.hopper_mxfp4_model = model


def container_of(config: Any, stock: Any, prefix: str) -> Container | None:
    """How SGLang reads the MXFP4 experts that the stock method would serve.

    None if they are none.
    """
    if isinstance(config, CompressedTensorsConfig):
        one = f"{prefix}.0.gate_proj"  # SGLang asks for the whole checkpoint, not for this layer
        left_out = should_ignore_layer(one, config.ignore, config.packed_modules_mapping)
        mxfp4 = isinstance(stock, Mxfp4MoEMethod) and not left_out
        return COMPRESSED_TENSORS if mxfp4 else None
    if isinstance(stock, Mxfp4MoEMethod) and config.is_static_cfg():
        return MXFP4
    if (
        not isinstance(config, Fp8Config)
        or isinstance(stock, UnquantizedFusedMoEMethod)
        or getattr(config, "dequant_fp4_to_fp8", False)
    ):
        return None
    return FP8 if getattr(config, "is_fp4_experts", False) else None


def checkpoint_of(container: Container, config: Any, layer: FusedMoE) -> Checkpoint:
    """Whose experts they are: the registry's answer for the model.

    Raises ValueError if nobody knows it and the layer does not say enough.
    """
    model = getattr(config, "hopper_mxfp4_model", None) or latest_model
    if model is None:
        raise ValueError(
            "SGLang's loader did not say which model this is; load it by SGLang's own loader, "
            "after hopper_mxfp4_sglang.install()"
        )
    refused = []
    for hf_config in model.configs:
        try:
            family = family_for(hf_config)
        except ValueError as unknown:
            refused.append(unknown)
            continue
        swiglu = family.swiglu(hf_config)
        break
    else:
        if not container.any_model:
            raise refused[0]
        family, swiglu = GENERIC, swiglu_of(layer.moe_runner_config)
    return Checkpoint(container, family, swiglu, model.is_draft, activation_bits(config))


def activation_bits(config: Any) -> int:
    """Of the activations that a checkpoint declares for its MXFP4 experts, 16 if none."""
    if isinstance(config, CompressedTensorsConfig):
        # As the checkpoint has them: SGLang drops the activations of formats that it runs in BF16.
        groups = (config.config or {}).get("config_groups", {}).values()
        fp4 = [g for g in groups if g["weights"]["num_bits"] == 4]
        declared = (group.get("input_activations") for group in fp4)
        return min((given["num_bits"] for given in declared if given), default=16)
    # fp8's scheme is for all that the checkpoint has, its MXFP4 experts too
    return 16 if getattr(config, "activation_scheme", None) is None else 8


def swiglu_of(config: Any) -> SwiGLU:
    """The activation that SGLang's model gave its layer, read as SGLang's own kernels read it."""
    alpha, beta = config.gemm1_alpha, getattr(config, "gemm1_beta", None)
    limit = config.swiglu_limit if config.gemm1_clamp_limit is None else config.gemm1_clamp_limit
    if alpha is None:
        return SwiGLU(limit=limit or None)
    return SwiGLU(alpha, 1.0 if beta is None else beta, limit)


def layer_shape(layer: FusedMoE, checkpoint: Checkpoint) -> LayerShape:
    """What this rank's loader fills.

    Interleaved rows come through GPT-OSS's, which cuts shards in whole blocks of 32 (2880 over 4
    ranks: 736, 736, 736, 672).
    """
    config = layer.moe_runner_config
    hidden = getattr(layer, "hidden_size_unpadded", config.hidden_size)
    intermediate = config.intermediate_size_per_partition
    if checkpoint.family.rows == "interleaved":
        intermediate = round_up(intermediate, BLOCK)
    return LayerShape(layer.num_local_experts, hidden, intermediate)


def setting(name: str, default: Any = None) -> Any:
    """A server option as SGLang resolved it, which may be more than the user gave.

    The default where this SGLang has no such option.
    """
    context: Any = runtime_context and getattr(runtime_context, "get_context", lambda: None)()
    if hasattr(context, "config_leaf"):  # others write what they resolve over what was given
        try:
            return context.config_leaf(name)
        except (ValueError, AttributeError):
            pass  # no such option, or one that nothing resolves
    return getattr(get_server_args(), name, default)


def batch_invariant() -> bool | None:
    """Whether a token's bytes must not depend on its batch; None: what our variables say."""
    return True if setting("enable_deterministic_inference", False) else None


BACKENDS = ("moe_runner_backend", "speculative_moe_runner_backend")
_GIVEN = "_hopper_mxfp4_given"


def remember_backends(args: Any) -> None:
    """Keep which backends the user gave, before SGLang writes those it resolves over them.

    An attribute of the arguments travels with them to the processes that SGLang starts.
    """
    setattr(args, _GIVEN, {name: getattr(args, name, None) for name in BACKENDS})


def asked_backend(is_draft: bool) -> str | None:
    """The option by which the user asked for another kernel than ours, with its value.

    None if SGLang is to choose.
    """
    args = get_server_args()
    given = getattr(args, _GIVEN, None)
    if given is None:
        # Newer ones keep what was given; of older ones made before us nothing is known.
        keeps = not dataclasses.is_dataclass(ServerArgs)
        given = {name: getattr(args, name, None) for name in BACKENDS} if keeps else {}
    own, draft = (given.get(name) for name in BACKENDS)
    value, option = (draft, "speculative-moe") if is_draft and draft else (own, "moe")
    return None if value in (None, "auto", NAME) else f"--{option}-runner-backend {value}"
