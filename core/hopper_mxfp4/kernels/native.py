"""The `native` kernel: narrow for few tokens an expert, wide beyond, on one copy of the weights.

It needs torch and NVRTC, and nothing of FlashInfer's.
"""

import torch

from hopper_mxfp4.contract import LayerShape, Layout, PreparedExperts, Run
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.narrow.tiling import MAX_PAIRS, segments
from hopper_mxfp4.kernels.support import cached, tokens_of
from hopper_mxfp4.kernels.tiles.layout import TILES
from hopper_mxfp4.kernels.wide.kernel import WideKernel

# Pairs (tokens x top-k) an expert up to which narrow is the faster, by its segments: measured on an
# H200 (docs/dev/native-kernel.md).
NARROW_PAIRS = {(8,): 7, (8, 16): 10}


class NativeKernel:
    """Chooses by the number of tokens alone, which the host knows: no synchronisation."""

    name = "native"
    auto_devices = frozenset({"cuda"})
    _narrow, _wide = NarrowKernel(), WideKernel()

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._wide.unsupported_reason(
            shape, device, deterministic
        ) or self._narrow.unsupported_reason(shape, device, deterministic)

    def layout(self, device: torch.device) -> Layout:
        return TILES

    def warm_up(self, p: PreparedExperts) -> None:
        self._narrow.warm_up(p)
        self._wide.warm_up(p)

    def workspace_bytes(self, p: PreparedExperts, num_tokens: int, top_k: int) -> int:
        """For any number of tokens up to so many: both kernels' where both may serve."""
        few = min(num_tokens, narrow_tokens(p, top_k))
        needed = self._narrow.workspace_bytes(p, few, top_k) if few else 0
        if num_tokens > few:
            needed = max(needed, self._wide.workspace_bytes(p, num_tokens, top_k))
        return needed

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        kernel = self._narrow if num_tokens <= narrow_tokens(p, top_k) else self._wide
        return kernel.make_runner(p, num_tokens, top_k)


def narrow_tokens(p: PreparedExperts, top_k: int) -> int:
    """Up to how many tokens narrow serves. Decided once a layer and top-k.

    The two kernels add up in different orders, so where a token's bytes must not depend on its
    batch, wide serves alone.
    """
    tokens: int = cached(p, NativeKernel.name, top_k, _narrow_tokens)
    return tokens


def _narrow_tokens(p: PreparedExperts, top_k: int) -> int:
    if p.batch_invariant:
        return 0
    return min(tokens_of(p, NARROW_PAIRS[segments(p.shape)], top_k), MAX_PAIRS // top_k)
