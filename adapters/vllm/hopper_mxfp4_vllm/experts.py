"""The call: a layer's prepared experts in vLLM's modular MoE."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

from hopper_mxfp4 import PreparedExperts, batched_moe, fused_moe, workspace_bytes

# SwiGLU's alpha and beta by vLLM's name of the activation; the limit is the layer's own.
SWIGLU_OF = {
    MoEActivation.SILU: (1.0, 0.0),
    MoEActivation.SWIGLUOAI: (1.702, 1.0),
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: (1.702, 1.0),
}
INTERLEAVED = frozenset({MoEActivation.SWIGLUOAI})  # those that say so of w13's rows


class Experts(mk.FusedMoEExpertsModular):
    """What vLLM calls between dispatching the tokens and combining the results: tokens with the ids
    and weights of their experts.
    """

    # vLLM's elastic EP builds experts anew and does not know the argument `prepared`: it then stops
    # with that name instead of running experts without weights.
    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        prepared: PreparedExperts,
        **of_format: int,  # what else vLLM tells experts of their activation format
    ):
        super().__init__(moe_config, quant_config, **of_format)
        self.prepared = prepared

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    # vLLM asks these of its own backends when it chooses one. For ours, reasons.py has answered.
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
        return activation in SWIGLU_OF

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_batched_activation_format

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()  # fused_moe has already weighted and summed

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *args: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), self.scratch(M, topk), (M, K)

    def scratch(self, tokens: int, top_k: int) -> tuple[int]:
        """In elements of the activations' bf16.

        vLLM lets the first workspace share its memory with the output, so the scratch is the
        second.
        """
        return (-(-workspace_bytes(self.prepared, tokens, top_k) // 2),)

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
        if w1.data_ptr() != self.prepared.w13.data_ptr():
            raise RuntimeError(
                "the layer's w13_weight was replaced after loading, so hopper-mxfp4 would run on "
                "old weights; report how"
            )
        scratch = workspace2.view(torch.uint8)
        if self.activation_format() == mk.FusedMoEActivationFormat.BatchedExperts:
            # vLLM's own, slow prepare counts the tokens of all ranks' experts, this rank's first.
            counts = expert_tokens_meta.expert_num_tokens[: self.prepared.shape.num_experts]
            batched_moe(hidden_states, counts, self.prepared, out=output, workspace=scratch)
            return
        if apply_router_weight_on_input:
            raise NotImplementedError(
                "hopper-mxfp4 weights the experts' output, and this model wants their input "
                "weighted"
            )
        # The map never changes: EPLB moves weights and rewrites vLLM's own tables, from which
        # topk_ids come.
        fused_moe(
            hidden_states,
            topk_ids,
            topk_weights.float(),
            self.prepared,
            out=output,
            workspace=scratch,
            expert_map=expert_map,
        )


class BatchedExperts(Experts):
    """The same for all-to-all kernels that hand over each expert's tokens in slots of its own, and
    weight and sum what they are given back: DeepEP's low latency kernels and NIXL's.
    """

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.BatchedExperts

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return bool(moe_parallel_config.use_batched_activation_format)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *args: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        experts = self.prepared.shape.num_experts  # M is each one's number of slots
        return (0,), self.scratch(experts * M, 1), (experts, M, K)


def experts_for(
    prepare_finalize: mk.FusedMoEPrepareAndFinalize,
    moe_config: FusedMoEConfig,
    quant_config: FusedMoEQuantConfig,
    prepared: PreparedExperts,
) -> Experts:
    """What takes the tokens as prepare_finalize hands them over."""
    if prepare_finalize.activation_format == mk.FusedMoEActivationFormat.Standard:
        return Experts(moe_config, quant_config, prepared)
    return BatchedExperts(
        moe_config,
        quant_config,
        prepared,
        max_num_tokens=prepare_finalize.max_num_tokens_per_rank(),
        num_dispatchers=prepare_finalize.num_dispatchers(),
    )
