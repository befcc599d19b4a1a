// The warpgroups that multiply: each decodes its own rows' weights into registers, multiplies and
// finishes. They share the ring of stages and nothing else.
#pragma once
#include <wgmma.cuh>  // wgmma.py writes it
#include "tiles.cuh"
#include "warpgroup.cuh"

using Sums = float[CONSUMER_BLOCKS][BLOCK_N / 2];

// What a thread multiplies in a stage of one block of rows: rows r and r + 8 of its warp's 16, two
// groups of 32 k.
struct BlockWeights {
    uint4 words;  // group 0: row r, row r + 8; group 1: the same
    u32 scales;   // bytes in the same order
};

// A stage's A fragments: of each block, of four times 16 k.
struct Fragments {
    u32 of[CONSUMER_BLOCKS][4][4];
};

// The A fragment of one of a stage's four k16.
DEVICE void decode(const BlockWeights& weights, int k16, u32 (&fragment)[4]) {
    const int group = k16 >> 1, pair = 2 * (k16 & 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // row r, row r + 8
        const u32 word = (&weights.words.x)[2 * group + half];
        const u32 factor = tile_scale_factor(weights.scales, 2 * group + half);
        fragment[half] = mul_bf16x2(tile_pair(word, pair), factor);
        fragment[2 + half] = mul_bf16x2(tile_pair(word, pair + 1), factor);
    }
}

struct Consumer : Warpgroup {
    DEVICE Consumer(const GemmArgs& args, const Shared& shared, int warpgroup)
        : Warpgroup(args, shared, warpgroup) {
        const int thread = thread_index() & 127;
        words_of_thread = shared.words + first_block * WORDS_BYTES + thread * 16;
        scales_of_thread = shared.scales + first_block * SCALES_BYTES + warp * 32 + row * 4;
    }

    DEVICE void run(int warpgroup) {
        // Warpgroups begin apart, so that later one finishes a tile while others multiply. They
        // stay apart: whoever is alone at the tensor cores is twice as fast.
        if (STAGGER && warpgroup) sleep_for(warpgroup * STAGGER);
        for (Tile tile; (tile = next_tile()).width; release_tile()) {
            const Extent extent = extent_of(tile);
            if (tile.panel * PANEL + first_block < extent.blocks) {
                multiply_and_finish(tile, extent);
            } else {  // the last panel is not full
                pass(extent.k_tiles);
            }
            if (!this_tile().is_fc2) say_written(this_tile());
        }
    }

    DEVICE void multiply_and_finish(const Tile& to_multiply, const Extent& extent) {
        // One set of sums for all widths, and zeros rather than a first wgmma that overwrites: to
        // ptxas an unset register lives from the kernel's beginning, and the sums of all widths
        // together would not fit.
        Sums sums = {};
        switch (to_multiply.width) {
#define MULTIPLY(N) \
    case N: multiply_all<N>(extent.k_tiles, sums); break;
            FOR_EACH_WIDTH(MULTIPLY)
#undef MULTIPLY
        }
        const Tile tile = this_tile();  // again: it would take registers through the main loop
#pragma unroll
        for (int i = 0; i < CONSUMER_BLOCKS; i++) {
            const int block = tile.panel * PANEL + first_block + i;
            if (block >= extent_of(tile).blocks) break;
            if (tile.is_fc2) finish_fc2(tile, block, sums[i]);
            else finish_fc1(tile, block, sums[i]);
        }
    }

    // ---- Main loop ------------------------------------------------------------------------------

    DEVICE void decode_stage(Fragments& fragments) {
        BlockWeights weights[CONSUMER_BLOCKS];
        wait_for(stage);
#pragma unroll
        for (int i = 0; i < CONSUMER_BLOCKS; i++) {
            weights[i].words = load_shared_16(words_of_thread + stage.index * WORDS_STAGE_BYTES +
                                              i * WORDS_BYTES);
            weights[i].scales = load_shared_4(scales_of_thread + stage.index * SCALES_STAGE_BYTES +
                                              i * SCALES_BYTES);
        }
#pragma unroll
        for (int k16 = 0; k16 < 4; k16++)
#pragma unroll
            for (int i = 0; i < CONSUMER_BLOCKS; i++)
                decode(weights[i], k16, fragments.of[i][k16]);
    }

    // Has the tensor cores begin; `stage` moves on.
    template <int N>
    DEVICE void multiply_stage(const Fragments& fragments, Sums& sums) {
        const u64 tokens = swizzled_operand(
            same_in_all_lanes(shared.tokens + stage.index * TOKEN_STAGE_BYTES));
        stage.advance();
        wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < 4; k16++)
#pragma unroll
            for (int i = 0; i < CONSUMER_BLOCKS; i++)
                wgmma<N>(sums[i], fragments.of[i][k16], tokens + 2 * k16);
        wgmma_commit();
    }

    // sums += weights x tokens over all of K. While the tensor cores work on a stage, the next one
    // is waited for and decoded, so its latencies are off the path; and a stage is begun before the
    // one before it is done. Only where the loop turns is none in flight: otherwise ptxas
    // serialises all wgmmas as soon as some five widths are compiled into a kernel.
    template <int N>
    DEVICE void multiply_all(int k_tiles, Sums& sums) {
        Fragments fragments[2];
        StageRing done = stage;  // released next
        decode_stage(fragments[0]);
        int left = k_tiles;
#pragma unroll 1
        for (; left > RUN; left -= RUN) multiply_run<N>(done, fragments, sums);
#pragma unroll 1
        for (; left > 0; left -= 2) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (left == half) break;
                multiply_stage<N>(fragments[half], sums);
                if (left > half + 1) decode_stage(fragments[half ^ 1]);
                wgmma_wait<0>();
                release(done);
            }
        }
    }

    // RUN stages, of which the first is decoded; decodes the one after them as well.
    template <int N>
    DEVICE void multiply_run(StageRing& done, Fragments (&fragments)[2], Sums& sums) {
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            multiply_stage<N>(fragments[i & 1], sums);
            if (i) {
                wgmma_wait<1>();
                release(done);
            }
            decode_stage(fragments[~i & 1]);
        }
        wgmma_wait<0>();
        release(done);
    }

    // ---- After it -------------------------------------------------------------------------------

    // The lane's row r is gate, its row r + 8 the up row of the same column. A warp has 8 columns,
    // 16 bytes a token.
    DEVICE void finish_fc1(const Tile& tile, int block, const float* sums) {
        const int column = block * 32 + warp * 8 + row;
        const u64 up_at = (u64)tile.expert * (2 * INTER_PADDED) + column;
        const float up_bias = bias_at(up_at);
        const float gate_bias = bias_at(up_at + INTER_PADDED);
        const Swiglu swiglu = this->swiglu();
        u8* const to = (u8*)args.fc1.out + (u64)tile.first_row * token_bytes(true, FC2_K_TILES) +
                       place_in_tile(tile.width, row, block * 4 + warp) + quarter * 4;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j += AT_ONCE) {
            if (8 * j >= tile.num_pairs) break;
            u32 h[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float* v = sums + 4 * (j + i);
                const float first = swiglu(v[0] + gate_bias, v[2] + up_bias);
                const float second = swiglu(v[1] + gate_bias, v[3] + up_bias);
                h[i] = transpose_8x8(round_to_bf16x2(first, second));
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (8 * (j + i) + row < tile.num_pairs)
                    *(u32*)(to + (j + i) * 8 * ROW_BYTES) = h[i];
        }
    }

};
