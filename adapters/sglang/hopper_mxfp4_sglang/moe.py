"""The heavy half: SGLang's MoE method around the core's prepare_experts and fused_moe, and the hooks that put it in place."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

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
from sglang.srt.model_loader import loader as model_loader
from sglang.srt.server_args import ServerArgs

from hopper_mxfp4 import (
    CheckpointFamily,
    ExpertWeights,
    KernelUnavailable,
    LayerShape,
    PreparedExperts,
    SwiGLU,
    allocate_weights,
    choose_kernel,
    env,
    family_for,
    fused_moe,
    prepare_experts,
)
from hopper_mxfp4.arrange import NEUTRAL_SCALE, gate_and_up
from hopper_mxfp4.checkpoint.weights import expert_chunks, round_up
from hopper_mxfp4.contract import BLOCK
from hopper_mxfp4.registry import config_get

try:
    from sglang.srt import runtime_context
    from sglang.srt.runtime_context import get_parallel, get_server_args
except ImportError:  # up to 0.5.13
    from sglang.srt.distributed import get_tp_group
    from sglang.srt.server_args import get_global_server_args as get_server_args

    runtime_context = None
else:

    def get_tp_group() -> Any:
        return get_parallel().tp_group


logger = logging.getLogger(__name__)

NAME = "hopper_mxfp4"
Loader = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Container:
    """How SGLang reads one kind of MXFP4 checkpoint. Whose experts lie in it is the family's to say.

    name: SGLang's, of the quantisation.
    parameters: by what names its loaders find a layer's tensors.
    weight_dtype, scale_dtype: the checkpoint's, since the loaders copy by value.
    rows: the orders of w13's rows that the loaders can bring about.
    """

    name: str
    parameters: Mapping[str, str]
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype
    rows: frozenset[str]


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
)

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
    declares_8_bit: bool  # activations


def container_of(config: Any, stock: Any) -> Container | None:
    """How SGLang reads the MXFP4 experts that the stock method would serve; None if they are none."""
    if isinstance(stock, Mxfp4MoEMethod) and config.is_static_cfg():
        return MXFP4
    if (
        not isinstance(config, Fp8Config)
        or isinstance(stock, UnquantizedFusedMoEMethod)
        or getattr(config, "dequant_fp4_to_fp8", False)
    ):
        return None
    return FP8 if getattr(config, "is_fp4_experts", False) else None


def checkpoint_of(container: Container, config: Any) -> Checkpoint:
    """Whose experts they are: the registry's answer for the model. Raises ValueError if nobody knows it."""
    model = getattr(config, "hopper_mxfp4_model", None) or loading
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
        return Checkpoint(
            container,
            family,
            family.swiglu(hf_config),
            model.is_draft,
            # fp8's scheme is for all that the checkpoint has, its MXFP4 experts too
            declares_8_bit=getattr(config, "activation_scheme", None) is not None,
        )
    raise refused[0]


def layer_shape(layer: FusedMoE, checkpoint: Checkpoint) -> LayerShape:
    """What this rank's loader fills.

    Interleaved rows come through GPT-OSS's, which cuts shards in whole blocks of 32 (2880 over 4 ranks: 736, 736, 736, 672).
    """
    config = layer.moe_runner_config
    hidden = getattr(layer, "hidden_size_unpadded", config.hidden_size)
    intermediate = config.intermediate_size_per_partition
    if checkpoint.family.rows == "interleaved":
        intermediate = round_up(intermediate, BLOCK)
    return LayerShape(layer.num_local_experts, hidden, intermediate)


def setting(name: str, default: Any = None) -> Any:
    """A server option as SGLang resolved it, which may be more than the user gave; the default where this SGLang has none."""
    context = runtime_context and getattr(runtime_context, "get_context", lambda: None)()
    if hasattr(context, "config_leaf"):  # others write it over what was given
        try:
            return context.config_leaf(name)
        except (ValueError, AttributeError):
            pass  # no such option, or one that nothing resolves
    return getattr(get_server_args(), name, default)


