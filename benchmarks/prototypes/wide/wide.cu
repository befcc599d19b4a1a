// Both grouped GEMMs of an MXFP4 MoE layer for many tokens an expert. docs/dev/wide-kernel.md has reasons and numbers.
//
// Operands are swapped: weights are wgmma's A, decoded into registers by the warps that multiply them; tokens are B, in
// shared memory. A block takes 64 NWG WM weight rows x up to NMAX tokens of one expert at a time. One warpgroup takes
// tiles and copies (tokens row by row, so that fc1 needs no sorted copy of x); NWG warpgroups decode, multiply and
// finish, each for its own rows: they share the ring of stages and nothing else. fc2's tiles follow fc1's in the same
// launch: a tile waits until all panels of fc1 have written its tokens.
//
// Macros, beside those of schedule.cuh:
//   PANELS1, PANELS2  of 64 NWG WM rows (schedule.cuh)
//   K1, BLOCKS1, COLUMNS1  fc1's dot product, blocks of 64 rows (gate and up, interleaved), columns of the output
//   K2, BLOCKS2, COLUMNS2  fc2's
//   NWG     consumer warpgroups;  WM  blocks of 64 rows of each;  STAGES  of 64 k
//   STAGGER  nanoseconds between the warpgroups' beginnings
//   RUN     stages between the points where no wgmma is in flight (even)
//   CONSUMER_REGS, PRODUCER_REGS  registers a thread after they are dealt out

#define THREADS (128 * (NWG + 1))
#define PANEL (NWG * WM)  // blocks of 64 rows
#define TOKEN_BYTES (NMAX * 128)
#define WORDS_BYTES 2048
#define BLOCK_BYTES 2176  // 64 rows x 64 k: words, then 8 rows x 4 bytes of scales for each warp
#define WEIGHT_BYTES (PANEL * BLOCK_BYTES)
#define QUEUE 2           // tiles that are taken ahead

struct Matrix {
    const u8* weights;   // [E, blocks, ktiles, BLOCK_BYTES], layout.py
    const float* bias;   // [E, blocks * 64] in the order of the blocks' rows, or null
    const u16* x;        // bf16, rows of k
    const int* row_of;   // of a sorted pair, its row of x; null: itself
    u16* out;            // bf16 [sorted pairs, columns]
    long long x_stride;  // in elements
};
struct Args {
    Matrix matrix[2];
    const int4* slots;  // schedule.cuh
    int* ready;         // of a token tile: warps that have written their part of fc1's output; before it, tiles taken
    float alpha, beta, limit;
};
struct Shape {
    int k, ktiles, blocks, columns;
};
DEV Shape shape_of(const Tile& t) {
    return t.second ? Shape{K2, (K2 + 63) / 64, BLOCKS2, COLUMNS2}
                    : Shape{K1, (K1 + 63) / 64, BLOCKS1, COLUMNS1};
}

// Shared memory: tokens of all stages (each 1024-byte aligned), their weights, barriers, slots.
#define BARRIER_BYTES (16 * STAGES + 32 * QUEUE)
struct Memory {
    u32 tokens, weights, full, empty, taken, free, queue;
    int4* slots;
};
DEV Memory carve(u8* base) {
    const u32 at = shared_address(base);
    Memory m;
    m.tokens = at;
    m.weights = at + STAGES * TOKEN_BYTES;
    m.full = m.weights + STAGES * WEIGHT_BYTES;
    m.empty = m.full + 8 * STAGES;
    m.taken = m.empty + 8 * STAGES;
    m.free = m.taken + 8 * QUEUE;
    m.queue = m.free + 8 * QUEUE;
    m.slots = (int4*)(base + STAGES * (TOKEN_BYTES + WEIGHT_BYTES) + BARRIER_BYTES);
    return m;
}

template <int SIZE>
struct RingOf {
    u32 stage = 0, parity = 0;
    DEV void advance() {
        if (++stage == SIZE) stage = 0, parity ^= 1;
    }
};
typedef RingOf<STAGES> Ring;
typedef RingOf<QUEUE> Queue;

// ---- tiles --------------------------------------------------------------------------------------
// One thread takes tiles, a few ahead of the warps that read them from the queue.
DEV void take_tile(const Args& a, const Memory& m, Queue& q) {
    barrier_wait(m.free + 8 * q.stage, q.parity ^ 1);
    store_shared4(m.queue + 4 * q.stage, atomicAdd(a.ready, 1));
    barrier_arrive(m.taken + 8 * q.stage);
    q.advance();
}
// A warp's next tile; its number, -1 after the last.
DEV int next_tile(const Memory& m, Queue& q, int tiles) {
    barrier_wait(m.taken + 8 * q.stage, q.parity);
    const int index = load_shared4(m.queue + 4 * q.stage);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(m.free + 8 * q.stage);
    q.advance();
    return index < tiles ? index : -1;
}

