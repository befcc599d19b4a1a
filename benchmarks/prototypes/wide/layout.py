"""Weights for the wide kernel: [E, panels, tiles of 64 k, blocks of 64 rows, 2176 bytes].

A panel is what a block of threads multiplies, so that a stage's weights are one copy; the last one
may have fewer blocks.

A thread's 16 bytes of a block (four words of eight weights) lie together, those of a warpgroup in
the order of its threads, then the scales: four bytes for each of the eight rows r of each warp.
"""

import torch

# Of the four bits of a weight (sign, then e, e, m) of pair p: their places in the low half; and
# whether the sign of the low half's number is in the high half (and the other way round).
# decode.cuh undoes this.
OWN = (
    ((15, 8, 7, 6), False),
    ((5, 14, 13, 12), True),
    ((9, 2, 1, 0), False),
    ((3, 4, 11, 10), True),
)
NIBBLES = tuple(((4 * p + 3, 4 * p + 2, 4 * p + 1, 4 * p), False) for p in range(4))


def rows_of_gated(inter: int) -> torch.Tensor:
    """Source rows ([gate; up], inter each) of the blocks' rows; -1: none.

    Eight gate rows, their eight up rows, and so on.
    """
    blocks = -(-inter // 32)
    i = torch.arange(blocks * 64)
    column = i // 64 * 32 + i % 64 // 16 * 8 + i % 8
    return torch.where(column < inter, column + inter * (i % 16 // 8), -1)


def rows_of_plain(rows: int) -> torch.Tensor:
    """Row 2 t + i of half h of 16 is row 4 t + 2 h + i: a thread stores four neighbours."""
    blocks = -(-rows // 64)
    i = torch.arange(blocks * 64)
    half, t, low = i % 16 // 8, i % 8 // 2, i % 2
    row = i // 16 * 16 + 4 * t + 2 * half + low
    return torch.where(row < rows, row, -1)


def pack(
    weights: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    panel: int,
    nibbles: bool = False,
) -> torch.Tensor:
    """weights: [E, R, K/2] bytes, low nibble = even k. scales: [E, R, K/32] E8M0 bytes.

    rows: rows_of_gated or rows_of_plain. panel: blocks of 64 rows.
    """
    if int(scales.max()) > 128:
        raise ValueError("a scale above 2^1 does not fit the wide kernel's bf16 factor")
    out = []
    for w, s in zip(
        weights, scales, strict=True
    ):  # an expert at a time: int32 words take eight times the space
        blocks = _pack_expert(w, s, rows.to(w.device), NIBBLES if nibbles else OWN)
        parts = (p.transpose(0, 1).reshape(-1) for p in blocks.split(panel))
        out.append(torch.cat(tuple(parts)))
    return torch.stack(out)


def _pack_expert(w, s, rows, table) -> torch.Tensor:
    k = w.shape[1] * 2
    tiles = -(-k // 64)
    blocks = len(rows) // 64
    value = torch.stack((w & 15, w >> 4), 2).flatten(1)
    value = torch.nn.functional.pad(value[rows.clamp(min=0)], (0, tiles * 64 - k))
    value[rows < 0] = 0
    scale = torch.nn.functional.pad(s[rows.clamp(min=0)], (0, tiles * 2 - s.shape[1]))
    # row = (block, warp, half h, r); k = (tile, group, pair p, t, i)
    value = value.view(blocks, 4, 2, 8, tiles, 2, 4, 4, 2).to(torch.int32)
    word = 0
    for p, (places, crossed) in enumerate(table):
        for i in range(2):
            v = value[..., p, :, i]
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                half = i ^ (crossed and bit == 3)
                word = word | ((v >> bit & 1) << place + 16 * half)
    # block, warp, h, r, tile, group, t -> block, tile, (warp, r, t), (group, h)
    word = word.permute(0, 4, 1, 3, 6, 5, 2).contiguous().view(torch.uint8)
    scale = scale.view(blocks, 4, 2, 8, tiles, 2).permute(0, 4, 1, 3, 5, 2)
    parts = (word.reshape(blocks, tiles, 2048), scale.reshape(blocks, tiles, 128))
    return torch.cat(parts, 2)


def pack_bias(bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[E, R] to float32 [E, blocks * 64]."""
    rows = rows.to(bias.device)
    out = bias.float()[:, rows.clamp(min=0)]
    out[:, rows < 0] = 0
    return out.contiguous()
