// How smallbatch cuts one of a layer's two GEMMs. Compiled for the layer's sizes, which come as
// macros (tiling.py chooses them):
//
//   GATED               1: fc1, gate and up rows, SwiGLU, one bf16 row a pair
//                       0: fc2, times the top-k weight, one float row a pair
//   K, K_PADDED         length of the dot product, true and as the weights are padded
//   ROWS, ROWS_PADDED   output rows (the intermediate or the hidden size), likewise
//   NUM_EXPERTS         of this rank
//   BLOCK_N             tokens of a segment: 8 or 16
//   NUM_STREAMERS       warps that share a dot product
//   CHUNKS_PER_WARP     chunks of BLOCK_K that each of them has of it
//   NUM_STAGES          units whose sums may wait for a finisher
//   BLOCKS_PER_SM
//
// A unit is BLOCK_M rows of a segment and the whole dot product: two slabs of 16 rows, which are 16
// gate and the same 16 up rows of w13, or 32 neighbouring rows of w2.
#pragma once
#include "gemms_and_sum.cuh"
#include "routing.cuh"
#include "types.cuh"

constexpr int SLAB_ROWS = 16;
constexpr int BLOCK_M = 2 * SLAB_ROWS;
constexpr int BLOCK_K = 128;
constexpr int N_TILES = BLOCK_N / 8;  // the tensor cores take 8 tokens at a time

constexpr int NUM_CHUNKS = K_PADDED / BLOCK_K;
constexpr int OUTPUT_ROWS = GATED ? SLAB_ROWS : BLOCK_M;  // of a unit
constexpr int UNITS_PER_SEGMENT = ROWS / OUTPUT_ROWS;

constexpr int NUM_WARPS = NUM_STREAMERS + N_TILES * NUM_STAGES;  // a finisher for each 8 tokens
constexpr int NUM_THREADS = 32 * NUM_WARPS;

// Weights are [NUM_EXPERTS, WEIGHT_ROWS, ROW_BYTES] and scales [NUM_EXPERTS, WEIGHT_ROWS / 64,
// NUM_CHUNKS, SCALE_BYTES], as FlashInfer interleaves and folds them (flashinfer/layout.py).
constexpr int WEIGHT_ROWS = GATED ? 2 * ROWS_PADDED : ROWS_PADDED;  // w13 is [up; gate]
constexpr int ROW_BYTES = K_PADDED / 2;
constexpr int CHUNK_BYTES = BLOCK_K / 2;  // of a row
constexpr int SCALE_BYTES = 16 * 16;      // of 64 rows of a chunk: [row % 16, row / 16, k / 32]
constexpr int X_CHUNK_BYTES = 2 * BLOCK_K * BLOCK_N;
constexpr int FRAGMENT_BYTES = 32 * 16;  // of x, 16 bytes a lane: half of two B operands
constexpr int STAGE_SUMS = NUM_STREAMERS * 2 * N_TILES * 32;  // float4s

// What the warps of a block share.
struct Shared {
    u8* x;         // [NUM_CHUNKS, X_CHUNK_BYTES]: of the segment at hand, see Streamer::gather_x
    float4* sums;  // [NUM_STAGES, STAGE_SUMS]: each streamer's part of a unit's sums
    u64* full;     // [NUM_STAGES] mbarriers: the streamers have written a stage's sums
    u64* empty;    // [NUM_STAGES] mbarriers: the finishers have read them
    Routing<NUM_EXPERTS, BLOCK_N, NUM_THREADS> routing;
};

// A run of units: segment * UNITS_PER_SEGMENT + which rows of it.
struct Units {
    int begin, end;
};