// ---- producer -----------------------------------------------------------------------------------
// Eight threads copy a token's 64 k; a thread has the same 16 of their 128 bytes in every 16th row. What these warps
// execute for a stage limits narrow tiles and takes issue slots from decoding in wide ones: it is kept to a few
// instructions a row. Rows beyond the last are copies of it: no predicate, and nobody looks at their sums.
#define ROWS_EACH (NMAX / 16)
struct Rows {
    const u8* x;
    u32 from[ROWS_EACH];  // bytes from x
    int pieces;           // 16 rows each
};
DEV Rows token_rows(const Matrix& a, const Tile& tile, int thread) {
    Rows r;
    r.x = (const u8*)a.x;
    r.pieces = (tile.count + 15) >> 4;
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++) {
        const int n = min((thread >> 3) + 16 * i, tile.count - 1) + tile.first;
        r.from[i] = (a.row_of ? a.row_of[n] : n) * (u32)(a.x_stride * 2) + (thread & 7) * 16;
    }
    return r;
}

// Where a panel's blocks of weights begin, and how many there are.
struct Blocks {
    const u8* from;
    u32 apart;
    int count;
};
DEV Blocks panel_blocks(const Matrix& a, const Tile& tile) {
    const Shape s = shape_of(tile);
    const u32 apart = s.ktiles * BLOCK_BYTES, first = tile.panel * PANEL;
    return {a.weights + (u64)(tile.expert * s.blocks + first) * apart, apart, min(PANEL, s.blocks - first)};
}
DEV void copy_weights(const Memory& m, const Blocks& b, int kt, u32 stage) {
    const u32 bar = m.full + 8 * stage, to = m.weights + stage * WEIGHT_BYTES;
    const u8* from = b.from + kt * BLOCK_BYTES;
    barrier_arrive_expect(bar, b.count * BLOCK_BYTES);
    for (int i = 0; i < b.count; i++, from += b.apart)
        copy_bulk(to + i * BLOCK_BYTES, from, BLOCK_BYTES, bar);
}

DEV void copy_tokens(const Memory& m, const Rows& rows, int k, int kt, u32 stage, int thread) {
    const u32 row = thread >> 3, chunk = thread & 7;
    const u32 to = m.tokens + stage * TOKEN_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4);
    const bool inside = (K1 % 64 == 0 && K2 % 64 == 0) || kt * 64 + chunk * 8 < k;
    const u8* x = rows.x + (inside ? kt * 128 : 0);
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++) {
        if (i >= rows.pieces) break;
        copy16(to + i * 2048, x + rows.from[i], inside ? 16 : 0);
    }
    barrier_arrive_after_copies(m.full + 8 * stage);
}

// fc2 reads what all panels of fc1 wrote.
DEV void wait_for_first(const Args& a, const Tile& tile) {
    if ((threadIdx.x & 31) == 0)
        while (load_acquire(a.ready + 1 + tile.token_tile) < PANELS1 * NWG * 4) sleep_for(64);
    __syncwarp();
}

DEV void produce(const Args& a, const Memory& m, int thread) {
    Ring ring;
    Queue queue, ahead;
    const int tiles = m.slots[E].x * (PANELS1 + PANELS2);
    if (thread == 0) take_tile(a, m, ahead);
    for (int index; (index = next_tile(m, queue, tiles)) >= 0;) {
        if (thread == 0) take_tile(a, m, ahead);
        const Tile tile = find_tile(m.slots, index);
        const Matrix& matrix = a.matrix[tile.second];
        const Shape shape = shape_of(tile);
        const Rows rows = token_rows(matrix, tile, thread);
        const Blocks blocks = panel_blocks(matrix, tile);
        for (int kt = 0; kt < shape.ktiles; kt++, ring.advance()) {
            barrier_wait(m.empty + 8 * ring.stage, ring.parity ^ 1);
            // One warp after the other: what a stage's copies cost them is what limits narrow tiles.
            if (thread == (kt & 3) * 32) copy_weights(m, blocks, kt, ring.stage);
            if (kt == 0 && tile.second) wait_for_first(a, tile);
            copy_tokens(m, rows, shape.k, kt, ring.stage, thread);
        }
    }
}

// ---- consumers ----------------------------------------------------------------------------------
struct Consumer {
    u32 words, scales;  // this thread's place in a stage's weights
    int block, warp, lane;
};

DEV void load_weights(const Consumer& c, u32 stage, Weights (&w)[WM]) {
#pragma unroll
    for (int i = 0; i < WM; i++) {
        const u32 at = stage * WEIGHT_BYTES + i * BLOCK_BYTES;
        w[i].words = load_shared16(c.words + at);
        w[i].scales = load_shared4(c.scales + at);
    }
}

