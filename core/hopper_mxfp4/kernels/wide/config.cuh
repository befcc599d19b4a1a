// How wide cuts a layer: both grouped GEMMs in one launch. Compiled for the layer's sizes, which
// come as macros (tiling.py chooses them):
//
//   NUM_EXPERTS           of this rank
//   HIDDEN, INTER         true sizes
//   BLOCK_N, MIN_N        tokens of a tile: at most, at least
//   STEP_FROM, STEP_N     the second width, and the steps from there on
//   NUM_CONSUMERS         warpgroups that multiply
//   CONSUMER_BLOCKS       blocks of 64 weight rows that each of them has
//   NUM_STAGES            of 64 k, in shared memory
//   RUN                   stages between points where no wgmma is in flight (even)
//   CONSUMER_REGISTERS, PRODUCER_REGISTERS  of a thread
//   STAGGER               nanoseconds between the warpgroups' beginnings
//   EVERY_LANE_ARRIVES    1 for compute-sanitizer, which does not see what __syncwarp orders
//
// Weights are in the tiles layout (kernels/tiles/layout.py): blocks of 64 rows x 64 k.
#pragma once
#include "types.cuh"

constexpr int TILE_K = 64;
constexpr int BLOCK_ROWS = 64;
constexpr int WORDS_BYTES = BLOCK_ROWS * TILE_K / 2, SCALES_BYTES = BLOCK_ROWS * TILE_K / 32;

constexpr int round_up_to_64(int n) { return (n + 63) / 64 * 64; }
constexpr int HIDDEN_PADDED = round_up_to_64(HIDDEN), INTER_PADDED = round_up_to_64(INTER);

// A panel is what a block of threads multiplies by a token tile. Of the blocks of rows that the
// weights have, the last of w13 may hold nothing but padding.
constexpr int PANEL = NUM_CONSUMERS * CONSUMER_BLOCKS;
constexpr int FC1_BLOCKS = 2 * INTER / BLOCK_ROWS, FC1_PANELS = (FC1_BLOCKS + PANEL - 1) / PANEL;
constexpr int FC2_BLOCKS = HIDDEN_PADDED / BLOCK_ROWS;
constexpr int FC2_PANELS = (FC2_BLOCKS + PANEL - 1) / PANEL;
constexpr int FC1_WEIGHT_BLOCKS = 2 * INTER_PADDED / BLOCK_ROWS;
constexpr int FC2_WEIGHT_BLOCKS = FC2_BLOCKS;
constexpr int FC1_K_TILES = HIDDEN_PADDED / TILE_K, FC2_K_TILES = INTER_PADDED / TILE_K;

// Columns that fc1 writes: the rest of INTER_PADDED must be zeros.
constexpr int FC1_COLUMNS = FC1_BLOCKS * BLOCK_ROWS / 2;
static_assert(FC1_COLUMNS == INTER && INTER % 32 == 0 && HIDDEN % 32 == 0);

constexpr int NUM_THREADS = 128 * (NUM_CONSUMERS + 1);
