"""The `hybrid` kernel: smallbatch where it is the faster, flashinfer beyond, on one copy of the weights."""

import logging
from typing import TYPE_CHECKING

import torch

from ..layout import Layout
from ..weights import LayerShape
from . import Run, planned, say_once
from .flashinfer import FlashInferKernel
from .smallbatch import MOST_TOP_K, SmallBatchKernel, switches

if TYPE_CHECKING:
    from ..experts import PreparedExperts

logger = logging.getLogger(__name__)


class HybridKernel:
    """Chooses by the number of tokens alone, which the host knows: no synchronisation, and the same in a CUDA graph."""

    name = "hybrid"
    auto_devices = frozenset({"cuda"})
    _large, _small = FlashInferKernel(), SmallBatchKernel()

    def why_not(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._large.why_not(shape, device, deterministic) or self._small.beside_flashinfer(
            shape, device
        )

    def layout(self, device: torch.device) -> Layout:
        return self._large.layout(device)

    def load(self, p: "PreparedExperts") -> None:
        self._small.load(p)
        self._large.load(p)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        small = min(num_tokens, small_tokens(p, top_k))
        least = self._small.workspace_bytes(p, small, top_k) if small else 0
        return max(
            least, self._large.workspace_bytes(p, num_tokens, top_k) if num_tokens > small else 0
        )

    def runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        kernel = self._small if num_tokens <= small_tokens(p, top_k) else self._large
        return kernel.runner(p, num_tokens, top_k)


def small_tokens(p: "PreparedExperts", top_k: int) -> int:
    """Up to how many tokens smallbatch serves. Decided once a layer and top-k."""
    tokens: int = planned(p, HybridKernel.name, top_k, _small_tokens)
    return tokens


def _small_tokens(p: "PreparedExperts", top_k: int) -> int:
    if p.batch_invariant or top_k > MOST_TOP_K:  # a token's bytes must not depend on its batch
        return 0
    found, s = switches(p, top_k), p.shape
    layer = f"{s.num_experts} experts top-{top_k} {s.hidden_size}x{s.intermediate_size}"
    say_once(
        logger,
        logging.INFO,
        f"MoE {layer} runs smallbatch up to {found.tokens} tokens, {found.where}",
    )
    return found.tokens
