"""The `reference` kernel: float32 on dequantised weights, on any device, slow."""

from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.arrange import restore_weights
from hopper_mxfp4.contract import ACTIVATIONS, PLAIN, Call, LayerShape, Layout, Run
from hopper_mxfp4.kernels.reference.moe import Expert, dequantize_expert, sum_experts

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts


class ReferenceKernel:
    """Runs on weights prepared under any layout, since each knows its way back.

    It synchronises with the host to find the experts in use, so CUDA graphs cannot capture it.
    """

    name = "reference"
    auto_devices = frozenset({"cpu"})
    activations = frozenset(ACTIVATIONS)

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return None

    def layout(self, device: torch.device) -> Layout:
        return PLAIN

    def warm_up(self, p: "PreparedExperts") -> None:
        pass

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return 0

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        return _run_one_by_one if p.batch_invariant else _run


def _run(call: Call, p: "PreparedExperts") -> None:
    def expert(e: int) -> Expert:
        return dequantize_expert(restore_weights(p, slice(e, e + 1)), 0, p.family)

    call.out.copy_(
        sum_experts(
            call.x,
            call.topk_ids,
            call.topk_weights,
            p.shape.num_experts,
            expert,
            p.swiglu,
            p.activations,
        )
    )


def _run_one_by_one(call: Call, p: "PreparedExperts") -> None:
    """A matrix product's bytes depend on how many rows it has: each token gets its own."""
    for token in range(len(call.x)):
        _run(call.part(slice(token, token + 1)), p)
