"""The `native` kernel: narrow for few tokens an expert, wide beyond, on one copy of the weights;
and `native8`: narrow8 and wide8 likewise, with 8-bit activations.

They need torch and NVRTC, and nothing of FlashInfer's.
"""

import logging
import sys
from functools import cache
from typing import NamedTuple

import torch

from hopper_mxfp4.contract import Compilation, LayerShape, Layout, PreparedExperts, Run
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.narrow.tiling import MAX_PAIRS, segments
from hopper_mxfp4.kernels.narrow8.kernel import Narrow8Kernel
from hopper_mxfp4.kernels.support import log_once, tokens_of
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from hopper_mxfp4.kernels.tiles.layout import MOST_FOR_BF16, TILES
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide8.kernel import Wide8Kernel
from hopper_mxfp4.tuning.cards import card_of

logger = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Up to how many pairs (tokens x top-k) narrow serves: of an expert on average, and of a
    rank in all.
    """

    of_expert: int
    of_rank: float


# By whether memory is fast for how fast the card computes, as an H200's is and an H100's is not.
# Narrow starts sooner, but reads an expert's weights again for every segment. With skewed routing a
# few experts have many segments however many experts there are, hence a number for all. On an H200
# wide does not keep up with memory, and narrow serves as long as most experts have one segment.
# Measured with uniform and skewed routing (docs/dev/wide-kernel.md, section 9).
NARROW_PAIRS = {False: Pairs(5, 128), True: Pairs(7, float("inf"))}
# Of narrow8, whose instructions for a weight are more than wide8's: on an H200 they stop it soon
# (docs/dev/w4a8-kernel.md, section 9).
NARROW8_PAIRS = {False: Pairs(5, 128), True: Pairs(1, 32)}
# TB/s of memory for a TFLOP/s of ordinary instructions: an H100 has 0.050, an H200 0.072.
_FAST_MEMORY = 0.06
_SCALES_FOR_BF16 = f"scale bytes of at most {MOST_FOR_BF16}"


class NativeKernel:
    """Chooses by the number of tokens alone, which the host knows: no synchronisation."""

    name = "native"
    auto_devices = frozenset({"cuda"})
    activations = frozenset({"bf16"})
    takes_expert_map = True
    _narrow, _wide, _pairs = NarrowKernel(), WideKernel(), NARROW_PAIRS

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._wide.unsupported_reason(
            shape, device, deterministic
        ) or self._narrow.unsupported_reason(shape, device, deterministic)

    def layout(self, device: torch.device) -> Layout:
        return TILES

    def compilations(self, shape: LayerShape) -> list[Compilation]:
        return self._wide.compilations(shape) + self._narrow.compilations(shape)

    def warm_up(self, p: PreparedExperts) -> None:
        _look_at_scales(p)
        self._narrow.warm_up(p)
        if _wide_is_exact(p):
            self._wide.warm_up(p)

    def workspace_bytes(self, p: PreparedExperts, num_tokens: int, top_k: int) -> int:
        """For any number of tokens up to so many: both kernels' where both may serve."""
        few = min(num_tokens, self._narrow_tokens(p, top_k))
        needed = self._narrow.workspace_bytes(p, few, top_k) if few else 0
        if num_tokens > few:
            needed = max(needed, self._wide.workspace_bytes(p, num_tokens, top_k))
        return needed

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        few = num_tokens <= self._narrow_tokens(p, top_k)
        return (self._narrow if few else self._wide).make_runner(p, num_tokens, top_k)

    def _narrow_tokens(self, p: PreparedExperts, top_k: int) -> int:
        """Up to how many tokens narrow serves."""
        return self._narrow_tokens_beside_wide(p, top_k) if _wide_is_exact(p) else sys.maxsize

    def _narrow_tokens_beside_wide(self, p: PreparedExperts, top_k: int) -> int:
        """Those that have few enough pairs, and run in one launch of narrow.

        The two kernels add up in different orders, so where a token's bytes must not depend on its
        batch, wide serves alone.
        """
        if p.batch_invariant or not segments(p.shape, self._narrow.gemm):
            return 0
        most = self._pairs[has_fast_memory(p.w13.device)]
        of_expert = min(most.of_expert, most.of_rank / p.shape.num_experts)
        return min(tokens_of(p, of_expert, top_k), MAX_PAIRS // top_k)


class Native8Kernel(NativeKernel):
    """The same with 8-bit activations. A layer too large for narrow8 is wide8's alone."""

    name = "native8"
    activations = frozenset({"fp8"})
    _narrow, _wide, _pairs = Narrow8Kernel(), Wide8Kernel(), NARROW8_PAIRS

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        return self._wide.unsupported_reason(shape, device, deterministic)

    def layout(self, device: torch.device) -> Layout:
        return TILES_E5M2

    def warm_up(self, p: PreparedExperts) -> None:
        self._narrow.warm_up(p)
        self._wide.warm_up(p)

    def _narrow_tokens(self, p: PreparedExperts, top_k: int) -> int:
        return self._narrow_tokens_beside_wide(p, top_k)


@cache
def has_fast_memory(device: torch.device) -> bool:
    """Whether its memory is fast for how fast it computes, as an H200's is."""
    if device.type != "cuda":
        return True
    card = card_of(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device))
    return card is None or card.bandwidth / card.instructions >= _FAST_MEMORY


def _wide_is_exact(p: PreparedExperts) -> bool:
    return _SCALES_FOR_BF16 in p.relies_on


def _look_at_scales(p: PreparedExperts) -> None:
    """Once a layer is prepared, before any call: it asks the device."""
    greatest = max(int(scale.max()) for scale in (p.w13_scale, p.w2_scale))
    if greatest <= MOST_FOR_BF16:
        p.relies_on.add(_SCALES_FOR_BF16)
        return
    log_once(
        logger,
        logging.WARNING,
        f"MoE layers with scale bytes up to {greatest} run narrow at every number of tokens, "
        f"slowly from some hundred on: wide multiplies exactly up to {MOST_FOR_BF16}",
    )
