"""The `hybrid` kernel: smallbatch where it is the faster, flashinfer beyond, on one copy of the
weights.
"""

import logging
from typing import TYPE_CHECKING

import torch

from hopper_mxfp4.contract import LayerShape, Layout, Run
from hopper_mxfp4.kernels.flashinfer.kernel import FlashInferKernel
from hopper_mxfp4.kernels.smallbatch.kernel import MAX_TOP_K, SmallBatchKernel, crossover
from hopper_mxfp4.kernels.support import cached, log_once

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

logger = logging.getLogger(__name__)


class HybridKernel:
    """Chooses by the number of tokens alone, which the host knows: no synchronisation, and the same
    in a CUDA graph.
    """

    name = "hybrid"
    auto_devices = frozenset({"cuda"})
    _large, _small = FlashInferKernel(), SmallBatchKernel()

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._large.unsupported_reason(
            shape, device, deterministic
        ) or self._small.beside_flashinfer(shape, device)

    def layout(self, device: torch.device) -> Layout:
        return self._large.layout(device)

    def warm_up(self, p: "PreparedExperts") -> None:
        self._small.warm_up(p)
        self._large.warm_up(p)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        """For any number of tokens up to so many: both kernels' where both may serve."""
        small = min(num_tokens, small_tokens(p, top_k))
        needed = self._small.workspace_bytes(p, small, top_k) if small else 0
        if num_tokens > small:
            needed = max(needed, self._large.workspace_bytes(p, num_tokens, top_k))
        return needed

    def make_runner(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> Run:
        kernel = self._small if num_tokens <= small_tokens(p, top_k) else self._large
        return kernel.make_runner(p, num_tokens, top_k)


def small_tokens(p: "PreparedExperts", top_k: int) -> int:
    """Up to how many tokens smallbatch serves. Decided once a layer and top-k."""
    tokens: int = cached(p, HybridKernel.name, top_k, _small_tokens)
    return tokens


def _small_tokens(p: "PreparedExperts", top_k: int) -> int:
    if p.batch_invariant or top_k > MAX_TOP_K:  # a token's bytes must not depend on its batch
        return 0
    found, s = crossover(p, top_k), p.shape
    layer = f"{s.num_experts} experts top-{top_k} {s.hidden_size}x{s.intermediate_size}"
    log_once(
        logger,
        logging.INFO,
        f"MoE {layer} runs smallbatch up to {found.tokens} tokens, {found.where}",
    )
    return found.tokens