// A stage's A fragments: of each block of 64 rows, of four times 16 k.
struct Fragments {
    u32 of[WM][4][4];
};
DEV void decode_stage(const Consumer& c, const Memory& m, const Ring& ring, Fragments& f) {
    Weights w[WM];
    barrier_wait(m.full + 8 * ring.stage, ring.parity);
    fence_async_proxy();
    load_weights(c, ring.stage, w);
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < WM; i++) decode(w[i], step, f.of[i][step]);
}
template <int N>
DEV void multiply_stage(const Memory& m, u32 stage, Fragments& f, float (&acc)[WM][NMAX / 2]) {
    const u64 tokens = swizzled_tile(m.tokens + stage * TOKEN_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < WM; i++) wgmma<N>(acc[i], f.of[i][step], tokens + 2 * step);
    wgmma_commit();
}

// acc = weights x tokens over all of K. While the tensor cores work on a stage, the next one is waited for and decoded,
// so its latencies, which bind narrow tiles, are off the path; and a stage is issued before the one before it is done.
// Only where the loop turns is none in flight: otherwise ptxas serialises all wgmmas as soon as some five widths are
// compiled into a kernel.
template <int N>
DEV void run_of_stages(const Consumer& c, const Memory& m, Ring& ring, Fragments (&f)[2],
                       float (&acc)[WM][NMAX / 2]) {
    u32 before = 0;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        const u32 stage = ring.stage;
        ring.advance();
        multiply_stage<N>(m, stage, f[i & 1], acc);
        if (i) {
            wgmma_wait<1>();
            if (c.lane == 0) barrier_arrive(m.empty + 8 * before);
        }
        decode_stage(c, m, ring, f[~i & 1]);
        before = stage;
    }
    wgmma_wait<0>();
    if (c.lane == 0) barrier_arrive(m.empty + 8 * before);
}
template <int N>
DEV void main_loop(const Consumer& c, const Memory& m, Ring& ring, int ktiles,
                   float (&acc)[WM][NMAX / 2]) {
    Fragments f[2];
    decode_stage(c, m, ring, f[0]);
    int left = ktiles;
#pragma unroll 1
    for (; left > RUN; left -= RUN) run_of_stages<N>(c, m, ring, f, acc);
#pragma unroll 1
    for (; left > 0; left -= 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (left == half) break;
            const u32 stage = ring.stage;
            ring.advance();
            multiply_stage<N>(m, stage, f[half], acc);
            if (left > half + 1) decode_stage(c, m, ring, f[half ^ 1]);
            wgmma_wait<0>();
            if (c.lane == 0) barrier_arrive(m.empty + 8 * stage);
        }
    }
}

DEV void pass_stages(const Consumer& c, const Memory& m, Ring& ring, int ktiles) {
    for (int kt = 0; kt < ktiles; kt++, ring.advance()) {
        barrier_wait(m.full + 8 * ring.stage, ring.parity);
        if (c.lane == 0) barrier_arrive(m.empty + 8 * ring.stage);
    }
}

// gate * sigmoid(alpha gate) * (up + beta). The minima and maxima keep a NaN one.
struct Swiglu {
    float factor, beta, limit;  // factor: -alpha log2(e)
};
DEV float swiglu(float gate, float up, const Swiglu& s) {
    gate = min_nan(gate, s.limit);
    up = max_nan(min_nan(up, s.limit), -s.limit);
    return gate * reciprocal(1.0f + exp2_fast(s.factor * gate)) * (up + s.beta);
}

// The tokens of a tile are finished 32 at a time: enough to hide latencies, and few are finished in vain.
#define AT_ONCE 4  // times 8 tokens

