"""The heavy half: vLLM's config, method and experts classes around the core's functions."""

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import vllm.envs
from vllm.config import VllmConfig, get_current_vllm_config, quantization
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    mxfp4_w4a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import (
    GptOssMxfp4Config,
    GptOssMxfp4MoEMethod,
    Mxfp4Config,
    Mxfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

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
    workspace_bytes,
)
from hopper_mxfp4.arrange import NEUTRAL_SCALE
from hopper_mxfp4.checkpoint.weights import expert_chunks, round_up
from hopper_mxfp4.contract import BLOCK

from .selector import Order, logger, told

logging.getLogger(
    "hopper_mxfp4"
).parent = logger  # the core's lines: which tactics run, and how much scratch

Loader = Callable[..., bool | None]

# The loaders of vLLM find parameters by these names.
PARAMETERS = {
    "w13": "w13_weight",
    "w2": "w2_weight",
    "w13_scale": "w13_weight_scale",
    "w2_scale": "w2_weight_scale",
    "w13_bias": "w13_bias",
    "w2_bias": "w2_bias",
}


def device() -> torch.device:
    return torch.device(current_platform.device_type)


# alpha and beta of the activations that vLLM has names for; the limit is the layer's.
ACTIVATIONS = {
    MoEActivation.SILU: (1.0, 0.0),
    MoEActivation.SWIGLUOAI: (1.702, 1.0),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: (1.702, 1.0),
}


def server_why_not(config: VllmConfig) -> str | None:
    """Why a server with these arguments stays stock and what to change; None if it need not."""
    return next(_server_reasons(config), None)


def _server_reasons(config: VllmConfig) -> Iterator[str]:
    offload = getattr(config, "offload_config", None)
    if offload and (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size):
        yield (
            "offloading exchanges the experts' weights behind the kernels' back; drop "
            "--cpu-offload-gb and --offload-group-size"
        )
    if config.parallel_config.enable_elastic_ep:
        yield "elastic EP would build the experts anew without weights; drop --enable-elastic-ep"
    asked = getattr(getattr(config.model_config, "quantization_config", None), "moe", None)
    if asked is not None and asked.activation is not None:
        names = getattr(quantization, "QUANT_KEY_NAMES", {}).items()
        name = next((name for name, key in names if key == asked.activation), asked.activation)
        yield (
            f"--quantization-config.moe.activation asks for {name}, and it has BF16 activations "
            "only, no 8-bit ones yet; drop it"
        )
    for name in ("VLLM_HUMMING_INPUT_QUANT_CONFIG", "VLLM_MARLIN_INPUT_DTYPE"):
        if value := getattr(vllm.envs, name, None):
            yield (
                f"{name}={value} asks for activations of that precision, and it has BF16 ones "
                "only; unset it"
            )


def why_not(
    moe: FusedMoEConfig,
    shape: LayerShape,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    kernel: str = "auto",
    deterministic: bool = False,
) -> str | None:
    """Why a layer stays with stock vLLM and what to change, in a sentence; None if we take it."""
    return next(_layer_reasons(moe, shape, family, swiglu, kernel, deterministic), None)


def _layer_reasons(
    moe: FusedMoEConfig,
    shape: LayerShape,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    kernel: str,
    deterministic: bool,
) -> Iterator[str]:
    parallel = moe.moe_parallel_config
    if moe.in_dtype != torch.bfloat16:
        yield f"it computes in bfloat16, and the model in {moe.in_dtype}; pass --dtype bfloat16"
    if getattr(moe, "moe_backend", "auto") != "auto":
        yield f"--moe-backend {moe.moe_backend} asks for another kernel; drop one of the two flags"
    if moe.is_lora_enabled:
        yield "it has no LoRA; drop --enable-lora"
    if ACTIVATIONS.get(moe.activation) != (swiglu.alpha, swiglu.beta):
        yield (
            f"the layer's activation is {moe.activation}, and family {family.name} has {swiglu}; "
            "report this with the model's name"
        )
    if moe.has_bias != family.bias:
        yield (
            f"the layer has {'a' if moe.has_bias else 'no'} bias, and family {family.name} has "
            f"{'one' if family.bias else 'none'}; report this with the model's name"
        )
    if parallel.use_batched_activation_format or getattr(
        parallel, "use_passthrough_all2all", False
    ):
        yield "this all-to-all backend batches tokens by expert; choose another --all2all-backend"
    if shape.hidden_size % BLOCK:
        yield f"hidden size {shape.hidden_size} is no multiple of {BLOCK}, as a scale covers so many"
    if shape.intermediate_size % BLOCK:
        yield (
            f"tensor parallelism leaves a rank {shape.intermediate_size} columns of an expert, no "
            f"multiple of {BLOCK}, as a scale covers so many; choose a smaller "
            "--tensor-parallel-size or --enable-expert-parallel"
        )
    try:
        choose_kernel(kernel, shape, device(), deterministic=deterministic)
    except KernelUnavailable as unavailable:
        yield str(unavailable)


