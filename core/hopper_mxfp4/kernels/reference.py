"""The `reference` kernel: float32 on dequantised weights, on any device, slow."""

from typing import TYPE_CHECKING

import torch

from ..layout import PLAIN, Layout
from ..reference import Expert, dequantize_expert, sum_experts
from ..weights import LayerShape
from . import Call, Run

if TYPE_CHECKING:
    from ..experts import PreparedExperts


class ReferenceKernel:
    """Runs on weights prepared under any layout, since each knows its way back.

    It synchronises with the host to find the experts in use, so CUDA graphs cannot capture it.
    """

    name = "reference"
    auto_devices = frozenset({"cpu"})

    def why_not(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return None

    def layout(self, device: torch.device) -> Layout:
        return PLAIN

    def load(self, p: "PreparedExperts") -> None:
        pass

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        return 0

    def runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        return _run_one_by_one if p.batch_invariant else _run


def _run(call: Call, p: "PreparedExperts") -> None:
    def expert(e: int) -> Expert:
        return dequantize_expert(p.restore(slice(e, e + 1)), 0, p.family)

    call.out.copy_(
        sum_experts(call.x, call.topk_ids, call.topk_weights, p.shape.num_experts, expert, p.swiglu)
    )


def _run_one_by_one(call: Call, p: "PreparedExperts") -> None:
    """A matrix product's bytes depend on how many rows it has: each token gets its own."""
    for token in range(len(call.x)):
        _run(call.part(slice(token, token + 1)), p)
