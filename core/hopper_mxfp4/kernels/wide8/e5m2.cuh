// Weights of the tiles-e5m2 layout (kernels/tiles/e5m2.py), from eight 4-bit numbers in a word to
// registers of the tensor cores' A operand in e5m2.
//
// A thread has all weights of group t of 32 k of its rows, where t is the lane's place among the
// four that share a row: one scale a row in 128 k, and four words of eight weights.
#pragma once
#include "ptx.cuh"

// The eight magnitudes as bytes of e5m2, times 2^(octaves - 13): adding to the exponents of all but
// zero is a multiplication and an addition.
struct Magnitudes {
    u32 small, large;

    // octaves: that the group's scale lies above its row's base, 0 to 26, in the lower five bits of
    // a byte.
    DEVICE Magnitudes(u32 byte) {
        const u32 octaves = byte & 0x1F;
        small = octaves * 0x04040400u + 0x0A080400u;  // 0, 0.5, 1, 1.5
        large = octaves * 0x04040404u + 0x12100E0Cu;  // 2, 3, 4, 6
    }

    // A word's first four weights and the others. A nibble's lower three bits choose.
    DEVICE void decode(u32 word, u32& first, u32& second) const {
        constexpr u32 SIGNS = 0x80808080u;
        const u32 which = word & 0x77777777u;
        first = permute_bytes(small, large, which) | (word & SIGNS);
        second = permute_bytes(small, large, which >> 16) | (word << 4 & SIGNS);
    }
};

// The E8M0 byte of a row's base, spread over the upper two bits of its four scales of 128 k.
DEVICE u32 row_base(u32 bytes) {
    return (bytes >> 6 & 0x03) | (bytes >> 12 & 0x0C) | (bytes >> 18 & 0x30) | (bytes >> 24 & 0xC0);
}

// 2^13 times that scale. Up to byte 241 float32 has such a number: Layout.greatest_scale.
DEVICE float row_factor(u32 base) { return __uint_as_float((base + 13) << 23); }
