// bf16 numbers from and to float32.
#pragma once
#include "ptx.cuh"

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u32 pack_bf16x2(float low, float high) {
    return round_to_bf16(low) | (u32)round_to_bf16(high) << 16;
}
