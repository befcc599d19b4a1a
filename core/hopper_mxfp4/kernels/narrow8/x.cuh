// x on its way to the tensor cores: quantised to e4m3 and held as fp16, which has the same numbers.
//
// Eight columns come to a lane; 16 neighbouring lanes have a group of 128, which shares a scale.
// Of 32 columns in shared memory, each of four runs of 16 bytes is what ldmatrix hands the four
// lanes of a token, in the order in which these have weights: k = 4t + {0, 1} of the lanes t, then
// 4t + {2, 3}, and the same of the upper 16.
#pragma once
#include "config.cuh"
#include "convert.cuh"
#include "ptx.cuh"
#include "quantise.cuh"

struct Columns {
    float values[8];

    // As fc1 gets them, bf16, and as fc2 does, float32.
    DEVICE void load(const uint4* raw) {
        const uint4 first = raw[0];
        if (GATED) {
            const u32 pairs[4] = {first.x, first.y, first.z, first.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                values[i] = bf16_to_float(pairs[i >> 1] >> (i & 1) * 16 & 0xffff);
        } else {
            const uint4 second = raw[1];
            const u32 bits[8] = {first.x,  first.y,  first.z,  first.w,
                                 second.x, second.y, second.z, second.w};
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = __uint_as_float(bits[i]);
        }
    }

    // The largest magnitude of the group, as float32 bits.
    DEVICE u32 largest_of_group() const {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(fabsf(values[i])));
#pragma unroll
        for (int distance = 1; distance < TILE_K / 8; distance *= 2)
            largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
        return largest;
    }

    // piece: which eight of the row's columns they are.
    DEVICE void store(u8* row, int piece, const Quantiser& quantiser) const {
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = e4m3x2_to_fp16x2(quantiser(values[2 * i], values[2 * i + 1]));
        u8* const to = row + (piece >> 2) * 64 + (piece >> 1 & 1) * 32 + (piece & 1) * 8;
        *(uint2*)to = make_uint2(pairs[0], pairs[2]);
        *(uint2*)(to + 16) = make_uint2(pairs[1], pairs[3]);
    }
};
