// The warpgroups that multiply: each decodes its own rows' weights into registers, multiplies and
// finishes. They share the ring of stages and, in fc1, the largest magnitudes of a token's columns.
#pragma once
#include <wgmma.cuh>  // wgmma.py writes it
#include "convert.cuh"
#include "e5m2.cuh"
#include "shared.cuh"
#include "tokens.cuh"
#include "warpgroup.cuh"

using Sums = float[CONSUMER_BLOCKS][BLOCK_N / 2];
using Parts = float[NUM_PARTS][BLOCK_N / 2];  // of a stage, before the tokens' scales

// A stage's A fragments of one block: of four times 32 k.
using Fragments = u32[4][4];

static_assert(BLOCK_N % 16 == 0 && (CONSUMER_BLOCKS > 1 || NUM_PARTS == 1));

// Of a token, how large its columns of a group of fc1's output are at most, as bits of float32.
// Three tiles' in turn: the next one but one's are zeroed while a tile's are read.
constexpr int GROUPS = PANEL / GROUP_BLOCKS, MAGNITUDES = GROUPS * BLOCK_N;
static_assert(GROUPS <= 2);  // sync_group has two barriers

struct Consumer : Warpgroup {
    const u32 magnitudes;  // [3, GROUPS, BLOCK_N] in shared memory
    int fc1_tile = 0;      // of the three

    DEVICE Consumer(const GemmArgs& args, const Shared& shared, int warpgroup)
        : Warpgroup(args, shared, warpgroup), magnitudes(magnitudes_of(shared)) {}

    static DEVICE u32 magnitudes_of(const Shared& shared) {
        return shared_address(shared.slots + NUM_EXPERTS + 1);
    }

    // Every thread of the block, before it begins.
    static DEVICE void prepare(const Shared& shared) {
        for (int i = thread_index(); i < 3 * MAGNITUDES; i += NUM_THREADS)
            store_shared_4(magnitudes_of(shared) + 4 * i, 0);
    }

    DEVICE void run(int) {
        for (Tile tile; (tile = next_tile()).width; release_tile()) multiply_and_finish(tile);
    }

    DEVICE void multiply_and_finish(const Tile& to_multiply) {
        // One set of registers for all widths, zeroed: to ptxas an unset one lives from the
        // kernel's beginning, and those of all widths together would not fit.
        Sums sums = {};
        u32 bases[CONSUMER_BLOCKS] = {};
        multiply_tile(to_multiply, sums, bases);
        // Read again: its numbers would take registers through the main loop.
        const Tile tile = this_tile();
        const int block = tile.panel * PANEL + first_block;
        if (tile.is_fc2) {
            finish_fc2(tile, block, sums, bases);
        } else {
            finish_fc1(tile, block, sums, bases);
            say_written(tile);
        }
    }

    DEVICE void multiply_tile(const Tile& tile, Sums& sums, u32 (&bases)[CONSUMER_BLOCKS]) {
        const Extent extent = extent_of(tile);
        if (tile.panel * PANEL + first_block < extent.blocks) {
            Parts parts = {};
            switch (tile.width) {
#define MULTIPLY(N) \
    case N: multiply_all<N>(extent.k_tiles, sums, parts, bases); break;
                FOR_EACH_WIDTH(MULTIPLY)
#undef MULTIPLY
            }
        } else {  // the last panel is not full
            pass(extent.k_tiles);
        }
    }

    // ---- Main loop ------------------------------------------------------------------------------

    // A thread's words of a block are two times 16 bytes: rows r and r + 8 of its warp's 16, for
    // groups 0 and 1 of 32 k, then for 2 and 3. Its rows' scales are 8 bytes.
    DEVICE u32 words_at(int stage, int i) const {
        return shared.words + stage * WORDS_STAGE_BYTES + (first_block + i) * WORDS_BYTES +
               (thread_index() & 127) * 16;
    }
    DEVICE uint2 load_scales(int stage, int i) const {
        return load_shared_8(shared.scales + stage * SCALES_STAGE_BYTES +
                             (first_block + i) * SCALES_BYTES + warp * 64 + row * 8);
    }
    DEVICE u32 tokens_at(int stage) const { return shared.tokens + stage * TOKEN_STAGE_BYTES; }