class TakeoverConfig:
    """Mixed into a stock config: the routed experts are ours, everything else is the stock one's."""

    method: "type[PreparedMoEMethod]"
    order = Order()  # an instance made by the Selector has its own
    declares_8_bit = False  # activations; so far these layers run BF16 ones nevertheless

    def serves(self, prefix: str) -> bool:
        """Whether the checkpoint's experts at this prefix are MXFP4."""
        return True

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            try:
                if self.serves(prefix):
                    return self.takeover(layer, prefix)
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

    def takeover(self, layer: RoutedExperts, prefix: str) -> "PreparedMoEMethod":
        """The method that runs the layer. Raises ValueError with the reason where it must not."""
        config, moe = get_current_vllm_config(), layer.moe_config
        hf_config = config.model_config.hf_config
        family = family_for(hf_config)
        swiglu = swiglu_of(layer, family, hf_config)
        invariant = self.order.batch_invariant or bool(vllm.envs.VLLM_BATCH_INVARIANT)
        how = {
            # This process's own variable, if it sees one, is the one that messages name.
            "kernel": "auto" if env.KERNEL.read() != "auto" else self.order.kernel,
            "deterministic": self.order.deterministic or invariant,
        }
        reason = (
            server_why_not(config)
            or self.requantised(layer, prefix)
            or why_not(moe, self.method.layer_shape(moe), family, swiglu, **how)
        )
        if reason is not None:
            raise ValueError(reason)
        method = self.method(moe, family, swiglu, batch_invariant=invariant, **how)
        logger.info_once(
            "hopper-mxfp4 takes over the MXFP4 MoE layers with kernel %s and %s; "
            "activations are BF16%s%s",
            method.kernel.name,
            swiglu,
            STOCK_8_BIT if self.declares_8_bit else "",
            "; batch invariant" if invariant else "",
        )
        return method

    def requantised(self, layer: RoutedExperts, prefix: str) -> str | None:
        """vLLM would wrap whatever method we give into one that quantises its weights anew."""
        online = getattr(self, "online_quantization_config", None)
        if online is None or online.resolve_quant_method_cls(type(layer), prefix) is None:
            return None
        return (
            "--quantization-config asks for experts quantised anew; leave them out of its moe and "
            "targets"
        )


# vLLM before 0.32 knew of no such declaration and ran BF16 too.
STOCK_8_BIT = ", not the 8-bit ones that the checkpoint declares" + (
    " and stock vLLM runs on Hopper"
    if "activation_key" in inspect.signature(Mxfp4MoEMethod.__init__).parameters
    else ""
)


def swiglu_of(layer: RoutedExperts, family: CheckpointFamily, hf_config: Any) -> SwiGLU:
    """From the model's config; what vLLM's model told the layer, where it did, must be the same."""
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


