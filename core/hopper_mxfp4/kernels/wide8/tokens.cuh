// How tokens lie: as wgmma reads them, e4m3. Of each token tile, for each k-tile, its rows of 128
// bytes with the 128-byte swizzle, and behind them a float32 scale a row, so that a stage's tokens
// and their scales are one contiguous copy.
#pragma once
#include "config.cuh"
#include "quantise.cuh"

constexpr int SCALE_BYTES = 4;
constexpr int ROW_BYTES = TILE_K + SCALE_BYTES;  // of a token in a k-tile
constexpr int TOKEN_STAGE_BYTES = (BLOCK_N * ROW_BYTES + 1023) / 1024 * 1024;

// Of a token in all of its k-tiles: a tile begins at that times its first row. fc1's tokens take
// the places of fc2's output, bf16 rows, of which they fill half.
DEVICE int token_bytes(bool is_fc2, int k_tiles) {
    return is_fc2 ? k_tiles * ROW_BYTES : HIDDEN_PADDED * 2;
}

// From where a tile begins: 16 bytes (a chunk of 16 columns) of a row, and a row's scale.
DEVICE u32 place_in_tile(int width, int row, int chunk) {
    return (chunk >> 3) * width * ROW_BYTES + row * TILE_K + ((chunk & 7 ^ row & 7) << 4);
}
DEVICE u32 place_of_scale(int width, int row, int k_tile) {
    return k_tile * width * ROW_BYTES + width * TILE_K + row * SCALE_BYTES;
}