    DEVICE void decode(int stage, int i, Fragments& fragments) const {
        const u32 at = words_at(stage, i);
        const uint4 words[2] = {load_shared_16(at), load_shared_16(at + WORDS_BYTES / 2)};
        const uint2 bytes = load_scales(stage, i);
        const u32 scales[2] = {tile_scales(bytes.x), tile_scales(bytes.y)};
#pragma unroll
        for (int k32 = 0; k32 < 4; k32++)
#pragma unroll
            for (int half = 0; half < 2; half++)  // row r, row r + 8
                decode_word((&words[k32 >> 1].x)[2 * (k32 & 1) + half],
                            byte_of(scales[half], k32), fragments[k32][half],
                            fragments[k32][2 + half]);
    }

    // Has the tensor cores begin.
    template <int N>
    DEVICE void multiply(const Fragments& fragments, float* part, int stage) const {
        const u64 tokens = swizzled_operand(tokens_at(stage));
        wgmma_fence();
        wgmma_first<N>(part, fragments[0], tokens);
#pragma unroll
        for (int k32 = 1; k32 < 4; k32++) wgmma<N>(part, fragments[k32], tokens + 2 * k32);
        wgmma_commit();
    }

    // What the tensor cores have, which add in fewer bits than float32 has, times each token's
    // scale.
    template <int N>
    DEVICE void add_scaled(float* part, int stage, float* sums) const {
        const u32 scales = tokens_at(stage) + N * TILE_K + quarter * 8;
#pragma unroll
        for (int i = 0; i < N / 2; i++) keep_in_place(part[i]);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const uint2 bits = load_shared_8(scales + 32 * j);
            const float first = __uint_as_float(bits.x), second = __uint_as_float(bits.y);
            sums[4 * j] += part[4 * j] * first;
            sums[4 * j + 1] += part[4 * j + 1] * second;
            sums[4 * j + 2] += part[4 * j + 2] * first;
            sums[4 * j + 3] += part[4 * j + 3] * second;
        }
    }

    // sums += weights x tokens over all of K, a block and stage at a time. While the tensor cores
    // work on one, the next is waited for and decoded. Where the loop turns none is in flight, see
    // wide.
    template <int N>
    DEVICE void multiply_all(int k_tiles, Sums& sums, Parts& parts, u32 (&bases)[CONSUMER_BLOCKS]) {
        constexpr int BLOCKS = CONSUMER_BLOCKS, STAGES = BLOCKS % 2 ? 2 : 1;  // of a turn
        constexpr int UNITS = STAGES * BLOCKS;
        Fragments fragments[2];
        wait_for(stage);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            const uint2 bytes = load_scales(stage.index, i);
            bases[i] = row_base(bytes.x) | row_base(bytes.y) << 8;
        }
        decode(stage.index, 0, fragments[0]);
