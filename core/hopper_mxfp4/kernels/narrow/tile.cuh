// What a warp takes of a dot product at a time, by the tiles layout (tiles/layout.py).
#pragma once
#include "types.cuh"

constexpr int TILE_K = 64;

// Where in a k-tile a unit's weights begin: slices of 512 bytes, one behind the other.
constexpr int SLICE_WEIGHTS = 512;
DEVICE int unit_weights_at(int block) { return block * (2 * SLICE_WEIGHTS); }

// x is changed where it lies; each warp's part of a token has one factor.
constexpr int X_RAW_BYTES = 0;
constexpr int X_FACTORS = BLOCK_N;
