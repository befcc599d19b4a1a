// Weights of the tiles-e5m2 layout (kernels/tiles/e5m2.py), from eight 4-bit numbers in a word to
// registers of the tensor cores' A operand in e5m2.
//
// A word has eight weights of one row and one group of 32 k, so of one scale: k = 4t + {0, 1, 2, 3}
// in its low half and 16 more in its high half, where t is the lane's place among the four that
// share a row.
#pragma once
#include "ptx.cuh"

// scale: how many octaves the group's scale lies above its row's least, 0 to 26. What comes out
// is the weights times 2^(scale - 13).
//
// The eight magnitudes are bytes of e5m2 in two words, times 2^-13 as constants; adding to the
// exponents of all but zero is a multiplication and an addition. A nibble's lower three bits choose
// among them.
DEVICE void decode_word(u32 word, u32 scale, u32& low, u32& high) {
    constexpr u32 SIGNS = 0x80808080u;
    const u32 small = scale * 0x04040400u + 0x0A080400u;  // 0, 0.5, 1, 1.5
    const u32 large = scale * 0x04040404u + 0x12100E0Cu;  // 2, 3, 4, 6
    const u32 magnitudes = word & 0x77777777u;
    low = permute_bytes(small, large, magnitudes) | (word & SIGNS);
    high = permute_bytes(small, large, magnitudes >> 16) | (word << 4 & SIGNS);
}

// Two of four e5m2 numbers as fp16, of which they are the upper bytes: first those of the low half.
DEVICE u32 e5m2_to_fp16x2(u32 four, int half) {
    return permute_bytes(four, 0, half ? 0x3424 : 0x1404);
}

// A row's four scales of 128 k come as bytes: a scale each in the lower five bits, and the E8M0
// byte of the row's least scale spread over the upper two.
DEVICE u32 tile_scales(u32 bytes) { return bytes & 0x1F1F1F1Fu; }

DEVICE u32 row_base(u32 bytes) {
    return (bytes >> 6 & 0x03) | (bytes >> 12 & 0x0C) | (bytes >> 18 & 0x30) | (bytes >> 24 & 0xC0);
}

// 2^13 times that scale. Up to byte 241 float32 has such a number: Layout.greatest_scale.
DEVICE float row_factor(u32 base) { return __uint_as_float((base + 13) << 23); }
