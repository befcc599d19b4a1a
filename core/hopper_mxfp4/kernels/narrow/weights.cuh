// A streamer's weights on their way from memory: the k-tiles of the unit at hand and of those after
// it, which it asks for ahead of time. Two ways, one interface: in registers, or through a ring in
// shared memory (RING_UNITS). docs/dev/narrow-kernel.md compares them.
#pragma once
#include "config.cuh"
#include "ptx.cuh"

// What a lane has of a unit's k-tile: of each slice, four words and their scales, of group 0 and
// row lane / 4, of the row 8 below it, and of group 1 and the same rows.
struct Tile {
    uint4 words[SLICES];
    u32 scales[SLICES];
};

// One unit ahead. A warp waits for all that is under way: the hardware has one flag for all loads
// that live across a branch.
struct WeightsInRegisters {
    static constexpr int UNITS_AHEAD = 1;
    Tile tiles[TILES_PER_WARP];

    DEVICE WeightsInRegisters(u8*) {}
    // Where the part of a unit's scales lies that a lane asks for.
    DEVICE static int scales_offset(int lane) { return lane / 4 * 4; }

    // Asks for the warp's k-tile i of a unit: weights, scales: where the lane's part of it begins.
    DEVICE void ask(int i, const u8* weights, const u8* scales, bool wanted) {
        if (!wanted) return;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            tiles[i].words[slice] =
                load_streamed(weights + i * TILE_WEIGHTS + slice * SLICE_WEIGHTS);
            tiles[i].scales[slice] =
                load_streamed_word(scales + i * TILE_SCALES + slice * SLICE_SCALES);
        }
    }

    // The k-tile of the unit asked for first.
    DEVICE Tile take(int i) { return tiles[i]; }
    DEVICE void unit_done() {}
};

// RING_UNITS ahead, and a warp waits for its oldest k-tile alone. A lane reads the words that it
// has copied itself; the scales of a unit are 64 bytes that four lanes copy for all.
struct WeightsInRing {
    static constexpr int UNITS_AHEAD = RING_UNITS;
    static constexpr int SLOTS = RING_UNITS * TILES_PER_WARP;
    const int lane;
    u8* const ring;  // [SLOTS, SLOT_BYTES], the warp's own
    int first = 0;   // slot of the unit at hand

    DEVICE WeightsInRing(u8* rings)
        : lane(lane_index()), ring(rings + warp_index() * SLOTS * SLOT_BYTES) {}
    DEVICE static int scales_offset(int lane) { return lane % 4 * 16; }

    // Into the slot of the unit at hand. An empty group where it is not wanted, so that take() can
    // count.
    DEVICE void ask(int i, const u8* weights, const u8* scales, bool wanted) {
        __syncwarp();  // every lane has taken what was there
        if (wanted) {
            u8* const slot = ring + (first + i) * SLOT_BYTES;
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++)
                cp_async_16(slot + slice * SLICE_WEIGHTS + lane * 16,
                            weights + i * TILE_WEIGHTS + slice * SLICE_WEIGHTS);
            if (lane < UNIT_SCALES / 16)
                cp_async_16(slot + UNIT_WEIGHTS + lane * 16, scales + i * TILE_SCALES);
        }
        cp_async_commit();
    }

    DEVICE Tile take(int i) {
        cp_async_wait_but<SLOTS - 1>();
        __syncwarp();  // the scales are other lanes' copies
        const u8* const slot = ring + (first + i) * SLOT_BYTES;
        Tile tile;
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            tile.words[slice] = *(const uint4*)(slot + slice * SLICE_WEIGHTS + lane * 16);
            tile.scales[slice] =
                *(const u32*)(slot + UNIT_WEIGHTS + slice * SLICE_SCALES + lane / 4 * 4);
        }
        return tile;
    }

    DEVICE void unit_done() {
        first += TILES_PER_WARP;
        if (first == SLOTS) first = 0;
    }
};

#if RING_UNITS
using Weights = WeightsInRing;
#else
using Weights = WeightsInRegisters;
#endif
