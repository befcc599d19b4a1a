// How narrow cuts one of a layer's two GEMMs. Compiled for the layer's sizes, which come as macros
// (tiling.py chooses them):
//
//   GATED            1: fc1, gate and up rows, SwiGLU, one row of Hidden a pair
//                    0: fc2, times the top-k weight, one float row a pair
//   K                length of the dot product
//   ROWS             output rows (the intermediate or the hidden size)
//   NUM_EXPERTS      of this rank
//   BLOCK_N          tokens of a segment: 8 or 16
//   NUM_STREAMERS    warps that share a dot product
//   TILES_PER_WARP   k-tiles that each of them has of it, neighbours
//   NUM_STAGES       units whose sums may wait for a finisher
//   BLOCKS_PER_SM
//
// A unit is two slices of 16 weight rows and the whole dot product. In w13 a slice is 8 gate rows
// and their 8 up rows, so that a lane of a finisher holds both halves of what SwiGLU needs.
#pragma once
#include "arguments.cuh"
#include "routing.cuh"
#include "tile.cuh"
#include "types.cuh"

constexpr int GROUPS = TILE_K / 32;  // of values that share a scale
constexpr int SLICE_ROWS = 16;
constexpr int SLICES = 2;
constexpr int UNIT_ROWS = SLICES * SLICE_ROWS;
constexpr int N_TILES = BLOCK_N / 8;  // the tensor cores take 8 tokens at a time

constexpr int padded(int n) { return (n + TILE_K - 1) / TILE_K * TILE_K; }
constexpr int NUM_TILES = padded(K) / TILE_K;
constexpr int ROWS_PADDED = padded(ROWS);
constexpr int WEIGHT_ROWS = GATED ? 2 * ROWS_PADDED : ROWS_PADDED;
constexpr int OUTPUT_ROWS = GATED ? UNIT_ROWS / 2 : UNIT_ROWS;  // of a unit
constexpr int UNITS_PER_SEGMENT = ROWS / OUTPUT_ROWS;

// Bytes of a slice's and a unit's scales, of a k-tile and of an expert. Weights are [NUM_EXPERTS,
// NUM_TILES, TILE_WEIGHTS] and scales [NUM_EXPERTS, NUM_TILES, TILE_SCALES]; those of a unit lie
// together in each k-tile.
constexpr int SLICE_SCALES = SLICE_ROWS * GROUPS, UNIT_SCALES = SLICES * SLICE_SCALES;
constexpr int TILE_WEIGHTS = WEIGHT_ROWS * TILE_K / 2, TILE_SCALES = WEIGHT_ROWS * GROUPS;
constexpr u64 EXPERT_WEIGHTS = (u64)NUM_TILES * TILE_WEIGHTS;
constexpr u64 EXPERT_SCALES = (u64)NUM_TILES * TILE_SCALES;

constexpr int NUM_WARPS = NUM_STREAMERS + N_TILES * NUM_STAGES;  // a finisher for each 8 tokens
constexpr int NUM_THREADS = 32 * NUM_WARPS;

// A warp's part of x in shared memory, as 16-bit numbers: a row a token, and 16 bytes so that
// ldmatrix finds the rows in different banks.
constexpr int X_ROW_BYTES = TILES_PER_WARP * TILE_K * 2 + 16;
constexpr int X_WARP_BYTES = BLOCK_N * X_ROW_BYTES + X_RAW_BYTES;
constexpr int STAGE_SUMS = NUM_STREAMERS * SLICES * N_TILES * 32;  // float4s

// What the warps of a block share.
struct Shared {
    u8* x;             // [NUM_STREAMERS, X_WARP_BYTES]: of the segment at hand
    float* x_factors;  // [NUM_STREAMERS, X_FACTORS]: what sums of it must be multiplied by
    float4* sums;      // [NUM_STAGES, STAGE_SUMS]: each streamer's part of a unit's sums
    u64* full;         // [NUM_STAGES] mbarriers: the streamers have written a stage's sums
    u64* empty;        // [NUM_STAGES] mbarriers: the finishers have read them
    Routing<NUM_EXPERTS, BLOCK_N, NUM_THREADS> routing;
};

// A run of units: segment * UNITS_PER_SEGMENT + which rows of it.
struct Units {
    int begin, end;
};
