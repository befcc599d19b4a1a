"""SGLang's MoE method that owns a layer's parameters."""

import logging
import threading
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from hopper_mxfp4 import (
    ExpertWeights,
    PreparedExperts,
    allocate_weights,
    prepare_experts,
    restore_in_place,
)
from hopper_mxfp4.loading import activations_in_words
from hopper_mxfp4.plugin import Kernel

from .experts import run_experts
from .loading import Loader, filling_corner
from .selection import Checkpoint, layer_shape

logger = logging.getLogger(__name__)

taken, reported = 0, 0  # layers of this process: taken over, and said so in the log


class MoEMethod(FusedMoEMethodBase):
    """Owns a layer's parameters.

    They hold the checkpoint's bytes while weights are loaded and the kernel's otherwise.
    """

    runner = None  # a kernel called directly, on standard top-k output with local ids

    def __init__(
        self,
        layer: FusedMoE,
        checkpoint: Checkpoint,
        kernel: Kernel,
        device: torch.device,
        batch_invariant: bool | None,
        activations: str = "bf16",
    ):
        self.checkpoint = checkpoint
        self.container, self.family = checkpoint.container, checkpoint.family
        self.shape = layer_shape(layer, checkpoint)
        self.swiglu = checkpoint.swiglu
        self.kernel, self.device = kernel, device
        self.batch_invariant, self.activations = batch_invariant, activations
        # Asked from 0.5.19 on: the router's, where run_experts must multiply before that. After
        # DeepEP SGLang's models multiply what the router has not, two-batch overlap in any case.
        self.fuse_routed_scaling_factor_in_topk = get_moe_a2a_backend().is_none()
        self.prepared: PreparedExperts | None = None
        self.expert_map: torch.Tensor | None = None  # of ids that reach the layer global
        self.serving = False
        self.filled: set[str] = set()  # names of parameters that SGLang has loaded into
        self.lock = threading.Lock()  # SGLang loads experts in parallel

    def create_weights(self, layer: FusedMoE, *, weight_loader: Loader, **attributes: Any) -> None:
        weights = allocate_weights(
            self.shape,
            family=self.family,
            device=self.device,
            kernel=self.kernel,
            activations=self.activations,
            weight_dtype=self.container.weight_dtype,
            scale_dtype=self.container.scale_dtype,
        )
        # No biases where the family has none.
        self.parameters = {name: self.container.parameters[name] for name in weights.tensors()}
        tensors = weights.tensors()
        both = [*self.parameters.items(), *self.container.other_names.items()]
        for name, registered in both:
            parameter: Any = torch.nn.Parameter(tensors[name], requires_grad=False)
            parameter.weight_loader = filling_corner(
                weight_loader,
                name,
                self.shape,
                self.family,
                before=partial(self.before_loading, layer, registered),
            )
            if name.endswith("scale"):
                parameter.quant_method = "block"
            layer.register_parameter(registered, parameter)

    def before_loading(self, layer: FusedMoE, registered: str) -> None:
        self.filled.add(registered)
        self.restore_weights_before_loading(layer)

    def keep_one_name(self, layer: FusedMoE) -> None:
        """Of two names for one tensor, that which the model's loader looked for.

        EPLB would move what both name twice. Where nothing was loaded yet (--load-format dummy),
        both stay. Raises ValueError where the loader looked for neither.
        """
        for name, other in self.container.other_names.items():
            first = self.parameters[name]
            if first == other or not hasattr(layer, other) or not self.filled:
                continue
            if not self.filled & {first, other}:  # SGLang says nothing of it
                raise ValueError(
                    f"the checkpoint's scales were loaded and its weights not: this model looks "
                    f"for neither {first} nor {other}; serve it with stock SGLang"
                )
            kept, dropped = (other, first) if other in self.filled else (first, other)
            delattr(layer, dropped)
            self.parameters[name] = kept

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
        """There is none."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Repack what was loaded, at the same addresses. A second call changes nothing."""
        self.keep_one_name(layer)
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
                activations=self.activations,
            )
            # CUDA graphs hold the first one's constants; its weights are views of the same
            # parameters.
            self.prepared = self.prepared or prepared
            self.prepared.go_on_after(prepared)
            for name, parameter in tensors.items():
                if name.endswith("scale"):
                    # NCCL, by which EPLB moves experts, has no float8_e8m0fnu.
                    parameter.data = parameter.data.view(torch.uint8)
            self.serving = True
        assert self.prepared is not None
        self.prepared.reset_constants()  # sleep drops them
        if isinstance(layer, DeepEPMoE):
            receive_bf16(layer)
        elif layer.moe_ep_size > 1 and leave_ids_global(layer.dispatcher):
            # An id's place among this rank's; other ranks' fall outside.
            first = layer.moe_ep_rank * self.shape.num_experts
            places = torch.arange(
                -first, layer.num_experts - first, dtype=torch.int32, device=self.device
            )
            if self.expert_map is None:
                self.expert_map = torch.empty_like(places)
            self.expert_map.copy_(places)  # sleep drops it, and CUDA graphs hold its address
        report(self)

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """The checkpoint's bytes again, at the same addresses.

        A weight update may bring only some of them.
        """
        with self.lock:
            if self.serving and self.prepared is not None:
                for name, tensor in restore_in_place(self.prepared).tensors().items():
                    if name.endswith("scale"):
                        parameter = getattr(layer, self.parameters[name])
                        parameter.data = tensor.view(self.container.scale_dtype)
                self.serving = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a kernel's call is nothing to trace
    def apply(self, layer: FusedMoE, dispatch_output: Any) -> Any:
        prepared = self.prepared if self.serving else None
        name = self.parameters["w13"]
        w13 = getattr(layer, name)
        if prepared is None or w13.data_ptr() != prepared.w13.data_ptr():
            reason = (
                "was replaced after loading"
                if self.serving
                else "was loaded and not prepared; call end_weight_update"
            )
            raise RuntimeError(
                f"{name} of {self.family.name}'s layer {layer.layer_id} {reason}: hopper-mxfp4 "
                "can't run on it"
            )
        return run_experts(layer, prepared, self.expert_map, dispatch_output)


