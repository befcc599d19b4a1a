// The one thread that takes tiles and has the copy engine fill stages.
#pragma once
#include "shared.cuh"

struct Producer {
    const GemmArgs& args;
    const Shared& shared;
    StageRing stage;
    TileRing tile_ring;

    // What a tile's stages are copied from.
    struct Source {
        const u8 *words, *scales, *tokens;  // of the next k-tile
        u32 words_step, scales_step;        // from one k-tile to the next
        u32 words_bytes, scales_bytes, token_bytes;

        DEVICE void advance() {
            words += words_step, scales += scales_step, tokens += token_bytes;
        }
    };

    DEVICE Producer(const GemmArgs& args, const Shared& shared) : args(args), shared(shared) {}

    DEVICE int take() const { return atomicAdd(args.arrivals, 1); }

    // next: the first tile that was taken.
    DEVICE void run(int next) {
        const int num_tiles = shared.num_tiles();
        for (int index; (index = next) < num_tiles;) {
            next = take();  // under way while the tile is copied
            const Tile tile = find_tile(shared.slots, index);
            announce(tile);
            copy(tile);
        }
        announce(Tile{});
    }

    // Tells those who multiply: finding a tile takes as long as a stage, and this thread has time.
    DEVICE void announce(const Tile& tile) {
        mbarrier_wait_at(shared.tile_empty + 8 * tile_ring.index, tile_ring.parity ^ 1);
        store_tile(shared.taken + TILE_BYTES * tile_ring.index, tile);
        mbarrier_arrive_at(shared.tile_full + 8 * tile_ring.index);
        tile_ring.advance();
    }

    DEVICE Source source_of(const Tile& tile) {
        const Matrix& matrix = args.matrix(tile);
        const Extent extent = extent_of(tile);
        const int first_block = tile.panel * PANEL;
        const u32 blocks = min(PANEL, extent.blocks - first_block);
        const u64 block = (u64)tile.expert * (extent.k_tiles * extent.weight_blocks) + first_block;
        Source from;
        from.words = matrix.words + block * WORDS_BYTES;
        from.scales = matrix.scales + block * SCALES_BYTES;
        from.tokens = matrix.tokens + (u64)tile.first_row * token_bytes(tile.is_fc2, extent.k_tiles);
        from.words_step = extent.weight_blocks * WORDS_BYTES;
        from.scales_step = extent.weight_blocks * SCALES_BYTES;
        from.words_bytes = blocks * WORDS_BYTES;
        from.scales_bytes = blocks * SCALES_BYTES;
        from.token_bytes = tile.width * ROW_BYTES;
        return from;
    }

    DEVICE void copy(const Tile& tile) {
        Source from = source_of(tile);
        bool must_wait = tile.is_fc2;
        for (int left = extent_of(tile).k_tiles; left > 0; left--, stage.advance()) {
            const u32 full = shared.full + 8 * stage.index, i = stage.index;
            mbarrier_wait_at(shared.empty + 8 * i, stage.parity ^ 1);
            mbarrier_arrive_expecting(full,
                                      from.words_bytes + from.scales_bytes + from.token_bytes);
            copy_bulk(shared.words + i * WORDS_STAGE_BYTES, from.words, from.words_bytes, full);
            copy_bulk(shared.scales + i * SCALES_STAGE_BYTES, from.scales, from.scales_bytes, full);
            if (must_wait) wait_for_fc1(tile), must_wait = false;
            copy_bulk(shared.tokens + i * TOKEN_STAGE_BYTES, from.tokens, from.token_bytes, full);
            from.advance();
        }
    }

    // fc2 reads what all panels of fc1 wrote with ordinary stores.
    DEVICE void wait_for_fc1(const Tile& tile) {
        const int* const arrived = args.arrivals + 1 + tile.token_tile;
        while (load_acquire(arrived) < FC1_PANELS * NUM_CONSUMERS * 4) sleep_for(64);
        fence_async_proxy();
    }
};
