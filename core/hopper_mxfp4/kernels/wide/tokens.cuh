// How tokens lie: as wgmma reads them. Of each token tile, for each k-tile, its rows of 128 bytes
// with the 128-byte swizzle, so that a stage's tokens are one contiguous copy.
#pragma once
#include "config.cuh"

constexpr int ROW_BYTES = TILE_K * 2;  // of a token in a k-tile
constexpr int TOKEN_STAGE_BYTES = BLOCK_N * ROW_BYTES;

// Of a token in all of its k-tiles: a tile begins at that times its first row. fc2's output takes
// the place of fc1's tokens.
DEVICE int token_bytes(bool, int k_tiles) { return k_tiles * ROW_BYTES; }

// From where a tile begins: 16 bytes (a chunk of 8 columns) of a row.
DEVICE u32 place_in_tile(int width, int row, int chunk) {
    return ((chunk >> 3) * width + row) * ROW_BYTES + ((chunk & 7 ^ row & 7) << 4);
}
