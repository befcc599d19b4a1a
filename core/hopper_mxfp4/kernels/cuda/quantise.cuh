// Numbers on their way to 8 bits.
//
// A token's group of 128 columns becomes e4m3 numbers times its largest magnitude over 448, the
// largest of e4m3 (reference/moe.py has the definition). Magnitudes are compared as integers, to
// which NaN is larger than infinity, so that a group with NaN becomes NaN.
#pragma once
#include "ptx.cuh"

constexpr u32 LEAST_MAGNITUDE = 0x0DA24260u;  // 1e-30, for groups of zeros

// The quotient, rounded to nearest as IEEE 754 has it: bf16 numbers and their scales are often so
// that it lies at or next to a tie of e4m3.
DEVICE float divide(float value, float by, float reciprocal) {
    const float near = value * reciprocal;
    return fmaf(fmaf(-near, by, value), reciprocal, near);
}

struct Quantiser {
    float scale, reciprocal;

    DEVICE Quantiser(u32 magnitude) {
        scale = __uint_as_float(max(magnitude, LEAST_MAGNITUDE)) * (1.0f / 448.0f);
        reciprocal = reciprocal_approx(scale);
    }

    // e4m3, the first value low.
    DEVICE u32 operator()(float first, float second) const {
        return round_to_e4m3x2(divide(first, scale, reciprocal),
                               divide(second, scale, reciprocal));
    }
};
