"""How fast Hopper cards are beside each other, so that one's tables can serve another."""

import math
import re
from typing import Any, NamedTuple


class Card(NamedTuple):
    """bandwidth: of memory, TB/s. instructions: float32 TFLOP/s without tensor cores, which is what
    all ordinary instructions go by: multiprocessors x 256 x clock. matmul: dense bf16 TFLOP/s.
    """

    bandwidth: float
    instructions: float
    matmul: float
    multiprocessors: int


# By a word in torch's name of the device, the first that is there. From NVIDIA's data sheets of
# H100, H200 and GH200, whose matmul is with sparsity, twice this; H20 and H800 have none in public
# and are as vendors list them. A GH200 of 480 GB or 120 GB is named by its CPU's memory: both have
# 96 GB of HBM3.
CARDS = {
    "H100 PCIe": Card(2.0, 51, 756, 114),
    "H800 PCIe": Card(2.0, 51, 756, 114),
    "H100 NVL": Card(3.9, 60, 835, 132),
    "H200 NVL": Card(4.8, 60, 835, 132),
    "H200": Card(4.8, 67, 989, 132),
    "GH200 144G": Card(4.9, 67, 990, 132),
    "GH200": Card(4.0, 67, 990, 132),
    "H20-3e": Card(4.8, 44, 148, 78),
    "H20": Card(4.0, 44, 148, 78),
    "H100": Card(3.35, 67, 989, 132),
    "H800": Card(3.35, 67, 989, 132),
}
_H100 = CARDS["H100"]
# What part of smallbatch's time on an H100 SXM, near where FlashInfer overtakes it, goes by
# bandwidth; the rest goes by instructions (turning 4 bits into bf16), as FlashInfer's does there.
# Fitted on the crossovers of eleven layers that an H100 and an H200 measured, whose memory is 1.43
# times as fast and whose instructions are not. With it the rule's ratio of the two kernels' times
# at the other card's crossover is 1 within 7 % in the mean of squares, 14 % at worst.
MEMORY_SHARE = 0.15


def card_of(name: str, properties: Any = None) -> Card | None:
    """The card of torch's name of a device; None where nothing is known.

    properties: torch.cuda.get_device_properties of it, for a card that is not in the list and for
    one with other multiprocessors than it has there, as a part of a card (MIG) has.
    """
    found = next((c for word, c in CARDS.items() if re.search(rf"\b{word}\b", name)), None)
    if properties is None:
        return found
    count = properties.multi_processor_count
    if found is None:
        clock, memory, bits = (
            getattr(properties, key, 0)
            for key in ("clock_rate", "memory_clock_rate", "memory_bus_width")
        )
        if not (clock and memory and bits):
            return None
        instructions = count * 256 * clock / 1e9  # clocks are in kHz
        matmul = instructions * _H100.matmul / _H100.instructions
        return Card(2 * memory * bits / 8 / 1e9, instructions, matmul, count)
    part = count / found.multiprocessors
    return Card(
        found.bandwidth * (part if "MIG" in name else 1),  # a part has as large a part of memory
        found.instructions * part,
        found.matmul * part,
        count,
    )


def apart(a: Card | None, b: Card | None) -> float:
    """How unlike two cards are, in octaves of bandwidth and rates; far if one is unknown."""
    if a is None or b is None:
        return 99.0
    return sum(abs(math.log2(x / y)) for x, y in zip(a[:3], b[:3], strict=True))


def smallbatch_cost(card: Card) -> float:
    """Smallbatch's time over FlashInfer's near the crossover, in that of an H100 SXM."""
    bandwidth, instructions = (x / y for x, y in zip(card[:2], _H100[:2], strict=True))
    return 1 - MEMORY_SHARE + MEMORY_SHARE * instructions / bandwidth


def expected_tiles(taken: float, tokens: int, tile: int) -> float:
    """How many tiles an expert's tokens fill on average, each token taking it by that chance."""
    mean, other = tokens * taken, 1 - taken
    if other <= 0:  # every token takes it
        return -(-tokens // tile)
    if mean > 200:  # the last tile is full to any part; and e^-mean is hardly a number any more
        return mean / tile + (tile - 1) / (2 * tile)
    chance = other**tokens  # of n tokens
    seen, total = 0.0, 0.0
    for n in range(tokens + 1):
        seen += chance
        if n % tile == 0:
            total += max(0.0, 1 - seen)  # that a tile more is begun
            if 1 - seen < 1e-9:
                break
        chance *= (tokens - n) / (n + 1) * taken / other
    return total
