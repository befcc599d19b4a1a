// A streamer, whatever its weights and x are: which units it is given, where their bytes lie, and
// how it hands on its part of their sums.
#pragma once
#include "config.cuh"
#include "ptx.cuh"

using Sums = float[SLICES][N_TILES][4];  // as mma_m16n8k16 leaves them

struct UnitWarp {
    static constexpr int X_PIECES = TILES_PER_WARP * TILE_K / 8;  // of 8 columns, a token

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

    DEVICE UnitWarp(const GemmArgs& args, const Shared& shared, Units units)
        : args(args),
          shared(shared),
          units(units),
          warp(warp_index()),
          lane(lane_index()),
          first_tile(min(warp_index() * TILES_PER_WARP, NUM_TILES - TILES_PER_WARP)),
          x_of_warp(shared.x + warp_index() * X_WARP_BYTES) {
        weights_of_lane = args.weights + (u64)first_tile * TILE_WEIGHTS + lane * 16;
        scales_of_lane =
            args.scales + (u64)first_tile * TILE_SCALES + lane / 4 * (SLICE_SCALES / 8);
        x_of_lane = shared_address(x_of_warp) + lane % 8 * X_ROW_BYTES + lane / 8 * 16;
        next_segment = units.begin / UNITS_PER_SEGMENT;
        next_block = units.begin - next_segment * UNITS_PER_SEGMENT;
        next_expert = units.begin < units.end ? shared.routing.segment(next_segment).expert : 0;
        segment_end = units.begin;
    }

    // Finds the next unit's bytes.
    DEVICE void locate_next() {
        weights_of_unit =
            weights_of_lane + next_expert * EXPERT_WEIGHTS + unit_weights_at(next_block);
        scales_of_unit = scales_of_lane + next_expert * EXPERT_SCALES + next_block * UNIT_SCALES;
        if (++next_block == UNITS_PER_SEGMENT) {
            next_block = 0, next_segment++;
            if (next_segment * UNITS_PER_SEGMENT < units.end)
                next_expert = shared.routing.segment(next_segment).expert;
        }
    }

    // Of 8 columns of the warp's part of x: where in the dot product, and whether they count.
    // Weights beyond K are zero, but what lies in shared memory might be NaN.
    DEVICE int k_of(int piece) const { return first_tile * TILE_K + piece * 8; }
    DEVICE bool is_own(int piece) const {
        return k_of(piece) >= warp * TILES_PER_WARP * TILE_K && k_of(piece) < K;
    }

    DEVICE int x_row(int pair) const {
        return GATED ? token_of(pair, args.pairs.top_k_reciprocal) : pair;
    }

    // Where the warp's part of a unit's sums goes, once the finishers have read what was there.
    DEVICE float4* place_of_sums() const {
        const u32 stage = done % NUM_STAGES, round = done / NUM_STAGES;
        if (round) mbarrier_wait(shared.empty + stage, (round - 1) & 1);
        return shared.sums + stage * STAGE_SUMS + warp * SLICES * N_TILES * 32 + lane;
    }

    DEVICE void say_written() {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.full + done % NUM_STAGES);
        done++;
    }
};