BACKENDS = ("moe_runner_backend", "speculative_moe_runner_backend")
_GIVEN = "_hopper_mxfp4_given"


def remember_backends(args: Any, *_: Any, **__: Any) -> None:
    """Before ServerArgs.__post_init__ of an SGLang that may write what it resolves over what the user gave.

    An attribute of the arguments travels with them to the processes that SGLang starts.
    """
    setattr(args, _GIVEN, {name: getattr(args, name, None) for name in BACKENDS})


def asked_backend(is_draft: bool) -> str | None:
    """The option by which the user asked for another kernel than ours, with its value; None if SGLang is to choose."""
    args = get_server_args()
    given = getattr(args, _GIVEN, None)
    if (
        given is None
    ):  # newer ones keep what was given; of older ones made before us nothing is known
        keeps = not dataclasses.is_dataclass(ServerArgs)
        given = {name: getattr(args, name, None) for name in BACKENDS} if keeps else {}
    own, draft = (given.get(name) for name in BACKENDS)
    value, option = (draft, "speculative-moe") if is_draft and draft else (own, "moe")
    return None if value in (None, "auto", NAME) else f"--{option}-runner-backend {value}"


def swiglu_of(config: Any) -> SwiGLU:
    """What SGLang's model says of its layer's activation, read as SGLang's own kernels read it."""
    alpha, beta = config.gemm1_alpha, getattr(config, "gemm1_beta", None)
    limit = config.swiglu_limit if config.gemm1_clamp_limit is None else config.gemm1_clamp_limit
    if alpha is None:
        return SwiGLU(limit=limit or None)
    return SwiGLU(alpha, 1.0 if beta is None else beta, limit)


def why_not(layer: FusedMoE, checkpoint: Checkpoint) -> str | None:
    """Why a layer stays with stock SGLang and what to change, in a sentence; None if we take it."""
    container, family = checkpoint.container, checkpoint.family
    config, shape = layer.moe_runner_config, layer_shape(layer, checkpoint)
    asked = asked_backend(checkpoint.is_draft)
    if asked is not None:
        return f"{asked} asks for another kernel; drop it"
    precision = setting("flashinfer_mxfp4_moe_precision", "default")
    if precision not in ("default", "bf16"):
        return (
            f"--flashinfer-mxfp4-moe-precision {precision} asks for 8-bit activations, and it has "
            "none yet; pass bf16"
        )
    for option, neutral, reason in OPTIONS:
        if setting(option, neutral[0]) not in neutral:
            return reason
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
    if config.gemm1_alpha is None and config.gemm1_clamp_limit is not None:
        return (
            f"the model clamps to {config.gemm1_clamp_limit} after the activation (a "
            "gemm1_clamp_limit without gemm1_alpha), and it clamps before"
        )
    said = swiglu_of(config)
    if said != checkpoint.swiglu:
        return f"SGLang's layer has {said}, and {family.name} {checkpoint.swiglu}"
    interleaved = getattr(config, "gate_up_interleaved", True)  # means GPT-OSS's kind of layer only
    if family.rows not in container.rows or (
        container is MXFP4
        and config.gemm1_alpha is not None
        and interleaved != (family.rows == "interleaved")
    ):
        return f"SGLang's layer has other rows of gate and up than {family.name}'s {family.rows}"
    if getattr(layer, "with_bias", family.bias) != family.bias:
        return f"SGLang's layer has {'no ' * family.bias}biases, and {family.name} {'some' if family.bias else 'none'}"
    if shape.intermediate_size % BLOCK or shape.hidden_size % BLOCK:
        return f"its shard of {shape.intermediate_size} x {shape.hidden_size} cuts blocks of {BLOCK}; choose another --tp-size"
    backend = get_moe_runner_backend().value
    if (
        backend == "flashinfer_mxfp4"
        and container is MXFP4
        and not hasattr(layer, "hidden_size_unpadded")
    ):  # up to 0.5.18
        return f"this SGLang pads the hidden size for --moe-runner-backend {backend}"
    if (
        backend == "triton_kernel" and container is FP8 and not hasattr(TopK, "bind_runner_backend")
    ):  # up to 0.5.22
        return f"this SGLang transposes the weights for --moe-runner-backend {backend}"
    if torch.get_default_device().type == "meta":
        return "this --load-format makes a model without memory first; choose another"
    try:
        choose_kernel("auto", shape, torch.get_default_device(), deterministic=batch_invariant())
    except (KernelUnavailable, ValueError) as unavailable:
        return str(unavailable)
    return None


