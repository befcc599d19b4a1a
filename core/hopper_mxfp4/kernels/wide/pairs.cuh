// Where the rows of a call's pairs lie, and the tokens that are copied there.
#pragma once
#include "config.cuh"
#include "routing.cuh"

// Where a pair's token lies: row_in_tile of a tile of that width.
struct __align__(4) Place {
    u16 width, row_in_tile;
};

constexpr int CHUNK = 8;  // columns of 16 bytes

struct GatherArgs {
    const u16* x;         // bf16 [tokens, HIDDEN]
    const int* rows;      // moe_sort's
    const Place* places;  // moe_sort's
    u8* tokens;           // of fc1, as tokens.cuh says
    u8* h;                // of fc2
    long long x_token_stride, x_column_stride;
    int x_in_chunks;  // whether each is 16 aligned bytes
    int top_k;
};

DEVICE uint4 load_x(const GatherArgs& args, int token, int chunk) {
    if (chunk >= HIDDEN / CHUNK) return make_uint4(0, 0, 0, 0);
    const u16* from = args.x + token * args.x_token_stride;
    if (args.x_in_chunks) return *((const uint4*)from + chunk);
    from += CHUNK * chunk * args.x_column_stride;
    uint4 value;
#pragma unroll
    for (int i = 0; i < 4; i++)
        (&value.x)[i] = from[2 * i * args.x_column_stride] |
                        (u32)from[(2 * i + 1) * args.x_column_stride] << 16;
    return value;
}

constexpr int GATHER_THREADS = 128;
constexpr int GATHER_CHUNKS = 8;  // of a thread
constexpr int LOADS = (HIDDEN_PADDED / CHUNK + GATHER_THREADS - 1) / GATHER_THREADS;
constexpr int OWN_CHUNKS = LOADS < GATHER_CHUNKS ? LOADS : GATHER_CHUNKS;

// Chunks of a token that a thread has: `first` and every GATHER_THREADS from there on.
DEVICE void load_chunks(const GatherArgs& args, int token, int first, uint4 (&chunks)[OWN_CHUNKS]) {
#pragma unroll
    for (int i = 0; i < OWN_CHUNKS; i++)
        chunks[i] = load_x(args, token, first + GATHER_THREADS * i);
}

// put(first row of the tile, place): for each expert of a token that is not masked.
template <class Put>
DEVICE void for_each_place(const GatherArgs& args, int token, Put put) {
#pragma unroll 4
    for (int choice = 0; choice < args.top_k; choice++) {
        const int row = args.rows[token * args.top_k + choice];
        const Place place = args.places[token * args.top_k + choice];
        if (row >= 0) put((u64)(row - place.row_in_tile), place);
    }
}
