// What the warps of a block share: stages of weights and tokens, and the tiles that the producer
// has taken.
#pragma once
#include "config.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "tokens.cuh"

// One of the two GEMMs.
struct Matrix {
    const u8* words;   // weights: [NUM_EXPERTS, k-tiles, blocks, WORDS_BYTES]
    const u8* scales;  // [NUM_EXPERTS, k-tiles, blocks, SCALES_BYTES]
    const u8* tokens;  // as tokens.cuh says
    void* out;         // fc1: fc2's tokens; fc2: bf16 [rows, HIDDEN_PADDED]
};

struct GemmArgs {
    Matrix fc1, fc2;
    const u16* bias;    // fc1's: bf16 [NUM_EXPERTS, up and gate, INTER_PADDED], or null
    const Slot* slots;  // [NUM_EXPERTS + 1]
    // Tiles taken so far; then, of each token tile, warps that have written their part of fc1's
    // output.
    int* arrivals;
    float alpha, beta, limit;

    DEVICE const Matrix& matrix(const Tile& tile) const { return tile.is_fc2 ? fc2 : fc1; }
};

struct Extent {
    int k_tiles;
    int blocks;         // that are multiplied
    int weight_blocks;  // that lie beside each other in a k-tile
};
DEVICE Extent extent_of(const Tile& tile) {
    return tile.is_fc2 ? Extent{FC2_K_TILES, FC2_BLOCKS, FC2_WEIGHT_BLOCKS}
                       : Extent{FC1_K_TILES, FC1_BLOCKS, FC1_WEIGHT_BLOCKS};
}

constexpr int WORDS_STAGE_BYTES = PANEL * WORDS_BYTES, SCALES_STAGE_BYTES = PANEL * SCALES_BYTES;
constexpr int TILES_AHEAD = 4;  // that the producer takes, with the one at hand
constexpr int TILE_BYTES = 32;  // of a tile in shared memory
static_assert(sizeof(Tile) <= TILE_BYTES);

// Goes round a ring of barriers. parity: of the phase that comes next at this place.
template <int SIZE>
struct RingOf {
    u32 index = 0, parity = 0;
    DEVICE void advance() {
        if (++index == SIZE) index = 0, parity ^= 1;
    }
};
using StageRing = RingOf<NUM_STAGES>;
using TileRing = RingOf<TILES_AHEAD>;

// Addresses in shared memory; its size is Tiling.shared_bytes. First what is aligned to 1024 bytes.
struct Shared {
    u32 tokens;  // [NUM_STAGES, TOKEN_STAGE_BYTES]
    u32 words;   // [NUM_STAGES, WORDS_STAGE_BYTES]
    u32 scales;  // [NUM_STAGES, SCALES_STAGE_BYTES]
    u32 full, empty;         // [NUM_STAGES] mbarriers: the copies have arrived; all have read them
    u32 tile_full, tile_empty;  // [TILES_AHEAD] mbarriers of `taken`
    u32 taken;                  // [TILES_AHEAD] tiles
    Slot* slots;                // [NUM_EXPERTS + 1]

    DEVICE Shared(u8* memory) {
        tokens = shared_address(memory);
        words = tokens + NUM_STAGES * TOKEN_STAGE_BYTES;
        scales = words + NUM_STAGES * WORDS_STAGE_BYTES;
        full = scales + NUM_STAGES * SCALES_STAGE_BYTES;
        empty = full + 8 * NUM_STAGES;
        tile_full = empty + 8 * NUM_STAGES;
        tile_empty = tile_full + 8 * TILES_AHEAD;
        taken = tile_empty + 8 * TILES_AHEAD;
        const u32 slots_at = taken + TILE_BYTES * TILES_AHEAD;
        slots = (Slot*)(memory + (slots_at - tokens));
    }

    DEVICE int num_tiles() const {
        return slots[NUM_EXPERTS].tiles_before * (FC1_PANELS + FC2_PANELS);
    }
};

DEVICE void store_tile(u32 at, const Tile& tile) {
    const int words[] = {tile.is_fc2,    tile.expert,    tile.panel,     tile.width,
                         tile.first_row, tile.num_pairs, tile.token_tile};
#pragma unroll
    for (int i = 0; i < 7; i++) store_shared_4(at + 4 * i, words[i]);
}
DEVICE Tile load_tile(u32 at) {
    const uint4 first = load_shared_16(at), second = load_shared_16(at + 16);
    return {first.x != 0,       (int)first.y,  (int)first.z, (int)first.w,
            (int)second.x, (int)second.y, (int)second.z};
}

// Every warp that multiplies arrives once.
constexpr int CONSUMER_ARRIVALS = 4 * NUM_CONSUMERS * (EVERY_LANE_ARRIVES ? 32 : 1);
DEVICE void arrive_as_warp(u32 barrier) {
#if EVERY_LANE_ARRIVES
    mbarrier_arrive_at(barrier);
#else
    __syncwarp();
    if (lane_index() == 0) mbarrier_arrive_at(barrier);
#endif
}

DEVICE void prepare_barriers(const Shared& shared) {
    if (thread_index() == 0) {
        for (int i = 0; i < NUM_STAGES; i++) {
            mbarrier_init_at(shared.full + 8 * i, 1);
            mbarrier_init_at(shared.empty + 8 * i, CONSUMER_ARRIVALS);
        }
        for (int i = 0; i < TILES_AHEAD; i++) {
            mbarrier_init_at(shared.tile_full + 8 * i, 1);
            mbarrier_init_at(shared.tile_empty + 8 * i, CONSUMER_ARRIVALS);
        }
        mbarrier_init_fence();
    }
}

DEVICE void load_slots(const Shared& shared, const GemmArgs& args) {
    for (int i = thread_index(); i <= NUM_EXPERTS; i += NUM_THREADS)
        shared.slots[i] = args.slots[i];
}
