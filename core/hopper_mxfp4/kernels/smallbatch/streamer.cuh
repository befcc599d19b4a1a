// The producers of moe_gemm: warps that bring weights from memory to the tensor cores, by way of
// registers. All of a block's streamers work on the same unit, each on chunks of its own of the dot
// product, and leave their parts of the sums in shared memory.
#pragma once
#include "config.cuh"
#include "convert.cuh"
#include "ptx.cuh"

// What a warp multiplies at a time: two slabs of 16 rows by BLOCK_K. Of each slab a lane has row
// lane / 4 (half 0) and the one 8 below it (half 1): 16 bytes, whose words hold four pairs of
// values, of both rows by turns (layout.py says which).
struct Chunk {
    uint4 words[2][2];  // [slab][half]
    u32 scales[2][2];   // [slab][half]: E8M0 bytes of the lane's 32 values
};

using Sums = float[2][N_TILES][4];  // [slab][8 tokens], as mma_m16n8k16 leaves them

struct Streamer {
    const GemmArgs& args;
    const Shared& shared;
    const Units units;
    const int warp, lane;
    const u8 *weights_of_lane, *scales_of_lane, *x_of_lane;  // the lane's part of row 0 of expert 0
    // The lane's part of the unit that is loaded. From these two, all else is a constant offset.
    const u8 *weights_of_unit, *scales_of_unit;
    int next_segment, next_row_block;  // of the unit after it
    u32 next_expert;
    bool has_last;    // whether the lane's part of its last chunk lies within K
    int segment_end;  // the first unit that needs another x than what has been gathered
    u32 done = 0;     // units
    Chunk chunks[CHUNKS_PER_WARP];

    DEVICE Streamer(const GemmArgs& args, const Shared& shared, Units units)
        : args(args), shared(shared), units(units), warp(warp_index()), lane(lane_index()) {
        const int row = lane >> 2, quarter = lane & 3;
        weights_of_lane = args.weights + (u64)row * ROW_BYTES + warp * CHUNK_BYTES + 16 * quarter;
        scales_of_lane = args.scales + warp * SCALE_BYTES + row * 16 + quarter;
        x_of_lane = shared.x + warp * X_CHUNK_BYTES + lane * 16;
        const int last = warp + NUM_STREAMERS * (CHUNKS_PER_WARP - 1);
        has_last = BLOCK_K * last + 64 * (quarter >> 1) < K;
        next_segment = units.begin / UNITS_PER_SEGMENT;
        next_row_block = units.begin - next_segment * UNITS_PER_SEGMENT;
        next_expert = units.begin < units.end ? shared.routing.segment(next_segment).expert : 0;
        segment_end = units.begin;
    }

    // Goes on to the next unit: where its bytes are.
    DEVICE void locate_next() {
        const int row = GATED ? ROWS_PADDED + 16 * next_row_block : 32 * next_row_block;
        weights_of_unit =
            weights_of_lane + (u64)(next_expert * (u32)WEIGHT_ROWS + row) * ROW_BYTES;
        scales_of_unit = scales_of_lane +
                         (u64)(next_expert * (u32)(WEIGHT_ROWS / 64) + (row >> 6)) *
                             (NUM_CHUNKS * SCALE_BYTES) +
                         4 * (row >> 4 & 3);
        if (++next_row_block == UNITS_PER_SEGMENT) {
            next_row_block = 0, next_segment++;
            if (next_segment * UNITS_PER_SEGMENT < units.end)
                next_expert = shared.routing.segment(next_segment).expert;
        }
    }

    // Starts to load a chunk of the located unit.
    DEVICE void load(int i) {
        // From the first slab to the second: from gate to up, or to the next 16 rows.
        constexpr int TO_WEIGHTS = GATED ? -ROWS_PADDED * ROW_BYTES : SLAB_ROWS * ROW_BYTES;
        constexpr int TO_SCALES = GATED ? -(ROWS_PADDED / 64) * NUM_CHUNKS * SCALE_BYTES : 4;
        const bool exists = i < CHUNKS_PER_WARP - 1 || has_last;
        Chunk& chunk = chunks[i];
#pragma unroll
        for (int slab = 0; slab < 2; slab++) {
            const u8* words = weights_of_unit + slab * TO_WEIGHTS + i * NUM_STREAMERS * CHUNK_BYTES;
            const u8* scales = scales_of_unit + slab * TO_SCALES + i * NUM_STREAMERS * SCALE_BYTES;
#pragma unroll
            for (int half = 0; half < 2; half++)
                chunk.words[slab][half] =
                    exists ? load_streamed(words + half * 8 * ROW_BYTES) : make_uint4(0, 0, 0, 0);
            chunk.scales[slab][0] = exists ? load_byte(scales) : 1;
            chunk.scales[slab][1] = exists ? load_byte(scales + 8 * 16) : 1;
        }
    }

    DEVICE void load_first_unit() {
        if (units.begin == units.end) return;
        locate_next();
#pragma unroll
        for (int i = 0; i < CHUNKS_PER_WARP; i++) load(i);
    }

    DEVICE static void sync_streamers() { sync_threads_of<1, 32 * NUM_STREAMERS>(); }

