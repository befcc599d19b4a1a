"""The `hybrid` kernel: smallbatch where it is the faster, flashinfer beyond, on one copy of the weights."""

from typing import TYPE_CHECKING

import torch

from ..layout import Layout
from ..weights import LayerShape
from .flashinfer import FlashInferKernel
from .smallbatch import MOST_TOP_K, SmallBatchKernel, tiles

if TYPE_CHECKING:
    from ..experts import PreparedExperts

# Where flashinfer overtakes, in pairs (tokens x top-k) an expert of the rank, by the tiles smallbatch has for the
# layer. Beyond, experts with more pairs than a tile holds are read twice. Measured: docs/kernels/smallbatch.md.
PAIRS_AN_EXPERT = {(1,): 5, (1, 2): 8}


class HybridKernel:
    """Chooses by the number of tokens alone, which the host knows: no synchronisation, and the same in a CUDA graph."""

    name = "hybrid"
    auto_devices = frozenset({"cuda"})
    _large, _small = FlashInferKernel(), SmallBatchKernel()

    def why_not(self, shape: LayerShape, device: torch.device) -> str | None:
        return self._small.why_not(shape, device)

    def layout(self, device: torch.device) -> Layout:
        return self._large.layout(device)

    def load(self, p: "PreparedExperts") -> None:
        self._small.load(p)

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        small = min(num_tokens, small_tokens(p, top_k))
        least = self._small.workspace_bytes(p, small, top_k) if small else 0
        return max(least, self._large.workspace_bytes(p, num_tokens, top_k) if num_tokens > small else 0)

    def run(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        p: "PreparedExperts",
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        kernel = self._small if len(x) <= small_tokens(p, topk_ids.shape[1]) else self._large
        kernel.run(x, topk_ids, topk_weights, p, out, workspace)


def small_tokens(p: "PreparedExperts", top_k: int) -> int:
    """Up to how many tokens smallbatch serves: 0 where a token's bytes must not depend on its batch."""
    if p.batch_invariant or top_k > MOST_TOP_K:
        return 0
    return PAIRS_AN_EXPERT[tiles(p.shape)] * p.shape.num_experts * p.ep_size // top_k
