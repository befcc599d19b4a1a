// What becomes of a row's sums before anything else, and what fc1 writes.
#pragma once
#include "config.cuh"
#include "e5m2.cuh"

// Weights were multiplied by the octaves that their scales lie above their row's base; the base
// comes here, with what decoding leaves.
struct RowFactors {
    float factors[SLICES][2];  // [slice][row or row + 8]

    DEVICE void load(const GemmArgs& args, const Segment& segment, int block, int row) {
        const u8* const of_unit =
            args.scales + segment.expert * EXPERT_SCALES + block * UNIT_SCALES;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            const uint2 bytes = *(const uint2*)(of_unit + slice * SLICE_SCALES + row * 8);
            factors[slice][0] = row_factor(row_base(bytes.x));
            factors[slice][1] = row_factor(row_base(bytes.y));
        }
    }
    DEVICE float scaled(float sum, int slice, int half) const { return sum * factors[slice][half]; }
};

typedef float Hidden;  // fc2 quantises it, and bf16 would be another number
DEVICE Hidden as_hidden(float value) { return value; }