def batch_invariant() -> bool | None:
    """Whether a token's bytes must not depend on its batch; None: what this package's variables say."""
    return True if setting("enable_deterministic_inference", False) else None


class MoEMethod(FusedMoEMethodBase):
    """Owns a layer's parameters, which hold the checkpoint's bytes while weights are loaded and the kernel's otherwise."""

    runner = None  # a kernel called directly, on standard top-k output with local ids
    fuse_routed_scaling_factor_in_topk = True  # from 0.5.19 on; `apply` sees to it before

    def __init__(self, layer: FusedMoE, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.container, self.family = checkpoint.container, checkpoint.family
        self.shape = layer_shape(layer, checkpoint)
        self.swiglu = checkpoint.swiglu
        self.device = torch.get_default_device()
        self.batch_invariant = batch_invariant()
        self.kernel = choose_kernel(
            "auto", self.shape, self.device, deterministic=self.batch_invariant
        ).name
        self.prepared: PreparedExperts | None = None
        self.serving = False
        self.lock = threading.Lock()  # SGLang loads experts in parallel

    def create_weights(self, layer: FusedMoE, *, weight_loader: Loader, **attributes: Any) -> None:
        weights = allocate_weights(
            self.shape,
            family=self.family,
            device=self.device,
            kernel=self.kernel,
            weight_dtype=self.container.weight_dtype,
            scale_dtype=self.container.scale_dtype,
        )
        self.parameters = {
            name: self.container.parameters[name] for name in weights.tensors()
        }  # no biases where the family has none
        for name, tensor in weights.tensors().items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader(layer, name, weight_loader)
            if name.endswith("scale"):
                parameter.quant_method = "block"
            layer.register_parameter(self.parameters[name], parameter)

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
        columns = k // (BLOCK if is_scale else 2)

        def load(
            param: Any,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str | None,
            expert_id: int | None,
        ) -> None:
            self.restore_weights_before_loading(layer)
            if expert_id is None:
                # All of this rank's experts, into the corner of what must be empty, or of its halves.
                param.data.fill_(NEUTRAL_SCALE if is_scale else 0)
                whole = [(param.data, loaded_weight)]
                if name.startswith("w13") and self.family.rows == "gate_up":
                    halves = (gate_and_up(t, self.family.rows) for t in whole[0])
                    whole = list(zip(*halves, strict=True))
                for target, source in whole:
                    for part in expert_chunks(source):
                        # In chunks: copying from the CPU, torch brings all it is given to the GPU first.
                        piece = part_of(param, target[part])
                        loader(piece, source[part], weight_name, shard_id, expert_id)
                return
            if self.family.rows == "interleaved":
                raise ValueError(
                    f"{weight_name} came for expert {expert_id} alone, and SGLang's loader can't "
                    f"interleave {self.family.name}'s rows; serve this model with stock SGLang"
                )
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
                name: getattr(layer, parameter) for name, parameter in self.parameters.items()
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
                batch_invariant=self.batch_invariant,
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
                        getattr(layer, self.parameters[name]).data = tensor.view(
                            self.container.scale_dtype
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
loading: Model | None = None  # the latest; a model may make its experts' quantisation itself


def report(method: MoEMethod) -> None:
    """One line for a model, when its first layer is ready: then all of them have been made."""
    global reported
    if reported < taken:
        logger.info(
            "hopper-mxfp4 takes over %d MXFP4 MoE layers with kernel %s and %s; activations are BF16%s%s",
            taken - reported,
            method.kernel,
            method.swiglu,
            ", not the 8-bit ones that the checkpoint declares"
            if method.checkpoint.declares_8_bit
            else "",
            "; batch invariant" if method.prepared and method.prepared.batch_invariant else "",
        )
        reported = taken


def stop(reason: str) -> None:
    """End the process, since SGLang swallows exceptions of plugins and this rank would go on with a stock kernel."""
    logger.error(reason)
    raise SystemExit(reason)


def decline(reason: str, what: str, flag: bool) -> None:
    """Leave layers to stock SGLang, said once; or end the process where the user would have it ours or nothing."""
    if flag or env.MODE.read() == "on":
        instead = f"drop --moe-runner-backend {NAME}" if flag else f"set {env.MODE.name}=auto"
        stop(
            f"hopper-mxfp4 can't take over {what}: {reason}, or {instead} to stay with stock SGLang"
        )
    if reason not in declined:
        declined.add(reason)
        logger.warning("hopper-mxfp4 leaves the MXFP4 MoE layers to stock SGLang: %s", reason)


def method_for(stock: Any, config: Any, layer: FusedMoE, flag: bool) -> MoEMethod | str | None:
    """Our method for a layer, or why it stays stock; None if it is none of our business."""
    container = container_of(config, stock)
    if container is None:
        return "its experts are not MXFP4 ones" if flag else None
    try:
        checkpoint = checkpoint_of(container, config)
    except ValueError as unknown:
        return str(unknown)
    return why_not(layer, checkpoint) or MoEMethod(layer, checkpoint)


def choose_method(
    stock: Any, config: Any, layer: torch.nn.Module, prefix: str = ""
) -> MoEMethod | None:
    """After get_quant_method of Mxfp4Config and Fp8Config: our method for MXFP4 experts, None to keep the stock one."""
    global taken
    if not isinstance(layer, FusedMoE):
        return None
    flag = get_moe_runner_backend().value == NAME
    if not flag and env.MODE.read() == "off":
        return None
    try:
        method = method_for(stock, config, layer, flag)
    except Exception as error:  # SGLang has changed, or a plugin's family is wrong
        logger.debug("why hopper-mxfp4 could not decide", exc_info=True)
        method = f"deciding failed with {type(error).__name__}: {error}; please report it"
    if isinstance(method, str):
        decline(method, prefix, flag)
        return None
    if method is not None:
        taken += 1
    return method


def remember_model(result: Any, model_config: Any, *_: Any, **__: Any) -> None:
    """After SGLang's loader made a model's quantisation: keep with it which model that is.

    And say, or stop, where another --quantization keeps MXFP4 experts from us.
    """
    global loading
    hf_config = getattr(model_config, "hf_config", None)
    configs = (hf_config, getattr(model_config, "hf_text_config", hf_config))
    loading = Model(configs, getattr(model_config, "is_draft_model", False))
    if isinstance(result, Mxfp4Config | Fp8Config):
        result.hopper_mxfp4_model = loading
        return
    declared = config_get(getattr(hf_config, "quantization_config", None) or {}, "quant_method")
    holds_mxfp4 = declared == "mxfp4" or getattr(model_config, "is_fp4_experts", False)
    if result is not None and holds_mxfp4 and env.MODE.read() != "off":
        decline(
            f"--quantization {result.get_name()} gives its MXFP4 experts to another kernel; drop it",
            "the model",
            flag=False,
        )


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


BEFORE = (remember_backends,)  # its function; all other hooks run after theirs


def hooks() -> dict[str, Callable[..., Any]]:
    """What runs around which function of this SGLang, by the function's name."""
    found: dict[str, Callable[..., Any]] = {
        f"{c.__module__}.{c.__name__}.get_quant_method": choose_method
        for c in (Mxfp4Config, Fp8Config)
    }
    found[f"{model_loader.__name__}._get_quantization_config"] = remember_model
    if dataclasses.is_dataclass(ServerArgs):
        found[f"{ServerArgs.__module__}.{ServerArgs.__name__}.__post_init__"] = remember_backends
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
                f"--moe-runner-backend {NAME} serves MXFP4 experts, and this model has others; drop it"
            )

        register_moe_runner_core(NAME, refuse)
        add_moe_runner_backend_choices([NAME])
    return True
