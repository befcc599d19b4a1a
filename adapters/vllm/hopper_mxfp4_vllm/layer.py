"""vLLM's method classes with this package's routed experts; heavy to import."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    mxfp4_w4a16_moe_quant_config,
)
from vllm.model_executor.layers.quantization.mxfp4 import (
    GptOssMxfp4MoEMethod,
    Mxfp4MoEMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from hopper_mxfp4 import (
    CheckpointFamily,
    ExpertWeights,
    LayerShape,
    SwiGLU,
    allocate_weights,
    prepare_experts,
)
from hopper_mxfp4.loading import fill_neutral, hidden_beyond, round_up
from hopper_mxfp4.plugin import BLOCK, Kernel

from .experts import Experts, experts_for
from .loading import (
    PACKED_PARAMETERS,
    PARAMETERS,
    Loader,
    emptying_first,
    scales_as_bytes,
)


class PreparedMoEMethod:
    """Mixed into a stock method: owns the layer's parameters.

    `apply` is the stock method's, which runs self.moe_kernel.
    """

    parameters: Mapping[str, str] = PARAMETERS  # by what names vLLM's loaders find the tensors
    weight_dtype: str  # what vLLM's streamed loader goes by
    supports_pre_processed_weights = False  # what it repacks to is not what stock vLLM would
    skip_forward_padding = False  # hidden size is padded inside the kernel and nowhere else
    has_unpadded_output = False
    moe: FusedMoEConfig  # set by vLLM's base

    def __init__(
        self,
        moe: FusedMoEConfig,
        family: CheckpointFamily,
        swiglu: SwiGLU,
        kernel: Kernel,
        device: torch.device,
        deterministic: bool = False,
        batch_invariant: bool = False,
        activations: str = "bf16",
    ):
        # The stock __init__ would pick one of vLLM's backends.
        FusedMoEMethodBase.__init__(self, moe)
        self.experts_cls = Experts
        self.family, self.swiglu = family, swiglu
        self.kernel, self.device = kernel, device
        self.deterministic, self.batch_invariant = deterministic, batch_invariant
        self.activations = activations
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
        # Hidden is reported as it is, so that the model's graph pads nothing. Intermediate is
        # reported as allocated: vLLM's loaders cut shards by it.
        self.intermediate_size = intermediate_size_per_partition
        hidden_size, intermediate = FusedMoEMethodBase.maybe_roundup_sizes(
            self, hidden_size, intermediate_size_per_partition, *args, **kwargs
        )
        return hidden_size, round_up(intermediate, self.kernel.layout(self.device).multiple)

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
        # All-to-all kernels know few hidden sizes, to which vLLM then pads the layer and its x.
        self.loaded_hidden_size = extra_weight_attrs.get("unpadded_hidden_size") or hidden_size
        self.shape = LayerShape(
            num_experts, hidden_size, self.true_intermediate_size(intermediate_size_per_partition)
        )
        weights = allocate_weights(
            self.shape,
            family=self.family,
            device=self.device,
            kernel=self.kernel,
            activations=self.activations,
        )
        for name, tensor in weights.tensors().items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(self.parameters[name], parameter)
            attributes: dict[str, Any] = {
                "weight_loader": self.weight_loader(layer, name, weight_loader)
            }
            if name.endswith("scale"):
                attributes["quant_method"] = "block"
            set_weight_attrs(parameter, extra_weight_attrs | attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        tensors: dict[str, Any] = {
            name: getattr(layer, parameter, None) for name, parameter in self.parameters.items()
        }
        weights = ExpertWeights(
            **tensors,
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
        )
        # No loader reaches there, and on a reload vLLM gives them memory that holds anything.
        for name, tensor in weights.tensors().items():
            fill_neutral(name, hidden_beyond(name, tensor, self.loaded_hidden_size))
        prepared = prepare_experts(
            weights,
            family=self.family,
            swiglu=self.swiglu,
            kernel=self.kernel,
            ep_size=self.moe.moe_parallel_config.ep_size,
            deterministic=self.deterministic,
            batch_invariant=self.batch_invariant,
            activations=self.activations,
        )
        if self.experts is not None:
            # A reload. vLLM copies what was repacked into the first parameters, which CUDA graphs
            # and EPLB hold and the first PreparedExperts views; or it has loaded into these
            # themselves.
            self.experts.prepared.go_on_after(prepared)
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        self.experts = experts_for(finalize, self.moe, self.moe_quant_config, prepared)
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
        # One of vLLM's loaders cuts shards in whole blocks of 32 (2880 over 4 ranks: 736, 736, 736,
        # 672), the other at the allocated size. What neither fills must be neutral, and is.
        return allocated

    def weight_loader(self, layer: RoutedExperts, name: str, loader: Loader) -> Loader:
        return emptying_first(loader, layer, name, self.family)


class DeepseekV4Method(PreparedMoEMethod, Mxfp4MoEMethod):
    """Experts that vLLM loads one by one, gate before up."""

    weight_dtype = "mxfp4"

    def weight_loader(self, layer: RoutedExperts, name: str, loader: Loader) -> Loader:
        return scales_as_bytes(loader) if name.endswith("scale") else loader


class PackedMethod(DeepseekV4Method):
    """The same, where the checkpoint calls its weights weight_packed."""

    parameters = PACKED_PARAMETERS

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        # The stock one's call. Stock renames the parameters for it, and no loader finds them again.
        assert self.moe_kernel is not None
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight_packed,
            w2=layer.w2_weight_packed,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
