// The producers of moe_gemm: warps that bring weights from memory to the tensor cores, by way of
// registers. All of a block's streamers work on the same unit, each on k-tiles of its own of the
// dot product, and leave their parts of the sums in shared memory.
#pragma once
#include "config.cuh"
#include "ptx.cuh"
#include "tiles.cuh"
#include "unit_warp.cuh"
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

struct Streamer : UnitWarp {
    // Of the unit at hand, and in the places of those that have been multiplied, of the next.
    Tile tiles[TILES_PER_WARP];

    DEVICE Streamer(const GemmArgs& args, const Shared& shared, Units units)
        : UnitWarp(args, shared, units) {}

    DEVICE void ask_for_tile(int i) {
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            tiles[i].words[slice] =
                load_streamed(weights_of_unit + i * TILE_WEIGHTS + slice * SLICE_WEIGHTS);
            tiles[i].scales[slice] =
                load_streamed_word(scales_of_unit + i * TILE_SCALES + slice * SLICE_SCALES);
        }
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
            const u16* const row = (const u16*)args.x + (long long)x_row(pair) * args.x_stride;
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
            if (lane == 0) shared.x_factors[warp * X_FACTORS + n] = sums_factor(shift);
        }
        __syncwarp();
    }

    DEVICE void multiply_tile(int i, Sums& sums) const {
        const Tile tile = tiles[i];
        multiply_group<0>(i, tile, sums);
        multiply_group<1>(i, tile, sums);
    }

    // The 32 products of a group are summed without their scale, which then multiplies the sum:
    // half the multiplications that the weights would take at 8 tokens, as many at 16.
    template <int GROUP>
    DEVICE void multiply_group(int i, const Tile& tile, Sums& sums) const {
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
        float4* const to = place_of_sums();
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            const float2 f =
                *(const float2*)(shared.x_factors + warp * X_FACTORS + 8 * n + 2 * (lane & 3));
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) {
                const float* const s = sums[slice][n];
                to[(slice * N_TILES + n) * 32] =
                    make_float4(s[0] * f.x, s[1] * f.y, s[2] * f.x, s[3] * f.y);
            }
        }
        say_written();
    }
};