#pragma unroll 1
        for (int left = k_tiles; left > 0; left -= STAGES) {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                const int i = unit % BLOCKS, of_turn = unit / BLOCKS;
                if (of_turn && left == of_turn) break;
                multiply<N>(fragments[unit & 1], parts[unit % NUM_PARTS], stage.index);
                if (NUM_PARTS == 2 && i) {
                    wgmma_wait<1>();
                    add_scaled<N>(parts[(unit + 1) % NUM_PARTS], stage.index, sums[i ? i - 1 : 0]);
                }
                if (i + 1 < BLOCKS) {
                    decode(stage.index, i + 1, fragments[~unit & 1]);
                } else if (left > of_turn + 1) {
                    StageRing next = stage;
                    next.advance();
                    wait_for(next);
                    decode(next.index, 0, fragments[~unit & 1]);
                }
                if (NUM_PARTS == 1 || i + 1 == BLOCKS) {
                    wgmma_wait<0>();
                    add_scaled<N>(parts[unit % NUM_PARTS], stage.index, sums[i]);
                }
                if (i + 1 == BLOCKS) release(stage);
            }
        }
    }

    // ---- After it -------------------------------------------------------------------------------

    // The lane's row r is gate, its row r + 8 the up row of the same column. A warp has 8 columns
    // of each block. Columns beyond the intermediate size become zeros.
    DEVICE void finish_fc1(const Tile& tile, int first, Sums& sums,
                           const u32 (&bases)[CONSUMER_BLOCKS]) {
#pragma unroll
        for (int i = 0; i < CONSUMER_BLOCKS; i++)
            activate(tile, first + i, sums[i], bases[i]);
        const u32 of_tile = magnitudes + 4 * MAGNITUDES * fc1_tile;
        const u32 of_group = of_tile + 4 * BLOCK_N * (first_block / GROUP_BLOCKS);
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j += 4) {
            if (8 * j >= tile.num_pairs) break;
            u32 largest[8] = {};
#pragma unroll
            for (int n = 0; n < 8 && j + n / 2 < BLOCK_N / 8; n++)
#pragma unroll
                for (int i = 0; i < CONSUMER_BLOCKS; i++)
                    largest[n] = max(largest[n],
                                     __float_as_uint(fabsf(sums[i][4 * (j + n / 2) + n % 2])));
            const u32 of_lane = max_of_rows(largest);
            const int token = 8 * (j + row / 2) + 2 * quarter + row % 2;
            if (BLOCK_N % 32 == 0 || token < BLOCK_N) max_shared(of_group + 4 * token, of_lane);
        }
        sync_group();
        zero_next_but_one();
        const int group = first / GROUP_BLOCKS;  // a k-tile of fc2
        if (group >= FC2_K_TILES) return;
        u8* const to = (u8*)args.fc1.out + (u64)tile.first_row * token_bytes(true, FC2_K_TILES);
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j += 2) {
            if (8 * j >= tile.num_pairs) break;
            const Quantiser q[4] = {quantiser(of_group, j, 0), quantiser(of_group, j, 1),
                                    quantiser(of_group, j + 1, 0), quantiser(of_group, j + 1, 1)};
            if (first_block % GROUP_BLOCKS == 0 && warp == 0 && row == 0) {
                const u32 at = place_of_scale(tile.width, 8 * j + 2 * quarter, group);
                *(float2*)(to + at) = make_float2(q[0].scale, q[1].scale);
                if (8 * (j + 1) < tile.width)
                    *(float2*)(to + at + 8 * SCALE_BYTES) = make_float2(q[2].scale, q[3].scale);
            }
#pragma unroll
            for (int i = 0; i < CONSUMER_BLOCKS; i++) {
                // Of two tokens, eight apart, in 16 bits.
                const float* v = sums[i] + 4 * j;
                const u32 h = transpose_8x8(quantised(q[0], q[2], v[0], v[4]) |
                                            quantised(q[1], q[3], v[1], v[5]) << 16);
                const int column = (first + i) % GROUP_BLOCKS * 32 + warp * 8 + 2 * quarter;
                const int chunk = group * (TILE_K / 16) + column / 16;
                u8* const at =
                    to + place_in_tile(tile.width, 8 * j + row, chunk) + column % 16;
                if (8 * j + row < tile.num_pairs) *(u16*)at = permute_bytes(h, 0, 0x4420);
                if (8 * (j + 1) + row < tile.num_pairs)
                    *(u16*)(at + 8 * TILE_K) = permute_bytes(h, 0, 0x4431);
            }
        }
    }

    static DEVICE u32 quantised(const Quantiser& first, const Quantiser& second, float a, float b) {
        return round_to_e4m3x2(divide(a, first.scale, first.reciprocal),
                               divide(b, second.scale, second.reciprocal));
    }

    // The warpgroups that share a group of columns.
    DEVICE void sync_group() const {
        constexpr int THREADS = 128 * GROUP_BLOCKS / CONSUMER_BLOCKS;
        if (GROUPS == 1 || first_block < GROUP_BLOCKS) sync_threads_of<1, THREADS>();
        else sync_threads_of<2, THREADS>();
    }

    DEVICE void finish_fc2(const Tile& tile, int first, Sums& sums,
                           const u32 (&bases)[CONSUMER_BLOCKS]) const {
#pragma unroll
        for (int i = 0; i < CONSUMER_BLOCKS; i++) {
            if (first + i >= FC2_BLOCKS) break;
            const float factor = row_factor(bases[i] & 0xff), factor_8 = row_factor(bases[i] >> 8);
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; j++) {
                sums[i][4 * j] *= factor, sums[i][4 * j + 1] *= factor;
                sums[i][4 * j + 2] *= factor_8, sums[i][4 * j + 3] *= factor_8;
            }
            Warpgroup::finish_fc2(tile, first + i, sums[i]);
        }
    }

    DEVICE void activate(const Tile& tile, int block, float* sums, u32 bases) const {
        const int column = block * 32 + warp * 8 + row;
        const bool exists = block < FC1_BLOCKS;
        const u64 up_at = (u64)tile.expert * (2 * INTER_PADDED) + column;
        const float up_bias = exists ? bias_at(up_at) : 0.0f;
        const float gate_bias = exists ? bias_at(up_at + INTER_PADDED) : 0.0f;
        const float gate_factor = row_factor(bases & 0xff), up_factor = row_factor(bases >> 8);
        const Swiglu swiglu = this->swiglu();
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j++) {
            if (8 * j >= tile.num_pairs) break;
#pragma unroll
            for (int n = 4 * j; n < 4 * j + 2; n++) {
                const float h = swiglu(sums[n] * gate_factor + gate_bias,
                                       sums[n + 2] * up_factor + up_bias);
                sums[n] = exists ? h : 0.0f;
            }
        }
    }

    // Of eight numbers, each the largest over the eight lanes of a quarter: lane r has number r's.
    DEVICE u32 max_of_rows(const u32 (&numbers)[8]) const {
        u32 four[4], two[2];
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = max_of_pair(numbers[i], numbers[i + 4], 4);
#pragma unroll
        for (int i = 0; i < 2; i++) two[i] = max_of_pair(four[i], four[i + 2], 2);
        return max_of_pair(two[0], two[1], 1);
    }
    // Lanes whose row has the bit take the second number of both, others the first.
    DEVICE u32 max_of_pair(u32 first, u32 second, int bit) const {
        const bool has = row & bit;
        return max(has ? second : first, __shfl_xor_sync(~0u, has ? first : second, 4 * bit));
    }

    DEVICE Quantiser quantiser(u32 of_group, int j, int n) const {
        return Quantiser(load_shared_4(of_group + 4 * (8 * j + 2 * quarter + n)));
    }

    // The tile before this one has been read by all, who else would not have come this far; and it
    // is written again only after the next tile's barrier.
    DEVICE void zero_next_but_one() {
        constexpr int THREADS = 128 * GROUP_BLOCKS / CONSUMER_BLOCKS;
        const u32 at = magnitudes + 4 * MAGNITUDES * ((fc1_tile + 2) % 3) +
                       4 * BLOCK_N * (first_block / GROUP_BLOCKS);
        for (int i = thread_index() % THREADS; i < BLOCK_N; i += THREADS)
            store_shared_4(at + 4 * i, 0);
        fc1_tile = (fc1_tile + 1) % 3;
    }
};
