// The producers of moe_gemm: warps that bring weights from memory to the tensor cores, by way of
// registers. All of a block's streamers work on the same unit, each on k-tiles of its own of the
// dot product, and leave their parts of the sums in shared memory.
#pragma once
#include "config.cuh"
#include "ptx.cuh"
#include "tiles.cuh"
#include "x.cuh"

// 2^(e - 127) of one of four E8M0 bytes, as a float: exact for all but e = 0, which gives 0.
template <int WHICH>
DEVICE float e8m0_float(u32 bytes) {
    const u32 shifted = WHICH == 3 ? bytes >> 1 : bytes << (23 - 8 * WHICH);
    return __uint_as_float(shifted & 0x7F800000u);
}

// What a lane has of a unit's k-tile: of each slice, four words and their scales, of group 0 and
// row lane / 4, of the row 8 below it, and of group 1 and the same rows.
struct Tile {
    uint4 words[SLICES];
    u32 scales[SLICES];
};

using Sums = float[SLICES][N_TILES][4];  // as mma_m16n8k16 leaves them

struct Streamer {
    static constexpr int X_PIECES = TILES_PER_WARP * TILE_K / 8;  // of 16 bytes, a token

    const GemmArgs& args;
    const Shared& shared;
    const Units units;
    const int warp, lane;
    // Where the dot product is no multiple of what the warps have, the last one's tiles begin among
    // its neighbour's, and its x is zero there. A warp that had fewer would need branches, and
    // behind a branch the compiler waits for every load in flight.
    const int first_tile;
    // Where the lane's part of unit 0 of expert 0 lies, and that of the unit that is loaded next.
    const u8 *weights_of_lane, *scales_of_lane;
    const u8 *weights_of_unit, *scales_of_unit;
    u8* const x_of_warp;
    u32 x_of_lane;                 // shared address, as ldmatrix wants it
    int next_segment, next_block;  // of the unit that is located next
    u32 next_expert;
    int segment_end;  // the first unit whose x has not been gathered
    u32 done = 0;     // units
    // Of the unit at hand, and in the places of those that have been multiplied, of the next.
    Tile tiles[TILES_PER_WARP];

    DEVICE Streamer(const GemmArgs& args, const Shared& shared, Units units)
        : args(args),
          shared(shared),
          units(units),
          warp(warp_index()),
          lane(lane_index()),
          first_tile(min(warp_index() * TILES_PER_WARP, NUM_TILES - TILES_PER_WARP)),
          x_of_warp(shared.x + warp_index() * X_WARP_BYTES) {
        weights_of_lane = args.weights + (u64)first_tile * TILE_WEIGHTS + lane * 16;
        scales_of_lane = args.scales + (u64)first_tile * TILE_SCALES + lane / 4 * 4;
        x_of_lane = shared_address(x_of_warp) + lane % 8 * X_ROW_BYTES + lane / 8 * 16;
        next_segment = units.begin / UNITS_PER_SEGMENT;
        next_block = units.begin - next_segment * UNITS_PER_SEGMENT;
        next_expert = units.begin < units.end ? shared.routing.segment(next_segment).expert : 0;
        segment_end = units.begin;
    }

    // Finds the next unit's bytes.
    DEVICE void locate_next() {
        weights_of_unit =
            weights_of_lane + next_expert * EXPERT_WEIGHTS + next_block * UNIT_WEIGHTS;
        scales_of_unit = scales_of_lane + next_expert * EXPERT_SCALES + next_block * UNIT_SCALES;
        if (++next_block == UNITS_PER_SEGMENT) {
            next_block = 0, next_segment++;
            if (next_segment * UNITS_PER_SEGMENT < units.end)
                next_expert = shared.routing.segment(next_segment).expert;
        }
    }

    DEVICE void ask_for_first_unit() {
        locate_next();
#pragma unroll
        for (int i = 0; i < TILES_PER_WARP; i++) ask_for_tile(i);
    }

