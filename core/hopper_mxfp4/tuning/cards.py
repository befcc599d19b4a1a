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
