"""FlashInfer's SM90 mixed-input layout undone, in plain torch.

The helpers of flashinfer.fused_moe make it; these undo it. Weights, per expert, in blocks of 16
rows x 64 values (32 bytes a row): the 32-bit word c of row r + 8h of a block (r < 8, h < 2, c <
8) holds, with t = c mod 4 and k0 = 16 * (2 * (c div 4) + h) + 2t, the values k0, k0+1, k0+8 and
k0+9 of rows r and r + 8. Its low and high 16 bits hold the even and the odd k of a pair, each as
scattered bits of a bfloat16 (sign at 15, exponent at 8..7, mantissa at 6).
"""

import torch


def unpack_sm90_weight(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's `interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4")`.

    packed: uint8 [e, rows, K/2], rows a multiple of 16 and K of 64. Returns a new tensor of that
        shape.
    """
    e, rows, half_k = packed.shape
    words = (
        packed.contiguous().view(torch.int32).view(e, rows // 16, 2, 8, half_k // 32, 2, 4)
    )  # e, R, h, r, B, c div 4, t
    out = torch.empty(
        (e, rows // 16, 2, 8, half_k // 32, 2, 2, 2, 4), dtype=torch.uint8, device=packed.device
    )  # e,R,s,r,B,c,h,q,t
    for q in range(2):  # k0 or k0 + 8
        for s in range(2):  # row r or r + 8
            byte = _nibble(words, 2 * q + s) | _nibble(words >> 16, 2 * q + s) << 4
            out[:, :, s, :, :, :, :, q] = byte.to(torch.uint8).permute(0, 1, 3, 4, 5, 2, 6)
    return out.view(e, rows, half_k)


def _nibble(words: torch.Tensor, pair: int) -> torch.Tensor:
    """The e2m1 value of pair 0..3 in the low 16 bits of each word; higher bits are ignored."""
    scattered = words << 1 & 0x8000 | words >> 3 & 0x0180 | words >> 7 & 0x0040
    bits = scattered if pair == 3 else words << 3 * pair
    return bits >> 12 & 8 | bits >> 6 & 7


def unpack_sm90_scale_folded(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's scale helper of 0.6.16 to .post2 and from 0.6.18.

    packed: uint8 [e, rows/64, K/128, 16, 16]; byte [f, 4m + g] of a block is row 16m + f, group g.
    Returns uint8 [e, rows, K/32].
    """
    e, row_blocks, k_blocks = packed.shape[:3]
    blocks = packed.reshape(e, row_blocks, k_blocks, 16, 4, 4)
    return blocks.permute(0, 1, 4, 3, 2, 5).reshape(e, row_blocks * 64, k_blocks * 4)


def unpack_sm90_scale_by_k(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's scale helper of 0.6.10 to 0.6.15, 0.6.16.post3, .post4 and 0.6.17.

    packed: uint8 [e, K/128, rows * 4]. Returns uint8 [e, rows, K/32].
    """
    e, k_blocks, width = packed.shape
    return (
        packed.reshape(e, k_blocks, width // 4, 4)
        .permute(0, 2, 1, 3)
        .reshape(e, width // 4, k_blocks * 4)
    )


UNPACK_SM90_SCALE = {"folded": unpack_sm90_scale_folded, "by_k": unpack_sm90_scale_by_k}
