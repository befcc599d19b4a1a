"""Which kernel, and which of smallbatch's tiles, serve so many tokens of a layer.

Decided here, once a layer and top-k, and told to the kernels that ask: by what `tune` measured, on
this GPU or another, or else by a guess.
"""

from typing import TYPE_CHECKING, NamedTuple

from hopper_mxfp4.kernels.flashinfer.kernel import build_of, card_on
from hopper_mxfp4.tuning.tables import TunedShape, choose_smallbatch

if TYPE_CHECKING:
    from hopper_mxfp4.contract import PreparedExperts

# The guess, in pairs (tokens x top-k) an expert (docs/dev/smallbatch.md). Up to how many smallbatch
# beats flashinfer, by the tiles it has for the layer: beyond, experts with more pairs than a tile
# holds are read twice. And from how many tiles of 16 tokens beat tiles of 8.
PAIRS_PER_EXPERT = {(8,): 5, (8, 16): 8}
PAIRS_OF_SMALL_TILES = 5


class Crossover(NamedTuple):
    """Where a layer changes kernels and tiles, in tokens of a call, and where that is from.

    tokens: up to so many smallbatch is faster than flashinfer. wide_from: from so many its tiles of
    16 tokens are faster than those of 8. where: in words.
    """

    tokens: int
    wide_from: int
    where: str


def find_crossover(
    p: "PreparedExperts", top_k: int, tiles: tuple[int, ...], revision: int
) -> Crossover:
    """tiles: that smallbatch has for the layer. revision: of smallbatch; others' times are void.

    With expert parallelism a rank sees all tokens and most of its pairs are masked: numbers of
    tokens are then times the ranks.
    """
    experts = p.shape.num_experts * p.ep_size
    guess = PAIRS_PER_EXPERT[tiles] * experts // top_k
    wide_guess = PAIRS_OF_SMALL_TILES * experts // top_k + 1
    device = p.w13.device
    found, most, where, *_ = choose_smallbatch(
        _tuned_shape(p, top_k), build_of(device), revision, card_on(device)
    )
    if found is None:
        where = f"a guess by the pairs an expert: {where}; `hopper-mxfp4 tune` measures it"
        return Crossover(guess, wide_guess, where)
    # What was the better at all that was measured stays so up to the guess.
    most *= p.ep_size
    tokens = max(guess, most) if found.tokens is None else found.tokens * p.ep_size
    wide_from = max(wide_guess, most + 1)
    if found.wide_from is not None:
        wide_from = found.wide_from * p.ep_size
    return Crossover(tokens, wide_from, where)


def _tuned_shape(p: "PreparedExperts", top_k: int) -> TunedShape:
    """What tables call the layer. None of FlashInfer's SM90 kernels for it sums a token's experts
    itself, so that they are "separate".
    """
    hidden, intermediate = p.w2.shape[1], p.w13.shape[1] // 2
    bias = p.w13_bias is not None
    return TunedShape(p.shape.num_experts, hidden, intermediate, top_k, bias, "separate")
