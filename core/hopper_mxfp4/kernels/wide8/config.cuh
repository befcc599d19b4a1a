// How wide8 cuts a layer: both grouped GEMMs in one launch. Compiled for the layer's sizes, which
// come as macros (tiling.py chooses them). They are wide's, where they are described, but for
//
//   NUM_STAGES  of 128 k: one group of activations with a scale of its own
//   NUM_PARTS   blocks of rows that a warpgroup has at the tensor cores at once
//
// and without RUN and STAGGER. Weights are in the tiles-e5m2 layout (kernels/tiles/e5m2.py): blocks
// of 64 rows x 128 k.
#pragma once
#include "types.cuh"

constexpr int TILE_K = 128;
constexpr int BLOCK_ROWS = 64;
constexpr int WORDS_BYTES = BLOCK_ROWS * TILE_K / 2, SCALES_BYTES = BLOCK_ROWS * TILE_K / 32;

constexpr int round_up_to_128(int n) { return (n + 127) / 128 * 128; }
constexpr int HIDDEN_PADDED = round_up_to_128(HIDDEN), INTER_PADDED = round_up_to_128(INTER);

// A panel is what a block of threads multiplies by a token tile: of w13, whole groups of fc1's
// output, so that it can be quantised where it is made.
constexpr int PANEL = NUM_CONSUMERS * CONSUMER_BLOCKS;
constexpr int GROUP_BLOCKS = 4;  // of w13, gate and up: 128 columns
static_assert(PANEL % GROUP_BLOCKS == 0 && GROUP_BLOCKS % CONSUMER_BLOCKS == 0);
constexpr int FC1_BLOCKS = 2 * INTER / BLOCK_ROWS, FC1_PANELS = (FC1_BLOCKS + PANEL - 1) / PANEL;
constexpr int FC2_BLOCKS = (HIDDEN + BLOCK_ROWS - 1) / BLOCK_ROWS;
constexpr int FC2_PANELS = (FC2_BLOCKS + PANEL - 1) / PANEL;
constexpr int FC1_WEIGHT_BLOCKS = 2 * INTER_PADDED / BLOCK_ROWS;
constexpr int FC2_WEIGHT_BLOCKS = HIDDEN_PADDED / BLOCK_ROWS;
constexpr int FC1_K_TILES = HIDDEN_PADDED / TILE_K, FC2_K_TILES = INTER_PADDED / TILE_K;
static_assert(INTER % 32 == 0 && HIDDEN % 32 == 0);

constexpr int NUM_THREADS = 128 * (NUM_CONSUMERS + 1);
