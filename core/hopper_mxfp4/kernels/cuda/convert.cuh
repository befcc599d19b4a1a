// Numbers from one format to another: bf16, and MXFP4's e2m1 values and E8M0 scales.
#pragma once
#include "ptx.cuh"

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u32 pack_bf16x2(float low, float high) {
    return round_to_bf16(low) | (u32)round_to_bf16(high) << 16;
}

// FlashInfer's interleaved layout scatters the bits of four pairs of e2m1 values over a word, so
// that a pair shifted into place is two bf16 numbers: sign at bit 15, exponent at 8..7, mantissa at
// 6. Read so, a value is 2^-126 of what it stands for; e8m0_factor makes up for it.
#define E2M1_BITS_IN_BF16X2 0x81C081C0u

// Pair 0 to 3 of an interleaved word. The last has the bits that the others leave.
template <int PAIR>
DEVICE u32 e2m1_pair(u32 word) {
    if (PAIR < 3) return word << 3 * PAIR & E2M1_BITS_IN_BF16X2;
    return (word << 1 & 0x80008000u) | (word >> 3 & 0x01800180u) | (word >> 7 & 0x00400040u);
}

// The bf16 number 2^(exponent - 127), twice.
DEVICE u32 power_of_two_bf16x2(u32 exponent) { return exponent * 0x800080u; }

// What an e2m1_pair must be multiplied by: 2^126 times the scale, twice. That would overflow from
// E8M0 byte 129 on. Where there may be such bytes (MAY_BE_LARGE), those factors stop at byte 128,
// and e8m0_remaining_factor is the rest: 1 up to byte 128.
template <bool MAY_BE_LARGE>
DEVICE u32 e8m0_factor(u32 scale) {
    return power_of_two_bf16x2((MAY_BE_LARGE && scale > 128 ? 128 : scale) + 126);
}

DEVICE u32 e8m0_remaining_factor(u32 scale) {
    return power_of_two_bf16x2(scale > 128 ? scale - 1 : 127);
}
