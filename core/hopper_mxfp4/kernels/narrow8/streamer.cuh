// The producers of moe_gemm, as narrow's: warps that bring weights from memory to the tensor cores,
// by way of registers. Weights and the quantised x are multiplied as fp16, which holds e5m2 and
// e4m3 exactly, and the sums of 128 products by the token's scale.
#pragma once
#include "config.cuh"
#include "e5m2.cuh"
#include "ptx.cuh"
#include "unit_warp.cuh"
#include "x.cuh"

// What a lane has of a unit's k-tile: of each slice and 64 k, four words, of group 0 and row
// lane / 4, of the row 8 below it, and of group 1 and the same rows; and both rows' four scales.
struct Tile {
    uint4 words[SLICES][2];
    uint2 scales[SLICES];
};

struct Streamer : UnitWarp {
    // Of the unit at hand, and in the places of those that have been multiplied, of the next.
    Tile tiles[TILES_PER_WARP];

    DEVICE Streamer(const GemmArgs& args, const Shared& shared, Units units)
        : UnitWarp(args, shared, units) {}

    DEVICE void ask_for_tile(int i) {
        const u8* const weights = weights_of_unit + i * TILE_WEIGHTS;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
#pragma unroll
            for (int k64 = 0; k64 < 2; k64++)
                tiles[i].words[slice][k64] = load_streamed(weights + slice * SLICE_WEIGHTS +
                                                           k64 * (BLOCK_WEIGHTS / 2));
            tiles[i].scales[slice] =
                load_streamed_8(scales_of_unit + i * TILE_SCALES + slice * SLICE_SCALES);
        }
    }

    // ---- x --------------------------------------------------------------------------------------

    // Where the lane's own copies of x lie until it quantises them.
    DEVICE u8* raw_x(int n, int piece) const {
        return x_of_warp + BLOCK_N * X_ROW_BYTES + n * X_RAW_ROW_BYTES +
               piece * (8 * X_NUMBER_BYTES);
    }

    // Asks for the warp's part of x of the unit's segment, of its first tokens, where it isn't
    // there yet. No other warp reads it, so none must wait for another.
    DEVICE void ask_for_x(int unit) {
        if (unit < segment_end) return;
        ask_for_tokens(shared.routing.segment(unit / UNITS_PER_SEGMENT), 0);
    }

    DEVICE void ask_for_tokens(const Segment& segment, u32 first) const {
        const u32 count = min(segment.count - first, (u32)X_AT_ONCE);
#pragma unroll 4
        for (u32 n = 0; n < count; n++) {
            const int pair = shared.routing.sorted[segment.begin + first + n];
            const u8* const row =
                (const u8*)args.x + (long long)x_row(pair) * args.x_stride * X_NUMBER_BYTES;
#pragma unroll
            for (int piece = lane; piece < X_PIECES; piece += 32) {
                if (!is_own(piece)) continue;
#pragma unroll
                for (int at = 0; at < 8 * X_NUMBER_BYTES; at += 16)
                    cp_async_16(raw_x(n, piece) + at, row + k_of(piece) * X_NUMBER_BYTES + at);
            }
        }
    }

    // Waits for what was asked for, quantises it, and goes on with the segment's other tokens. A
    // lane quantises the very bytes that it has copied itself.
    DEVICE void take_x(int unit) {
        if (unit < segment_end) return;
        const int index = unit / UNITS_PER_SEGMENT;
        const Segment segment = shared.routing.segment(index);
        segment_end = (index + 1) * UNITS_PER_SEGMENT;
        __syncwarp();  // no lane reads the x before it any more
        for (u32 first = 0; first < segment.count; first += X_AT_ONCE) {
            if (first) ask_for_tokens(segment, first);
            cp_async_wait_all();
            const u32 count = min(segment.count - first, (u32)X_AT_ONCE);
#pragma unroll 1
            for (u32 n = 0; n < count; n++) quantise_token(first + n, n);
        }
        __syncwarp();
    }

    // n: which of the segment's tokens it is. raw: which of those that were asked for.
    DEVICE void quantise_token(int n, int raw) const {
#pragma unroll
        for (int first = 0; first < X_PIECES; first += 32) {
            const int piece = first + lane;
            Columns columns = {};
            if (piece < X_PIECES && is_own(piece)) columns.load((const uint4*)raw_x(raw, piece));
            const Quantiser quantiser(columns.largest_of_group());
            if (piece < X_PIECES) {
                columns.store(x_of_warp + n * X_ROW_BYTES, piece, quantiser);
                constexpr int PIECES_PER_TILE = TILE_K / 8;
                if (piece % PIECES_PER_TILE == 0)
                    shared.x_factors[warp * X_FACTORS + piece / PIECES_PER_TILE * BLOCK_N + n] =
                        quantiser.scale;
            }
        }
    }

    // ---- Products -------------------------------------------------------------------------------

    DEVICE void multiply_tile(int i, Sums& sums) const {
        const Tile tile = tiles[i];
        Sums parts = {};
#pragma unroll
        for (int group = 0; group < GROUPS; group++) multiply_group(i, group, tile, parts);
        add_scaled(i, parts, sums);
    }

    DEVICE void multiply_group(int i, int group, const Tile& tile, Sums& parts) const {
        u32 x[N_TILES][4];  // [8 tokens][8 k]
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            ldmatrix_x4(x[n], x_of_lane + n * 8 * X_ROW_BYTES + i * TILE_K * 2 + group * 64);
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            const uint4 words = tile.words[slice][group >> 1];
            const uint2 scales = tile.scales[slice];
            u32 low[2], high[2];  // k = 4t.. and 16 + 4t.. of the lane's row and of the one 8 below
            decode(group & 1 ? words.z : words.x, scales.x, group, low[0], high[0]);
            decode(group & 1 ? words.w : words.y, scales.y, group, low[1], high[1]);
            const u32 first[4] = {e5m2_to_fp16x2(low[0], 0), e5m2_to_fp16x2(low[1], 0),
                                  e5m2_to_fp16x2(low[0], 1), e5m2_to_fp16x2(low[1], 1)};
            const u32 second[4] = {e5m2_to_fp16x2(high[0], 0), e5m2_to_fp16x2(high[1], 0),
                                   e5m2_to_fp16x2(high[0], 1), e5m2_to_fp16x2(high[1], 1)};
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                mma_m16n8k16_fp16(parts[slice][n], first, x[n][0], x[n][1]);
                mma_m16n8k16_fp16(parts[slice][n], second, x[n][2], x[n][3]);
            }
        }
    }

    static DEVICE void decode(u32 word, u32 scales, int group, u32& low, u32& high) {
        decode_word(word, multiplied_byte_of(tile_scales(scales), group), low, high);
    }

    // A k-tile's sums times the tokens' scales in it.
    DEVICE void add_scaled(int i, const Sums& parts, Sums& sums) const {
        const float* const of_lane =
            shared.x_factors + warp * X_FACTORS + i * BLOCK_N + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            const float2 scales = *(const float2*)(of_lane + 8 * n);
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums[slice][n][j] = fmaf(parts[slice][n][j], j & 1 ? scales.y : scales.x,
                                             sums[slice][n][j]);
        }
    }

    // Hands the finishers this warp's part of the sums.
    DEVICE void publish(const Sums& sums) {
        float4* const to = place_of_sums();
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) {
                const float* const s = sums[slice][n];
                to[(slice * N_TILES + n) * 32] = make_float4(s[0], s[1], s[2], s[3]);
            }
        say_written();
    }
};
