"""The `tiles-e5m2` layout: weights as threads decode them into e5m2 registers, in plain torch.

R rows and K columns are multiples of 128. Blocks of 64 rows, and the order of rows in one, are
those of the tiles layout; k-tiles are twice as deep. Per expert:

weights  [K/128 k-tiles, R/64 blocks, 4096 bytes]. Thread i of the warpgroup that multiplies a block
         (warp w = i / 32, r = i % 32 / 4, t = i % 4) has the 16 bytes at 16 i for the first 64 k
         and those at 2048 + 16 i for the others: a word for each of two groups of 32 k and, in it,
         two rows r and r + 8 of its warp's 16. A word holds eight weights of one row and group, at
         k = 4t + {0, 1, 2, 3} and 16 more. Magnitude n, three bits, is at the bottom of nibble n,
         as in the checkpoint. Signs are on top of the nibbles: those of the first four weights in
         the odd ones, where bytes have their signs, and those of the others in the even ones.
scales   [K/128, R/64, 256 bytes] by (w, r, row r or r + 8, group): in the lower five bits how many
         octaves the group's scale lies above its row's base, and in the upper two a quarter of that
         base, the lowest bits first. A row's base is its least E8M0 byte, or GREATEST_BASE.

A row's scales must lie within 27 octaves: e5m2's normal numbers hold 0.5 to 6, which have one bit
of mantissa, times 2^-13 to 2^13 (kernels/wide8/e5m2.cuh).
"""

import torch

from hopper_mxfp4.contract import Layout, Packing
from hopper_mxfp4.kernels.tiles.layout import by_block, front, split

TILE_K = 128
GREATEST_SPREAD = 26  # between the least and the greatest scale byte of a row
GREATEST_BASE = 241  # of which float32 has 2^13 times the scale
NO_SCALE = 255  # E8M0's NaN, which no weight has: what padding is filled with
_OCTAVES, _BASE_SHIFT = 0x1F, 6
_MAGNITUDES = 0x77777777
_SIGN_PLACES = (7, 15, 23, 31, 3, 11, 19, 27)  # of nibbles 0 to 7, in the checkpoint's order


def _word_bytes(rows: torch.Tensor) -> torch.Tensor:
    """[.., K/2] rows of one half: the bytes of words, a view [e, k-tiles, blocks, 64 k, w, r.., t,
    group, k / 16, byte].
    """
    k = rows.dim() - 1
    # k-tile k, 64 k, group k + 2, k / 16, t k + 4, byte
    parts = split(rows, k, -1, 2, 2, 2, 4, 2)
    return front(parts, k, k + 4, k + 2, k + 3, k + 5).movedim(-5, 3)


def _scale_bytes(rows: torch.Tensor) -> torch.Tensor:
    """[.., K/32] rows of one half: a view [e, k-tiles, blocks, w, r.., group]."""
    k = rows.dim() - 1
    return front(split(rows, k, -1, 4), k, k + 1)


def _move_signs(words: torch.Tensor, back: bool) -> torch.Tensor:
    """Of int32 words, between the checkpoint's order and the layout's."""
    result, moved = words & _MAGNITUDES, torch.empty_like(words)
    for nibble, place in enumerate(_SIGN_PLACES):
        source = 4 * nibble + 3
        if back:
            source, place = place, source
        torch.bitwise_right_shift(words, source, out=moved)
        moved &= 1
        moved <<= place
        result |= moved
    return result


def _pack_weight(w: torch.Tensor, gated: bool) -> torch.Tensor:
    """uint8 [e, R, K/2] to the same shape."""
    halves = [_word_bytes(rows) for rows in by_block(w, gated)]
    packed = torch.stack(halves, dim=-3).view(-1)
    return _move_signs(packed.view(torch.int32), back=False).view(torch.uint8).view(w.shape)


def _unpack_weight(packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """The inverse of `_pack_weight`."""
    w = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    halves = [_word_bytes(rows) for rows in by_block(w, gated)]
    words = _move_signs(packed.contiguous().view(torch.int32), back=True)
    *shape, columns, size = halves[0].shape
    found = words.view(torch.uint8).view(*shape, 2, columns, size)
    for half in range(2):
        halves[half].copy_(found[..., half, :, :])
    return w


def _base_shifts(s: torch.Tensor) -> torch.Tensor:
    """Which bits of a row's base each of its bytes has."""
    return torch.arange(s.shape[-1], device=s.device, dtype=torch.uint8) % 4 * 2


def _pack_scale(s: torch.Tensor, gated: bool) -> torch.Tensor:
    """uint8 [e, R, K/32] to the same shape, where each row's bytes but NO_SCALE are within
    GREATEST_SPREAD.
    """
    base = s.amin(-1, keepdim=True).clamp_(max=GREATEST_BASE)
    octaves = torch.where(s == NO_SCALE, 0, s - base)
    encoded = octaves | (base >> _base_shifts(s)) << _BASE_SHIFT
    halves = [_scale_bytes(rows) for rows in by_block(encoded, gated)]
    return torch.stack(halves, dim=-2).view(s.shape)


def _unpack_scale(packed: torch.Tensor, gated: bool) -> torch.Tensor:
    """The inverse of `_pack_scale`, but for NO_SCALE."""
    encoded = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    halves = [_scale_bytes(rows) for rows in by_block(encoded, gated)]
    *shape, groups = halves[0].shape
    found = packed.reshape(*shape, 2, groups)
    for half in range(2):
        halves[half].copy_(found[..., half, :])
    bases = (encoded >> _BASE_SHIFT) << _base_shifts(encoded)
    of_four = bases.view(*bases.shape[:-1], -1, 4).sum(-1, dtype=torch.uint8)
    return (encoded & _OCTAVES) + of_four.repeat_interleave(4, -1)


def _packing(gated: bool) -> Packing:
    return Packing(
        pack_weight=lambda w: _pack_weight(w, gated),
        pack_scale=lambda s: _pack_scale(s, gated),
        unpack_weight=lambda w: _unpack_weight(w, gated),
        unpack_scale=lambda s: _unpack_scale(s, gated),
    )


TILES_E5M2 = Layout(
    "tiles-e5m2",
    TILE_K,
    *_packing(gated=False),
    w13=_packing(gated=True),
    greatest_spread=GREATEST_SPREAD,
    padding_scale=NO_SCALE,
)
