"""The call: SGLang's dispatched tokens through a layer's prepared experts."""

from typing import Any

import torch
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

from hopper_mxfp4 import PreparedExperts, fused_moe

try:
    from sglang.srt.runtime_context import get_parallel
except ImportError:  # up to 0.5.13
    from sglang.srt.distributed import get_tp_group
else:

    def get_tp_group() -> Any:
        return get_parallel().tp_group


def run_experts(
    layer: FusedMoE, prepared: PreparedExperts, dispatch_output: Any
) -> StandardCombineInput:
    """The weighted sums of this rank's experts, which SGLang's dispatcher combines."""
    x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
    if hasattr(topk, "to_standard"):  # SGLang left the routing to the kernel
        topk = topk.to_standard()
    ids, weights = topk.topk_ids, topk.topk_weights.float()
    if layer.dispatcher.skip_local_expert_mapping and layer.moe_ep_rank:
        # Global ids: those of other ranks fall outside ours.
        ids = ids - layer.moe_ep_rank * prepared.shape.num_experts
    if not layer.should_fuse_routed_scaling_factor_in_topk:
        weights = weights * (layer.moe_runner_config.routed_scaling_factor or 1.0)
    with use_symmetric_memory(get_tp_group(), disabled=not is_allocation_symmetric()):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return StandardCombineInput(hidden_states=fused_moe(x, ids, weights, prepared, out=out))
