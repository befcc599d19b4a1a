"""The `tiles` layout: weights as wgmma's threads decode them into registers, in plain torch.

R rows and K columns are multiples of 64. Per expert:

weights  [K/64 k-tiles, R/64 blocks, 2048 bytes]. Thread i of the warpgroup that multiplies a block
         (warp w = i / 32, r = i % 32 / 4, t = i % 4) has the 16 bytes at 16 i: a word for each of
         two groups of 32 k and, in it, two rows r and r + 8 of its warp's 16. A word holds the
         eight weights of one row and group at k = 2t + 8p + {0, 1}, p = 0..3: one byte of the
         checkpoint for each p, its bits at PLACES.
scales   [K/64, R/64, 128 bytes]: E8M0 bytes by (w, r, group, row r or r + 8).

The rows of a block are ordered so that what a thread has after the multiplication lies together:
w13's r is the gate row and r + 8 the up row of one column, and w2's r = 2 t + i and r + 8 of two
neighbouring threads are four neighbours, 4 t + {0, 1} and 4 t + {2, 3}.
"""

import torch

from hopper_mxfp4.contract import Layout, Packing

BLOCK_ROWS = 64  # of a block, which is 64 columns wide too
# Of the four bits of a weight (sign, then e, e, m) of pair p: their places in a half of the word,
# the low one for the first number of the pair; and whether the signs are in each other's half.
# kernels/cuda/tiles.cuh undoes it: two registers of bf16 pairs take one instruction each, the
# third two, the fourth four.
PLACES = (
    ((15, 8, 7, 6), False),
    ((5, 14, 13, 12), True),
    ((9, 2, 1, 0), False),
    ((3, 4, 11, 10), True),
)


def _moves(places: tuple[int, ...], crossed: bool) -> list[tuple[int, int]]:
    """Which bits of a byte go how far to the left in the word: (mask, distance)."""
    by_distance: dict[int, int] = {}
    for number in range(2):
        for bit, place in zip((3, 2, 1, 0), places, strict=True):
            half = number ^ (crossed and bit == 3)
            distance = place + 16 * half - (4 * number + bit)
            by_distance[distance] = by_distance.get(distance, 0) | 1 << 4 * number + bit
    return [(mask, distance) for distance, mask in by_distance.items()]


_MOVES = [_moves(*pair) for pair in PLACES]


def _shift(t: torch.Tensor, distance: int) -> None:
    """To the left, in place."""
    if distance > 0:
        t <<= distance
    elif distance < 0:
        t >>= -distance


def split(t: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """A view with that dimension as several; one size may be -1."""
    return t.view(*t.shape[:dim], *sizes, *t.shape[dim + 1 :])


def by_block(t: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[e, R, ..] as the rows r and the rows r + 8 of all blocks: views [e, blocks, 4 w, 8 r, ..],
    or with r in two dimensions.
    """
    if gated:
        up, gate = split(t, 1, 2, -1, 4, 8).unbind(1)
        return gate, up
    low, high = split(t, 1, -1, 4, 4, 2, 2).unbind(4)
    return low, high


def front(t: torch.Tensor, tile: int, *last: int) -> torch.Tensor:
    """A view with dimension `tile` behind the experts and those of `last` at the end, in order."""
    rest = [d for d in range(1, t.dim()) if d != tile and d not in last]
    return t.permute(0, tile, *rest, *last)


def _word_bytes(rows: torch.Tensor) -> list[torch.Tensor]:
    """[.., K/2] rows of one half as the bytes of the words, a view for each pair:
    [e, k-tiles, blocks, w, r.., t, group].
    """
    k = rows.dim() - 1
    parts = split(rows, k, -1, 2, 4, 4)  # k-tile, group, pair, t
    # With the pair unbound: k-tile k, group k + 1, t k + 2.
    return [front(part, k, k + 2, k + 1) for part in parts.unbind(k + 2)]


def _scale_bytes(rows: torch.Tensor) -> torch.Tensor:
    """[.., K/32] rows of one half: a view [e, k-tiles, blocks, w, r.., group]."""
    k = rows.dim() - 1
    return front(split(rows, k, -1, 2), k, k + 1)


def _pack_weight(w: torch.Tensor, gated: bool) -> torch.Tensor:
    """uint8 [e, R, K/2] to the same shape."""
    halves = [_word_bytes(rows) for rows in by_block(w, gated)]
    words = torch.zeros((*halves[0][0].shape, 2), dtype=torch.int32, device=w.device)
    byte, moved = torch.empty_like(words), torch.empty_like(words)
    for pair, moves in enumerate(_MOVES):
        for half in range(2):
            byte[..., half] = halves[half][pair]
        for mask, distance in moves:
            torch.bitwise_and(byte, mask, out=moved)
            _shift(moved, distance)
            words |= moved
    return words.view(torch.uint8).view(w.shape)


def _unpack_weight(packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """The inverse of `_pack_weight`."""
    w = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    halves = [_word_bytes(rows) for rows in by_block(w, gated)]
    words = packed.contiguous().view(torch.int32).view(*halves[0][0].shape, 2)
    byte, moved = torch.empty_like(words), torch.empty_like(words)
    for pair, moves in enumerate(_MOVES):
        byte.zero_()
        for mask, distance in moves:
            if distance >= 0:
                torch.bitwise_and(words, _as_int32(mask << distance), out=moved)
            else:
                torch.bitwise_and(words, mask >> -distance, out=moved)
            _shift(moved, -distance)
            moved &= mask  # the sign bit came along
            byte |= moved
        for half in range(2):
            halves[half][pair].copy_(byte[..., half])
    return w


def _as_int32(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def _pack_scale(s: torch.Tensor, gated: bool) -> torch.Tensor:
    """uint8 [e, R, K/32] to the same shape."""
    halves = [_scale_bytes(rows) for rows in by_block(s, gated)]
    return torch.stack(halves, dim=-1).view(s.shape)


def _unpack_scale(packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """The inverse of `_pack_scale`."""
    s = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    halves = [_scale_bytes(rows) for rows in by_block(s, gated)]
    found = packed.reshape(*halves[0].shape, 2)
    for half in range(2):
        halves[half].copy_(found[..., half])
    return s


def _packing(gated: bool) -> Packing:
    return Packing(
        pack_weight=lambda w: _pack_weight(w, gated),
        pack_scale=lambda s: _pack_scale(s, gated),
        unpack_weight=lambda w: _unpack_weight(w, gated),
        unpack_scale=lambda s: _unpack_scale(s, gated),
    )


# The greatest E8M0 byte of weights that become bf16: times 2^126, the factor that tiles.cuh makes,
# it is the last power of two that bf16 has. Beyond, weights have magnitudes of 8 and more.
MOST_FOR_BF16 = 128

TILES = Layout(
    "tiles",
    BLOCK_ROWS,
    *_packing(gated=False),
    least_scale=1,  # whose power of two is a normal float: narrow multiplies sums by it
    w13=_packing(gated=True),
)