def receive_bf16(layer: DeepEPMoE) -> None:
    """Have DeepEP send x as it is, which by default it quantises to 8 bits; and the layer ask its
    method, not kernels that it named itself before methods had formats.
    """
    layer.dispatcher.set_quant_config({"dispatcher_output_dtype": "bf16"})
    layer.deprecate_flag = True


def leave_ids_global(dispatcher: standard.StandardDispatcher) -> bool:
    """Have SGLang's dispatcher leave ids as they are, which otherwise makes them local in four
    small kernels a layer and step. False where it must go on, since it masks the padding rows of DP
    attention thereafter.
    """
    if not getattr(standard, "_MASK_DP_PAD_MOE", False):
        dispatcher.skip_local_expert_mapping = True
    return bool(dispatcher.skip_local_expert_mapping)


def take_over(
    layer: FusedMoE,
    checkpoint: Checkpoint,
    kernel: Kernel,
    device: torch.device,
    batch_invariant: bool | None,
    activations: str,
) -> MoEMethod:
    """The method that runs a layer, counted for the line in the log."""
    global taken
    method = MoEMethod(layer, checkpoint, kernel, device, batch_invariant, activations)
    taken += 1
    return method


def report(method: MoEMethod) -> None:
    """One line for a model, when its first layer is ready: then all of them have been made."""
    global reported
    if reported < taken and method.prepared is not None:
        logger.info(
            "hopper-mxfp4 takes over %d MXFP4 MoE layers with kernel %s and %s; %s%s",
            taken - reported,
            method.kernel.name,
            method.swiglu,
            activations_in_words(method.activations, method.checkpoint.activation_bits, "SGLang"),
            "; batch invariant" if method.prepared.batch_invariant else "",
        )
        reported = taken
