// Tokens copied to where fc1 reads them.
#pragma once
#include "pairs.cuh"
#include "tokens.cuh"

// Block (token, part): a part of the token's columns to the tiles of all its experts.
// Columns of h that fc1 does not write become zeros.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    moe_gather(const __grid_constant__ GatherArgs args) {
    const int token = blockIdx.x;
    const int first_chunk = blockIdx.y * (GATHER_THREADS * GATHER_CHUNKS) + thread_index();
    constexpr int LOADS = (HIDDEN_PADDED / CHUNK + GATHER_THREADS - 1) / GATHER_THREADS;
    constexpr int OWN_CHUNKS = LOADS < GATHER_CHUNKS ? LOADS : GATHER_CHUNKS;
    uint4 chunks[OWN_CHUNKS];
#pragma unroll
    for (int i = 0; i < OWN_CHUNKS; i++)
        chunks[i] = load_x(args, token, first_chunk + GATHER_THREADS * i);
    wait_for_previous_kernel();
    const int top_k = args.pairs.top_k;
#pragma unroll 4
    for (int choice = 0; choice < top_k; choice++) {
        const int row = args.rows[token * top_k + choice];
        if (row < 0) continue;
        const ExpertRows expert = args.experts[args.pairs.expert_of_choice(token, choice)];
        const int row_in_tile = (row - expert.first_row) % expert.width;
        const u64 first_row = row - row_in_tile;
        u8* const to = args.tokens + first_row * token_bytes(false, FC1_K_TILES);
#pragma unroll
        for (int i = 0; i < OWN_CHUNKS; i++) {
            const int chunk = first_chunk + GATHER_THREADS * i;
            if (chunk < HIDDEN_PADDED / CHUNK)
                *(uint4*)(to + place_in_tile(expert.width, row_in_tile, chunk)) = chunks[i];
        }
        const int unwritten = FC1_COLUMNS / CHUNK + first_chunk;
        if (unwritten < INTER_PADDED / CHUNK)
            *(uint4*)(args.h + first_row * token_bytes(true, FC2_K_TILES) +
                      place_in_tile(expert.width, row_in_tile, unwritten)) =
                make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();  // the copy engine reads it
    launch_next_kernel();
}
