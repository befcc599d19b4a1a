// Tokens quantised and copied to where fc1 reads them.
#pragma once
#include "convert.cuh"
#include "pairs.cuh"
#include "tokens.cuh"

DEVICE u32 largest_magnitude(uint4 chunk) {
    u32 both = largest_magnitudes(chunk);
#pragma unroll
    for (int distance = 1; distance < TILE_K / CHUNK; distance *= 2)
        both = max_u16x2(both, __shfl_xor_sync(~0u, both, distance));
    return max(both & 0xffff, both >> 16) << 16;  // as float32
}

DEVICE u32 quantise_4(const Quantiser& quantiser, u32 first, u32 second) {
    const u32 low = quantiser(bf16_to_float(first & 0xffff), bf16_to_float(first >> 16));
    const u32 high = quantiser(bf16_to_float(second & 0xffff), bf16_to_float(second >> 16));
    return low | high << 16;
}

// Block (token, part): a part of the token's columns to the tiles of all its experts. 16
// neighbouring threads have a group.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    moe_gather(const __grid_constant__ GatherArgs args) {
    launch_next_kernel();
    const int token = blockIdx.x;
    const int first_chunk = blockIdx.y * (GATHER_THREADS * GATHER_CHUNKS) + thread_index();
    uint4 chunks[OWN_CHUNKS];
    load_chunks(args, token, first_chunk, chunks);
    uint2 quantised[OWN_CHUNKS];
    float scales[OWN_CHUNKS];
#pragma unroll
    for (int i = 0; i < OWN_CHUNKS; i++) {
        const uint4 chunk = chunks[i];
        const Quantiser quantiser(largest_magnitude(chunk));
        scales[i] = quantiser.scale;
        quantised[i] = make_uint2(quantise_4(quantiser, chunk.x, chunk.y),
                                  quantise_4(quantiser, chunk.z, chunk.w));
    }
    wait_for_previous_kernel();
    for_each_place(args, token, [&](u64 first_row, Place at) {
        u8* const to = args.tokens + first_row * token_bytes(false, FC1_K_TILES);
#pragma unroll
        for (int i = 0; i < OWN_CHUNKS; i++) {
            const int chunk = first_chunk + GATHER_THREADS * i;
            if (chunk >= HIDDEN_PADDED / CHUNK) continue;
            *(uint2*)(to + place_in_tile(at.width, at.row_in_tile, chunk >> 1) + 8 * (chunk & 1)) =
                quantised[i];
            if (chunk % (TILE_K / CHUNK) == 0)
                *(float*)(to + place_of_scale(at.width, at.row_in_tile,
                                              chunk / (TILE_K / CHUNK))) = scales[i];
        }
    });
    fence_async_proxy();  // the copy engine reads it
}
