// A warpgroup that multiplies, whatever its weights and tokens are: the tiles and stages it is given,
// and what becomes of fc2's sums.
#pragma once
#include "convert.cuh"
#include "shared.cuh"
#include "swiglu.cuh"

struct Warpgroup {
    const GemmArgs& args;
    const Shared& shared;
    const int first_block;  // of the panel
    const int warp, lane;   // warp: of the warpgroup
    const int row, quarter;
    u32 words_of_thread, scales_of_thread;  // in stage 0
    StageRing stage;                        // that is decoded or multiplied next
    TileRing tile_ring;

    DEVICE Warpgroup(const GemmArgs& args, const Shared& shared, int warpgroup)
        : args(args),
          shared(shared),
          first_block(warpgroup * CONSUMER_BLOCKS),
          warp(warp_index() & 3),
          lane(lane_index()),
          row(lane_index() >> 2),
          quarter(lane_index() & 3) {}

    // What the consumers share beside `Shared`, by every thread of the block before they begin.
    static DEVICE void prepare(const Shared&) {}

    DEVICE Tile next_tile() const {
        mbarrier_wait_at(shared.tile_full + 8 * tile_ring.index, tile_ring.parity);
        return this_tile();
    }
    DEVICE Tile this_tile() const {
        return load_tile(shared.taken + TILE_BYTES * tile_ring.index);
    }
    // The warp has read it for the last time.
    DEVICE void release_tile() {
        arrive_as_warp(shared.tile_empty + 8 * tile_ring.index);
        tile_ring.advance();
    }

    DEVICE void wait_for(const StageRing& next) const {
        mbarrier_wait_at(shared.full + 8 * next.index, next.parity);
    }

    // The warp has read a stage for the last time.
    DEVICE void release(StageRing& done) {
        arrive_as_warp(shared.empty + 8 * done.index);
        done.advance();
    }

    DEVICE void pass(int k_tiles) {
        for (; k_tiles > 0; k_tiles--) {
            wait_for(stage);
            release(stage);
        }
    }

    // ---- After the main loop ---------------------------------------------------------------------

    DEVICE Swiglu swiglu() const {
        return {-1.44269504f * args.alpha, args.beta, args.limit};
    }

    // Tokens that are finished at a time, in eights: enough to hide latencies, and few are finished
    // in vain.
    static constexpr int AT_ONCE = 4;

    DEVICE float bias_at(u64 at) const { return args.bias ? bf16_to_float(args.bias[at]) : 0.0f; }

    // Rows are ordered so that after the transpositions a lane has four neighbours of a token: 32
    // bytes a warp.
    DEVICE void finish_fc2(const Tile& tile, int block, const float* sums) const {
        const int column = block * BLOCK_ROWS + warp * 16 + 4 * quarter;
        u16* const to = (u16*)args.fc2.out + (u64)(tile.first_row + row) * HIDDEN_PADDED + column;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j += AT_ONCE) {
            if (8 * j >= tile.num_pairs) break;
            uint2 output[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE && j + i < BLOCK_N / 8; i++) {
                const float* v = sums + 4 * (j + i);
                output[i].x = transpose_8x8(round_to_bf16x2(v[0], v[1]));
                output[i].y = transpose_8x8(round_to_bf16x2(v[2], v[3]));
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE && j + i < BLOCK_N / 8; i++)
                if (8 * (j + i) + row < tile.num_pairs && column < HIDDEN)
                    *(uint2*)(to + (u64)(j + i) * 8 * HIDDEN_PADDED) = output[i];
        }
    }

    DEVICE void say_written(const Tile& tile) const {
        fence_async_proxy();  // the copy engine reads it
        __syncwarp();
        if (lane == 0) add_release(args.arrivals + 1 + tile.token_tile, 1);
    }
};
