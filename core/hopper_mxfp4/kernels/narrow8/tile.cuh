// What a warp takes of a dot product at a time, by the tiles-e5m2 layout (tiles/e5m2.py): 128 of K,
// for which a token has one scale.
#pragma once
#include "types.cuh"

constexpr int TILE_K = 128;

// Where in a k-tile a unit's weights begin: a block of 64 rows, two units, has the first 64 k of
// each of its slices, 512 bytes, and then the others.
constexpr int SLICE_WEIGHTS = 512, BLOCK_WEIGHTS = 4096;
DEVICE int unit_weights_at(int unit) {
    return (unit >> 1) * BLOCK_WEIGHTS + (unit & 1) * (2 * SLICE_WEIGHTS);
}

// x as it comes, a few tokens at a time, before it is quantised: bf16 in fc1, float32 in fc2.
constexpr int X_AT_ONCE = 4;
constexpr int X_NUMBER_BYTES = GATED ? 2 : 4;
constexpr int X_RAW_ROW_BYTES = TILES_PER_WARP * TILE_K * X_NUMBER_BYTES;
constexpr int X_RAW_BYTES = X_AT_ONCE * X_RAW_ROW_BYTES;
constexpr int X_FACTORS = TILES_PER_WARP * BLOCK_N;  // a token's scale of each k-tile
