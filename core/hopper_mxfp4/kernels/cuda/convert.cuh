// bf16 numbers as float32, and their magnitudes.
#pragma once
#include "ptx.cuh"

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Of the low and of the high halves of four pairs of bf16 numbers, the largest magnitude's bits.
DEVICE u32 largest_magnitudes(uint4 pairs) {
    constexpr u32 WITHOUT_SIGNS = 0x7fff7fffu;
    return max_u16x2(max_u16x2(pairs.x & WITHOUT_SIGNS, pairs.y & WITHOUT_SIGNS),
                     max_u16x2(pairs.z & WITHOUT_SIGNS, pairs.w & WITHOUT_SIGNS));
}
