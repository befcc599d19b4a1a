// x on its way to the tensor cores, multiplied by a power of two.
//
// Weights go into the tensor cores as 2^-126 of what they are, and their scales onto the sums of 32
// products each. For those sums to be normal floats, x must be large. So each warp multiplies its
// part of a token by a power of two that brings its largest value to X_TARGET, and its sums by the
// reciprocal: both exact. From X_TARGET, sums stay finite with scales up to 2^127, and precise with
// scales down to some 2^-120.
#pragma once
#include "convert.cuh"
#include "ptx.cuh"

constexpr int X_TARGET = 127 + 110;  // the exponent bits of 2^110

// The largest magnitude of eight bf16 numbers, as bf16 bits.
DEVICE u32 largest_magnitude(uint4 values) {
    const u32 pair = largest_magnitudes(values);
    return max(pair & 0xFFFF, pair >> 16);
}

// The exponent of the power of two that x is multiplied by, where `largest` is its largest
// magnitude. Within what keeps that power and 2^126 times its reciprocal floats.
DEVICE int x_shift(u32 largest) { return min(max(X_TARGET - (int)(largest >> 7), -1), 127); }

DEVICE uint4 shifted_x(uint4 values, int shift) {
    const u32 factor = (shift + 127) * 0x800080u;
    return make_uint4(mul_bf16x2(values.x, factor), mul_bf16x2(values.y, factor),
                      mul_bf16x2(values.z, factor), mul_bf16x2(values.w, factor));
}

// What sums of products of x shifted and weights' bits are multiplied by: 2^(126 - shift).
DEVICE float sums_factor(int shift) { return __uint_as_float((u32)(253 - shift) << 23); }
