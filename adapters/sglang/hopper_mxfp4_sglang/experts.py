"""The call: SGLang's dispatched tokens through a layer's prepared experts."""

from typing import Any

import torch
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.deepep import (
    DeepEPLLCombineInput,
    DeepEPNormalCombineInput,
)
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

from hopper_mxfp4 import PreparedExperts, batched_moe, fused_moe

try:
    from sglang.srt.runtime_context import get_parallel
except ImportError:  # up to 0.5.13
    from sglang.srt.distributed import get_tp_group
else:

    def get_tp_group() -> Any:
        return get_parallel().tp_group


def run_experts(
    layer: FusedMoE,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
    dispatch_output: Any,
) -> Any:
    """What this rank's experts make of the tokens they were sent, for SGLang's dispatcher to
    combine. expert_map: as for `fused_moe`, where that dispatcher leaves ids global.
    """
    if dispatch_output.format.is_deepep_ll():
        return run_slots(prepared, dispatch_output)
    if dispatch_output.format.is_deepep_normal():
        return run_received(prepared, dispatch_output)
    return run_standard(layer, prepared, expert_map, dispatch_output)


def run_standard(
    layer: FusedMoE,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
    dispatch_output: Any,
) -> StandardCombineInput:
    """Every rank has all tokens; the weighted sums of its experts, which are summed over ranks."""
    x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
    if hasattr(topk, "to_standard"):  # SGLang left the routing to the kernel
        topk = topk.to_standard()
    ids, weights = topk.topk_ids, topk.topk_weights.float()
    if not layer.should_fuse_routed_scaling_factor_in_topk:
        weights = weights * (layer.moe_runner_config.routed_scaling_factor or 1.0)
    with use_symmetric_memory(get_tp_group(), disabled=not is_allocation_symmetric()):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = fused_moe(x, ids, weights, prepared, out=out, expert_map=expert_map)
    return StandardCombineInput(hidden_states=y)


# DeepEP's combine, or SGLang's model after it, multiplies by the routed scaling factor: layer.py
# says to the router that it need not.


def run_slots(prepared: PreparedExperts, dispatched: Any) -> DeepEPLLCombineInput:
    """DeepEP's low latency kernels: each expert's tokens in slots of its own, to be weighted and
    summed where they came from. How many came stays on the device.
    """
    y = batched_moe(dispatched.hidden_states, dispatched.masked_m, prepared)
    return DeepEPLLCombineInput(
        hidden_states=y, topk_ids=dispatched.topk_ids, topk_weights=dispatched.topk_weights
    )


def run_received(prepared: PreparedExperts, dispatched: Any) -> DeepEPNormalCombineInput:
    """DeepEP's normal kernels: the tokens of which this rank has an expert, with local ids, to be
    weighted and summed here and summed over ranks where they came from.
    """
    ids, weights = dispatched.topk_ids, dispatched.topk_weights
    y = fused_moe(dispatched.hidden_states, ids, weights.float(), prepared)
    return DeepEPNormalCombineInput(hidden_states=y, topk_ids=ids, topk_weights=weights)