    // A warp waits for all that is under way: the hardware has one flag for all loads that live
    // across a branch. A ring in shared memory, without that, was slower (narrow-kernel.md).
    DEVICE void ask_for_tile(int i) {
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            tiles[i].words[slice] =
                load_streamed(weights_of_unit + i * TILE_WEIGHTS + slice * SLICE_WEIGHTS);
            tiles[i].scales[slice] =
                load_streamed_word(scales_of_unit + i * TILE_SCALES + slice * SLICE_SCALES);
        }
    }

    // Of 16 bytes of the warp's part of x: where in the dot product, and whether they count.
    // Weights beyond K are zero, but what lies in shared memory might be NaN.
    DEVICE int k_of(int piece) { return first_tile * TILE_K + piece * 8; }
    DEVICE bool is_own(int piece) {
        return k_of(piece) >= warp * TILES_PER_WARP * TILE_K && k_of(piece) < K;
    }

    // Asks for the warp's part of x of the unit's segment, where it isn't there yet. No other warp
    // reads it, so none must wait for another.
    DEVICE void ask_for_x(int unit) {
        if (unit < segment_end) return;
        const Segment segment = shared.routing.segment(unit / UNITS_PER_SEGMENT);
        __syncwarp();  // no lane reads the x before it any more
#pragma unroll 4
        for (u32 n = 0; n < segment.count; n++) {
            const int pair = shared.routing.sorted[segment.begin + n];
            const int x_row = GATED ? token_of(pair, args.pairs.top_k_reciprocal) : pair;
            const u16* const row = args.x + (long long)x_row * args.x_stride;
#pragma unroll
            for (int piece = lane; piece < X_PIECES; piece += 32) {
                if (is_own(piece))
                    cp_async_16(x_of_warp + n * X_ROW_BYTES + piece * 16, row + k_of(piece));
            }
        }
    }

    // Waits for what ask_for_x asked for, and shifts it (x.cuh). A lane does so with the very bytes
    // that it has copied itself.
    DEVICE void take_x(int unit) {
        if (unit < segment_end) return;
        const int index = unit / UNITS_PER_SEGMENT;
        const u32 count = shared.routing.segment(index).count;
        segment_end = (index + 1) * UNITS_PER_SEGMENT;
        cp_async_wait_all();
#pragma unroll 2
        for (u32 n = 0; n < count; n++) {
            uint4* const row = (uint4*)(x_of_warp + n * X_ROW_BYTES);
            constexpr int PIECES_PER_LANE = (X_PIECES + 31) / 32;
            uint4 values[PIECES_PER_LANE];
            u32 largest = 0;
#pragma unroll
            for (int i = 0; i < PIECES_PER_LANE; i++) {
                const int piece = lane + 32 * i;
                values[i] = piece < X_PIECES && is_own(piece) ? row[piece] : make_uint4(0, 0, 0, 0);
                largest = max(largest, largest_magnitude(values[i]));
            }
            const int shift = x_shift(__reduce_max_sync(~0u, largest));
#pragma unroll
            for (int i = 0; i < PIECES_PER_LANE; i++)
                if (lane + 32 * i < X_PIECES) row[lane + 32 * i] = shifted_x(values[i], shift);
            if (lane == 0) shared.x_factors[warp * BLOCK_N + n] = sums_factor(shift);
        }
        __syncwarp();
    }

    // Adds a unit's products to `sums`, and asks for a later unit's k-tiles in place of those that
    // are done.
    DEVICE void multiply(int unit, Sums& sums) {
        const bool more = unit + 1 < units.end;
        if (more) locate_next();
#pragma unroll
        for (int i = 0; i < TILES_PER_WARP; i++) {
            const Tile tile = tiles[i];
            multiply_group<0>(i, tile, sums);
            multiply_group<1>(i, tile, sums);
            if (more) ask_for_tile(i);
        }
    }

    // The 32 products of a group are summed without their scale, which then multiplies the sum:
    // half the multiplications that the weights would take at 8 tokens, as many at 16.
    template <int GROUP>
    DEVICE void multiply_group(int i, const Tile& tile, Sums& sums) {
        u32 x[N_TILES][4];  // [8 tokens][8 k]
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            ldmatrix_x4(x[n], x_of_lane + n * 8 * X_ROW_BYTES + i * TILE_K * 2 + GROUP * 64);
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            const uint4 words = tile.words[slice];
            const u32 v = GROUP ? words.z : words.x, w = GROUP ? words.w : words.y;
            const u32 first[4] = {tile_pair(v, 0), tile_pair(w, 0), tile_pair(v, 1),
                                  tile_pair(w, 1)};
            const u32 second[4] = {tile_pair(v, 2), tile_pair(w, 2), tile_pair(v, 3),
                                   tile_pair(w, 3)};
            const float scale = e8m0_float<2 * GROUP>(tile.scales[slice]);
            const float scale_8_below = e8m0_float<2 * GROUP + 1>(tile.scales[slice]);
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                float products[4] = {0, 0, 0, 0};
                mma_m16n8k16(products, first, x[n][0], x[n][1]);
                mma_m16n8k16(products, second, x[n][2], x[n][3]);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums[slice][n][j] =
                        fmaf(products[j], j < 2 ? scale : scale_8_below, sums[slice][n][j]);
            }
        }
    }

    // Hands the finishers this warp's part of the sums.
    DEVICE void publish(const Sums& sums) {
        const u32 stage = done % NUM_STAGES, round = done / NUM_STAGES;
        if (round) mbarrier_wait(shared.empty + stage, (round - 1) & 1);
        float4* const to = shared.sums + stage * STAGE_SUMS + warp * SLICES * N_TILES * 32 + lane;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            const float2 f =
                *(const float2*)(shared.x_factors + warp * BLOCK_N + 8 * n + 2 * (lane & 3));
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) {
                const float* const s = sums[slice][n];
                to[(slice * N_TILES + n) * 32] =
                    make_float4(s[0] * f.x, s[1] * f.y, s[2] * f.x, s[3] * f.y);
            }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.full + stage);
        done++;
    }
};