// fc1: a thread's row r is gate, its row r + 8 the up row of the same column. A warp has 8 columns: 16 bytes a token.
DEV void store_gated(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float gate_bias, float up_bias) {
    const int column = block * 32 + c.warp * 8 + (c.lane & 3) * 2, row = c.lane >> 2;
    const Swiglu s = {-1.44269504f * a.alpha, a.beta, a.limit};
    u16* to = a.matrix[0].out + (u64)(t.first + row) * COLUMNS1 + column;
#pragma unroll
    for (int j = 0; j < NMAX / 8; j += AT_ONCE, to += AT_ONCE * 8 * COLUMNS1) {
        if (8 * j >= t.count) break;
        u32 out[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float* v = acc + 4 * (j + i);
            const float h0 = swiglu(v[0] + gate_bias, v[2] + up_bias, s);
            const float h1 = swiglu(v[1] + gate_bias, v[3] + up_bias, s);
            out[i] = transpose8x8(pack_bf16x2(h0, h1));
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (8 * (j + i) + row < t.count && column < COLUMNS1) *(u32*)(to + i * 8 * COLUMNS1) = out[i];
    }
}

// fc2: rows are ordered so that after the transpositions a thread has four neighbours of a token: 32 bytes a warp.
DEV void store_plain(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float bias, float bias8) {
    const int column = block * 64 + c.warp * 16 + (c.lane & 3) * 4, row = c.lane >> 2;
    u16* to = a.matrix[1].out + (u64)(t.first + row) * COLUMNS2 + column;
#pragma unroll
    for (int j = 0; j < NMAX / 8; j += AT_ONCE, to += AT_ONCE * 8 * COLUMNS2) {
        if (8 * j >= t.count) break;
        uint2 out[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float* v = acc + 4 * (j + i);
            out[i].x = transpose8x8(pack_bf16x2(v[0] + bias, v[1] + bias));
            out[i].y = transpose8x8(pack_bf16x2(v[2] + bias8, v[3] + bias8));
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (8 * (j + i) + row < t.count && column < COLUMNS2) *(uint2*)(to + i * 8 * COLUMNS2) = out[i];
    }
}

DEV void say_written(const Args& a, const Consumer& c, const Tile& t) {
    if (t.second) return;
    __syncwarp();
    if (c.lane == 0) add_release(a.ready + 1 + t.token_tile, 1);
}

DEV void finish(const Args& a, const Consumer& c, const Tile& t, const float (&acc)[WM][NMAX / 2]) {
    const int blocks = shape_of(t).blocks;
    const float* biases = a.matrix[t.second].bias;
#pragma unroll
    for (int i = 0; i < WM; i++) {
        const int block = t.panel * PANEL + c.block + i;
        if (block >= blocks) break;
        float bias[2] = {0, 0};
        if (biases) {
            const float* from = biases + ((u64)t.expert * blocks + block) * 64 + c.warp * 16;
            bias[0] = from[c.lane >> 2], bias[1] = from[(c.lane >> 2) + 8];
        }
        if (t.second) store_plain(a, t, c, block, acc[i], bias[0], bias[1]);
        else store_gated(a, t, c, block, acc[i], bias[0], bias[1]);
    }
    say_written(a, c, t);
}

DEV void consume(const Args& a, const Memory& m, int warpgroup, int thread) {
    Consumer c;
    c.warp = thread >> 5, c.lane = thread & 31, c.block = warpgroup * WM;
    c.words = m.weights + c.block * BLOCK_BYTES + thread * 16;
    c.scales = m.weights + c.block * BLOCK_BYTES + WORDS_BYTES + c.warp * 32 + (c.lane >> 2) * 4;
    Ring ring;
    Queue queue;
    const int tiles = m.slots[E].x * (PANELS1 + PANELS2);
    // Warpgroups begin apart, so that later one finishes a tile while others multiply. They stay apart: whoever is alone
    // at the tensor cores is twice as fast.
    if (STAGGER && warpgroup) sleep_for(warpgroup * STAGGER);
    for (int index; (index = next_tile(m, queue, tiles)) >= 0;) {
        const Tile t = find_tile(m.slots, index);
        const Shape shape = shape_of(t);
        const int ktiles = shape.ktiles;
        if (t.panel * PANEL + c.block >= shape.blocks) {  // the last panel is not full: leave it to the others
            pass_stages(c, m, ring, ktiles);
            say_written(a, c, t);
            continue;
        }
        // One set of sums for all widths, and zeros rather than a first wgmma that overwrites: to ptxas an unset register
        // lives from the kernel's beginning, and the sums of all widths together would not fit.
        float acc[WM][NMAX / 2] = {};
        switch (t.n) {
#define CASE(N) \
    case N: main_loop<N>(c, m, ring, ktiles, acc); break;
            FOR_EACH_N(CASE)
#undef CASE
        }
        finish(a, c, t, acc);
    }
}

DEV void begin(const Args& a, const Memory& m) {
    for (int i = threadIdx.x; i <= E; i += THREADS) m.slots[i] = a.slots[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(m.full + 8 * i, 128 + 1);  // those who copy tokens, and the weights
            barrier_init(m.empty + 8 * i, 4 * NWG);
        }
        for (int i = 0; i < QUEUE; i++) {
            barrier_init(m.taken + 8 * i, 1);
            barrier_init(m.free + 8 * i, 4 * NWG + 4);
        }
        barrier_init_visible();
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide_gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 memory[];
    const Memory m = carve(memory);
    wait_for_kernel_before();
    begin(a, m);
    const int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127;
    if (warpgroup == NWG) {
        registers_less<PRODUCER_REGS>();
        produce(a, m, thread);
    } else {
        registers_more<CONSUMER_REGS>();
        consume(a, m, warpgroup, thread);
    }
    let_next_kernel_start();
}