    // Brings x of the unit's segment to shared memory, unless it is there already: as B fragments
    // of the tensor cores, in which lane 4 * token + quarter finds its 16 bytes beside those of its
    // neighbours.
    DEVICE void gather_x(int unit) {
        if (unit < segment_end) return;
        const int index = unit / UNITS_PER_SEGMENT;
        const Segment segment = shared.routing.segment(index);
        segment_end = (index + 1) * UNITS_PER_SEGMENT;
        if (done) sync_streamers();  // nobody reads the x before it any more
        for (u32 n = 0; n < segment.count; n++) {
            const int pair = shared.routing.sorted[segment.begin + n];
            const int x_row = GATED ? token_of(pair, args.top_k_reciprocal) : pair;
            const u16* const row = args.x + (long long)x_row * args.x_stride;
            for (int i = thread_index(); i < K / 8; i += 32 * NUM_STREAMERS) {
                const int chunk = i >> 4, quarter = i >> 2 & 3, part = i & 3;
                const int fragment = part * N_TILES + (n >> 3), of_lane = (n & 7) * 4 + quarter;
                cp_async_16(
                    shared.x + chunk * X_CHUNK_BYTES + fragment * FRAGMENT_BYTES + of_lane * 16,
                    row + 8 * i);
            }
        }
        cp_async_wait_all();
        sync_streamers();
    }

    // Adds a unit's products to `sums`. more: there is another unit, whose chunks are loaded into
    // the registers that become free.
    DEVICE void multiply(Sums& sums, bool more) {
        if (more) locate_next();
#pragma unroll
        for (int i = 0; i < CHUNKS_PER_WARP; i++) {
            if (warp + NUM_STREAMERS * i < NUM_CHUNKS) {
                const Chunk& chunk = chunks[i];
                const u32 all = chunk.scales[0][0] | chunk.scales[0][1] | chunk.scales[1][0] |
                                chunk.scales[1][1];
                if (__any_sync(~0u, all & 0x80))
                    multiply_chunk<true>(i, sums);
                else
                    multiply_chunk<false>(i, sums);
            }
            if (more) load(i);
        }
    }

    // LARGE_SCALES: whether there may be scales beyond byte 128, which real checkpoints don't have.
    template <bool LARGE_SCALES>
    DEVICE void multiply_chunk(int i, Sums& sums) {
        const Chunk& chunk = chunks[i];
        u32 factors[2][2];  // [slab][half]
#pragma unroll
        for (int j = 0; j < 4; j++)
            factors[j >> 1][j & 1] = e8m0_factor<LARGE_SCALES>(chunk.scales[j >> 1][j & 1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 x[2][N_TILES];  // [low or high pairs][8 tokens]
#pragma unroll
            for (int j = 0; j < 2 * N_TILES; j++) {
                const int fragment = (2 * half + j / N_TILES) * N_TILES + j % N_TILES;
                x[j / N_TILES][j % N_TILES] =
                    *(const uint4*)(x_of_lane + i * NUM_STREAMERS * X_CHUNK_BYTES +
                                    fragment * FRAGMENT_BYTES);
            }
#pragma unroll
            for (int word = 0; word < 4; word += 2)
#pragma unroll
                for (int slab = 0; slab < 2; slab++) {
                    // Two words make two A fragments: the low pairs of both, then the high pairs,
                    // so that the two registers of x that go with a fragment are neighbours.
                    const u32 v = (&chunk.words[slab][half].x)[word];
                    const u32 w = (&chunk.words[slab][half].x)[word + 1];
                    u32 fragments[2][4] = {
                        {e2m1_pair<0>(v), e2m1_pair<1>(v), e2m1_pair<0>(w), e2m1_pair<1>(w)},
                        {e2m1_pair<2>(v), e2m1_pair<3>(v), e2m1_pair<2>(w), e2m1_pair<3>(w)}};
#pragma unroll
                    for (int high = 0; high < 2; high++) {
                        u32(&a)[4] = fragments[high];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            a[j] = mul_bf16x2(a[j], factors[slab][j & 1]);
                            if (LARGE_SCALES)
                                a[j] = mul_bf16x2(
                                    a[j], e8m0_remaining_factor(chunk.scales[slab][j & 1]));
                        }
#pragma unroll
                        for (int n = 0; n < N_TILES; n++)
                            mma_m16n8k16(sums[slab][n], a, (&x[high][n].x)[word],
                                         (&x[high][n].x)[word + 1]);
                    }
                }
        }
    }

    // Hands the finishers this warp's part of the sums.
    DEVICE void publish(const Sums& sums) {
        // Warps that drift apart read rows far apart, which costs memory bandwidth.
        sync_streamers();
        const u32 stage = done % NUM_STAGES, round = done / NUM_STAGES;
        if (round) mbarrier_wait(shared.empty + stage, (round - 1) & 1);
        float4* const to = shared.sums + stage * STAGE_SUMS + warp * 2 * N_TILES * 32 + lane;
#pragma unroll
        for (int j = 0; j < 2 * N_TILES; j++) {
            const float* const s = sums[j / N_TILES][j % N_TILES];
            to[j * 32] = make_float4(s[0], s[1], s[2], s[3]);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.full + stage);
        done++;
    }
};