class PreparedMoEMethod:
    """Mixed into a stock method: owns the layer's parameters. `apply` is the stock one: it runs self.moe_kernel."""

    weight_dtype: str  # what vLLM's streamed loader goes by
    supports_pre_processed_weights = False  # what it repacks to is not what stock vLLM would
    skip_forward_padding = False  # hidden size is padded inside the kernel and nowhere else
    has_unpadded_output = False

    def __init__(
        self,
        moe: FusedMoEConfig,
        family: CheckpointFamily,
        swiglu: SwiGLU,
        kernel: str = "auto",
        deterministic: bool = False,
        batch_invariant: bool = False,
    ):
        # The stock __init__ would pick one of vLLM's backends.
        FusedMoEMethodBase.__init__(self, moe)  # type: ignore[arg-type]
        self.experts_cls = Experts
        self.family, self.swiglu = family, swiglu
        self.deterministic, self.batch_invariant = deterministic, batch_invariant
        self.kernel = choose_kernel(
            kernel, self.layer_shape(moe), device(), deterministic=deterministic
        )
        self.experts: Experts | None = None

    @staticmethod
    def layer_shape(moe: FusedMoEConfig) -> LayerShape:
        """The sizes of this rank's shard, as vLLM's loader cuts it."""
        return LayerShape(
            moe.num_local_experts, moe.hidden_dim, moe.intermediate_size_per_partition
        )

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        # Hidden is reported as it is, so that the model's graph pads nothing. Intermediate is reported
        # as allocated: vLLM's loaders cut shards by it.
        self.intermediate_size = intermediate_size_per_partition
        hidden_size, intermediate = FusedMoEMethodBase.maybe_roundup_sizes(
            self,  # type: ignore[arg-type]
            hidden_size,
            intermediate_size_per_partition,
            *args,
            **kwargs,
        )
        return hidden_size, round_up(intermediate, self.kernel.layout(device()).multiple)

    def true_intermediate_size(self, allocated: int) -> int:
        """How much of the allocated intermediate size the loaders fill."""
        return self.intermediate_size

    def weight_loader(self, layer: RoutedExperts, name: str, loader: Loader) -> Loader:
        """What fills the core's tensor of that name, around vLLM's own loader."""
        return loader

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Loader,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.params_dtype = params_dtype
        layer.num_experts = num_experts
        self.shape = LayerShape(
            num_experts, hidden_size, self.true_intermediate_size(intermediate_size_per_partition)
        )
        weights = allocate_weights(
            self.shape, family=self.family, device=device(), kernel=self.kernel.name
        )
        for name, tensor in weights.tensors().items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(PARAMETERS[name], parameter)
            set_weight_attrs(
                parameter,
                extra_weight_attrs
                | {"weight_loader": self.weight_loader(layer, name, weight_loader)},
            )
            if name.endswith("scale"):
                parameter.quant_method = "block"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        weights = ExpertWeights(
            **{name: getattr(layer, parameter, None) for name, parameter in PARAMETERS.items()},
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
        )
        prepared = prepare_experts(
            weights,
            family=self.family,
            swiglu=self.swiglu,
            kernel=self.kernel.name,
            ep_size=self.moe.moe_parallel_config.ep_size,
            deterministic=self.deterministic,
            batch_invariant=self.batch_invariant,
        )
        if self.experts is not None:
            # A reload. vLLM copies what was repacked into the first parameters, which CUDA graphs and
            # EPLB hold and the first PreparedExperts views; or it has loaded into these themselves.
            self.experts.prepared.reset_constants()
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.experts = Experts(self.moe, self.moe_quant_config, prepared)  # type: ignore[attr-defined]
        finalize = maybe_make_prepare_finalize(
            moe=self.moe,  # type: ignore[attr-defined]
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        self.moe_kernel = mk.FusedMoEKernel(finalize, self.experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        # Tells vLLM not to quantise activations; our experts read only `prepared`.
        biases = (getattr(layer, name, None) for name in ("w13_bias", "w2_bias"))
        return mxfp4_w4a16_moe_quant_config(layer.w13_weight_scale, layer.w2_weight_scale, *biases)


class GptOssMethod(PreparedMoEMethod, GptOssMxfp4MoEMethod):
    """Experts that vLLM loads as whole tensors, gate and up interleaved."""

    weight_dtype = "gpt_oss_mxfp4"

    @staticmethod
    def layer_shape(moe: FusedMoEConfig) -> LayerShape:
        shape = PreparedMoEMethod.layer_shape(moe)  # cut in whole blocks, however they divide
        return replace(shape, intermediate_size=round_up(shape.intermediate_size, BLOCK))

    def true_intermediate_size(self, allocated: int) -> int:
        # One of vLLM's loaders cuts shards in whole blocks of 32 (2880 over 4 ranks: 736, 736, 736, 672),
        # the other at the allocated size: what neither fills must be zero, and `weight_loader` sees to it.
        return allocated

    def weight_loader(self, layer: RoutedExperts, name: str, loader: Loader) -> Loader:
        """Empties what a tensor is loaded into: on a reload vLLM gives it memory with anything in it.

        And hands whole tensors over a few experts at a time: copying from the CPU into a corner, torch
        brings all it is given to the GPU first.
        """
        neutral = NEUTRAL_SCALE if name.endswith("scale") else 0

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str | None,
            expert_id: int | None,
            return_success: bool = False,
        ) -> bool | None:
            if shard_id is None:  # all of this rank's experts at once
                param.data.fill_(neutral)
                for part in expert_chunks(loaded_weight):
                    few = torch.nn.Parameter(param.data[part], requires_grad=False)
                    done = loader(
                        few, loaded_weight[part], weight_name, shard_id, expert_id, return_success
                    )
                return done
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                param.data[local].fill_(neutral)
            return loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

        return load


class DeepseekV4Method(PreparedMoEMethod, Mxfp4MoEMethod):
    """Experts that vLLM loads one by one, gate before up."""

    weight_dtype = "mxfp4"

    def weight_loader(self, layer: RoutedExperts, name: str, loader: Loader) -> Loader:
        """Scales arrive as float8_e8m0fnu, which copy_ would convert by value: hand on their bytes."""
        if not name.endswith("scale"):
            return loader

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if loaded_weight.dtype not in (torch.uint8, torch.float8_e8m0fnu):
                raise ValueError(
                    f"{weight_name} is {loaded_weight.dtype} in the checkpoint; its scales must be uint8 or float8_e8m0fnu"
                )
            return loader(
                param,
                loaded_weight.view(torch.uint8),
                weight_name,
                shard_id,
                expert_id,
                return_success,
            )

        return load


class GptOssConfig(TakeoverConfig, GptOssMxfp4Config):
    """GPT-OSS checkpoints. Keeps the stock get_name(): vLLM's weight loader goes by it."""

    method = GptOssMethod


class PlainMxfp4Config(TakeoverConfig, Mxfp4Config):
    """Other checkpoints whose experts, and nothing else, are MXFP4."""

    method = DeepseekV4Method


class Fp8StoringMxfp4Config(TakeoverConfig, Fp8Config):
    """Checkpoints that say fp8 with MXFP4 experts in store_dtype."""

    method = DeepseekV4Method

    def serves(self, prefix: str) -> bool:
        mode = getattr(self, "ignored_layers_match_mode", None)
        how = {} if mode is None else {"match_mode": mode}
        skipped = is_layer_skipped(prefix, self.ignored_layers, self.packed_modules_mapping, **how)
        return getattr(self, "store_dtype", None) == "mxfp4" and not skipped


# vLLM has a class of its own for each platform under this name; all are Fp8Configs.
class DeepseekV4Config(TakeoverConfig, get_quantization_config("deepseek_v4_fp8")):
    """DeepSeek-V4 checkpoints: fp8 but for the routed experts, which are MXFP4 unless requantised."""

    method = DeepseekV4Method
    declares_8_bit = True

    def serves(self, prefix: str) -> bool:
        if self.expert_dtype != "fp4" or is_layer_skipped(
            prefix, self.ignored_layers, self.packed_modules_mapping
        ):
            return False
        if hasattr(self, "_is_nvfp4_expert_layer"):
            return not self._is_nvfp4_expert_layer(prefix)
        return getattr(self, "moe_quant_algo", None) != "NVFP4"


# By vLLM's name of the stock config behind each.
CONFIGS = {
    "gpt_oss_mxfp4": GptOssConfig,
    "mxfp4": PlainMxfp4Config,
    "fp8": Fp8StoringMxfp4Config,
    "deepseek_v4_fp8": DeepseekV4Config,
}


class Experts(mk.FusedMoEExpertsModular):
    """The layer's experts in vLLM's modular MoE, on prepared weights."""

    # `prepared` is an argument that vLLM's elastic EP does not know, which makes it decline by name
    # instead of building experts without weights.
    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        prepared: PreparedExperts,
    ):
        super().__init__(moe_config, quant_config)
        self.prepared = prepared

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    # vLLM asks these when it chooses among its own backends; `why_not` has answered them for us.
    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_batched_activation_format

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()  # fused_moe has already weighted and summed

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *args: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # In elements of the activations' bf16. The first workspace shares its memory with the output: not for scratch.
        return (0,), (-(-workspace_bytes(self.prepared, M, topk) // 2),), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:
            raise NotImplementedError(
                "hopper-mxfp4 weights the experts' output, and this model wants their input weighted"
            )
        if w1.data_ptr() != self.prepared.w13.data_ptr():
            raise RuntimeError(
                "the layer's w13_weight was replaced after loading, so hopper-mxfp4 would run on old weights; report how"
            )
        if expert_map is not None:
            # Padding rows are already -1, which must not index the map's end.
            topk_ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])
        fused_moe(
            hidden_states,
            topk_ids,
            topk_weights.float(),
            self.prepared,
            out=output,
            workspace=workspace2.view(torch.uint8),
        )
