// Tokens copied to where fc1 reads them.
#pragma once
#include "pairs.cuh"
#include "tokens.cuh"

// Block (token, part): a part of the token's columns to the tiles of all its experts.
// Columns of h that fc1 does not write become zeros.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    moe_gather(const __grid_constant__ GatherArgs args) {
    launch_next_kernel();
    const int token = blockIdx.x;
    const int first_chunk = blockIdx.y * (GATHER_THREADS * GATHER_CHUNKS) + thread_index();
    uint4 chunks[OWN_CHUNKS];
    load_chunks(args, token, first_chunk, chunks);
    wait_for_previous_kernel();
    for_each_place(args, token, [&](u64 first_row, Place at) {
        u8* const to = args.tokens + first_row * token_bytes(false, FC1_K_TILES);
#pragma unroll
        for (int i = 0; i < OWN_CHUNKS; i++) {
            const int chunk = first_chunk + GATHER_THREADS * i;
            if (chunk < HIDDEN_PADDED / CHUNK)
                *(uint4*)(to + place_in_tile(at.width, at.row_in_tile, chunk)) = chunks[i];
        }
        const int unwritten = FC1_COLUMNS / CHUNK + first_chunk;
        if (unwritten < INTER_PADDED / CHUNK)
            *(uint4*)(args.h + first_row * token_bytes(true, FC2_K_TILES) +
                      place_in_tile(at.width, at.row_in_tile, unwritten)) =
                make_uint4(0, 0, 0, 0);
    });
    fence_async_proxy();  // the copy engine reads it
}
