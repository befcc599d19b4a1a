// Where the rows of a call's pairs lie, and the tokens that are copied there.
#pragma once
#include "config.cuh"
#include "routing.cuh"

// Where an expert's token tiles are.
struct __align__(8) ExpertRows {
    int first_row, width;
};

constexpr int CHUNK = 8;  // columns of 16 bytes

struct GatherArgs {
    Pairs pairs;
    const u16* x;               // bf16 [tokens, HIDDEN]
    const int* rows;            // moe_sort's
    const ExpertRows* experts;  // moe_sort's
    u8* tokens;                 // of fc1, as tokens.cuh says
    u8* h;                      // of fc2
    long long x_token_stride, x_column_stride;
    int x_in_chunks;  // whether each is 16 aligned bytes
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

// Where a token lies among those of one of its experts.
struct Place {
    u64 first_row;  // of the tile
    int width, row_in_tile;
};

// put(place): for each expert of a token that is not masked.
template <class Put>
DEVICE void for_each_place(const GatherArgs& args, int token, Put put) {
    const int top_k = args.pairs.top_k;
#pragma unroll 4
    for (int choice = 0; choice < top_k; choice++) {
        const int row = args.rows[token * top_k + choice];
        if (row < 0) continue;
        const ExpertRows expert = args.experts[args.pairs.expert_of_choice(token, choice, NUM_EXPERTS)];
        const int row_in_tile = (row - expert.first_row) % expert.width;
        put(Place{(u64)(row - row_in_tile), expert.width, row_in_tile});
    }
}
