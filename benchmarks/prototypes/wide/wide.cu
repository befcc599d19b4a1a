// Both grouped GEMMs of an MXFP4 MoE layer for many tokens an expert. docs/dev/wide-kernel.md has
// reasons and numbers.
//
// Operands are swapped: weights are wgmma's A, decoded into registers by the warps that multiply
// them; tokens are B, in shared memory. A block takes 64 NWG WM weight rows x up to NMAX tokens of
// one expert at a time. One thread takes tiles and has the bulk copy engine fill stages, two copies
// each; NWG warpgroups decode, multiply and finish, each for its own rows: they share the ring of
// stages and nothing else. fc2's tiles follow fc1's in the same launch: a tile waits until all
// panels of fc1 have written its tokens.
//
// Macros, beside those of schedule.cuh:
//   PANELS1, PANELS2  of 64 NWG WM rows (schedule.cuh)
//   K1, BLOCKS1       fc1's dot product, blocks of 64 rows (gate and up, interleaved)
//   K2, BLOCKS2, COLUMNS2  fc2's, and the hidden size
//   NWG     consumer warpgroups;  WM  blocks of 64 rows of each;  STAGES  of 64 k
//   CONSUMER_REGS, PRODUCER_REGS  registers a thread after they are dealt out
//   STAGGER  nanoseconds between the warpgroups' beginnings
//   RUN     stages between the points where no wgmma is in flight (even)
//   EVERY_LANE  1: all lanes arrive at barriers, for compute-sanitizer, which does not see what
//           __syncwarp orders

#define THREADS (128 * (NWG + 1))
#define PANEL (NWG * WM)  // blocks of 64 rows
#define KTILES1 ((K1 + 63) / 64)
#define KTILES2 ((K2 + 63) / 64)
#define TOKEN_BYTES (NMAX * 128)
#define WORDS_BYTES 2048
#define BLOCK_BYTES 2176  // 64 rows x 64 k: words, then 8 rows x 4 bytes of scales for each warp
#define WEIGHT_BYTES (PANEL * BLOCK_BYTES)
#define ARRIVALS (4 * NWG * (EVERY_LANE ? 32 : 1))  // of those who multiply, at a barrier
#define QUEUE 2           // tiles that are taken ahead

struct Matrix {
    const u8* weights;  // [E, panels, ktiles, blocks of the panel, BLOCK_BYTES], layout.py
    const float* bias;  // [E, blocks * 64] in the order of the blocks' rows, or null
    const u8* x;        // bf16, tiled as schedule.cuh says
    void* out;          // fc1: the same for fc2; fc2: bf16 [rows, COLUMNS2]
};
struct Args {
    Matrix matrix[2];
    const int4* slots;  // schedule.cuh
    int* ready;         // tiles taken; then of each token tile: warps that have written its h
    float alpha, beta, limit;
};
struct Shape {
    int ktiles, blocks;
};
DEV Shape shape_of(const Tile& t) {
    return t.second ? Shape{KTILES2, BLOCKS2} : Shape{KTILES1, BLOCKS1};
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
// A warp's next tile; its number, -1 after the last.
DEV int next_tile(const Memory& m, Queue& q, int tiles) {
    barrier_wait(m.taken + 8 * q.stage, q.parity);
    const int index = load_shared4(m.queue + 4 * q.stage);
#if EVERY_LANE
    barrier_arrive(m.free + 8 * q.stage);
#else
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(m.free + 8 * q.stage);
#endif
    q.advance();
    return index < tiles ? index : -1;
}
// The producer takes a tile for itself and for the warps that multiply.
DEV int take_tile(const Args& a, const Memory& m, Queue& q, int index) {
    barrier_wait(m.free + 8 * q.stage, q.parity ^ 1);
    store_shared4(m.queue + 4 * q.stage, index);
    barrier_arrive(m.taken + 8 * q.stage);
    q.advance();
    return index;
}

// ---- producer: one thread -----------------------------------------------------------------------
// What a tile's stages are copied from.
struct Source {
    const u8 *weights, *tokens;
    u32 weight_bytes, token_bytes;  // of a stage
};
DEV Source source_of(const Matrix& a, const Tile& t) {
    const Shape s = shape_of(t);
    const int first = t.panel * PANEL;
    Source from;
    from.weights = a.weights + (u64)(t.expert * s.blocks + first) * (s.ktiles * BLOCK_BYTES);
    from.weight_bytes = min(PANEL, s.blocks - first) * BLOCK_BYTES;
    from.tokens = a.x + (u64)t.first * (s.ktiles * 128);
    from.token_bytes = t.n * 128;
    return from;
}

// fc2 reads what all panels of fc1 wrote, by ordinary stores: the copy engine is another proxy.
DEV void wait_for_first(const Args& a, const Tile& tile) {
    while (load_acquire(a.ready + 1 + tile.token_tile) < PANELS1 * NWG * 4) sleep_for(64);
    fence_async_proxy();
}

DEV void produce(const Args& a, const Memory& m) {
    Ring ring;
    Queue queue;
    const int tiles = m.slots[E].x * (PANELS1 + PANELS2);
    int ahead = atomicAdd(a.ready, 1);
    for (int index; (index = take_tile(a, m, queue, ahead)) < tiles;) {
        ahead = atomicAdd(a.ready, 1);
        const Tile tile = find_tile(m.slots, index);
        const Matrix& matrix = a.matrix[tile.second];
        Source from = source_of(matrix, tile);
        for (int kt = shape_of(tile).ktiles, first = tile.second; kt > 0; kt--, ring.advance()) {
            const u32 full = m.full + 8 * ring.stage;
            barrier_wait(m.empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_arrive_expect(full, from.weight_bytes + from.token_bytes);
            copy_bulk(m.weights + ring.stage * WEIGHT_BYTES, from.weights, from.weight_bytes, full);
            if (first) wait_for_first(a, tile), first = 0;
            copy_bulk(m.tokens + ring.stage * TOKEN_BYTES, from.tokens, from.token_bytes, full);
            from.weights += from.weight_bytes, from.tokens += from.token_bytes;
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

// A warp is done with a stage.
DEV void release(const Consumer& c, const Memory& m, u32 stage) {
#if EVERY_LANE
    barrier_arrive(m.empty + 8 * stage);
#else
    __syncwarp();
    if (c.lane == 0) barrier_arrive(m.empty + 8 * stage);
#endif
}

// A stage's A fragments: of each block of 64 rows, of four times 16 k.
struct Fragments {
    u32 of[WM][4][4];
};
DEV void decode_stage(const Consumer& c, const Memory& m, const Ring& at, Fragments& f) {
    Weights w[WM];
    barrier_wait(m.full + 8 * at.stage, at.parity);
    load_weights(c, at.stage, w);
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < WM; i++) decode(w[i], step, f.of[i][step]);
}
// Issues a stage; `ring` moves on.
template <int N>
DEV void multiply_stage(const Memory& m, Ring& ring, Fragments& f, float (&acc)[WM][NMAX / 2]) {
    wgmma_fence();
    const u64 tokens = swizzled_tile(m.tokens + ring.stage * TOKEN_BYTES);
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < WM; i++) wgmma<N>(acc[i], f.of[i][step], tokens + 2 * step);
    ring.advance();
    wgmma_commit();
}
// A warp is done with the oldest stage.
DEV void release_stage(const Consumer& c, const Memory& m, Ring& done) {
    release(c, m, done.stage);
    done.advance();
}

// acc = weights x tokens over all of K. While the tensor cores work on a stage, the next one is
// waited for and decoded, so its latencies are off the path; and a stage is issued before the one
// before it is done. Only where the loop turns is none in flight: otherwise ptxas serialises all
// wgmmas as soon as some five widths are compiled into a kernel. ring: what is multiplied next;
// done: what is released next.
template <int N>
DEV void run_of_stages(const Consumer& c, const Memory& m, Ring& ring, Ring& done,
                       Fragments (&f)[2], float (&acc)[WM][NMAX / 2]) {
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        multiply_stage<N>(m, ring, f[i & 1], acc);
        if (i) {
            wgmma_wait<1>();
            release_stage(c, m, done);
        }
        decode_stage(c, m, ring, f[~i & 1]);
    }
    wgmma_wait<0>();
    release_stage(c, m, done);
}
template <int N>
DEV void main_loop(const Consumer& c, const Memory& m, Ring& ring, int ktiles,
                   float (&acc)[WM][NMAX / 2]) {
    Fragments f[2];
    Ring done = ring;
    decode_stage(c, m, ring, f[0]);
    int left = ktiles;
#pragma unroll 1
    for (; left > RUN; left -= RUN) run_of_stages<N>(c, m, ring, done, f, acc);
#pragma unroll 1
    for (; left > 0; left -= 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (left == half) break;
            multiply_stage<N>(m, ring, f[half], acc);
            if (left > half + 1) decode_stage(c, m, ring, f[half ^ 1]);
            wgmma_wait<0>();
            release_stage(c, m, done);
        }
    }
}

// Of a tile that has no rows for this warpgroup.
DEV void pass_stages(const Consumer& c, const Memory& m, Ring& ring, int ktiles) {
    for (int kt = 0; kt < ktiles; kt++, ring.advance()) {
        barrier_wait(m.full + 8 * ring.stage, ring.parity);
        release(c, m, ring.stage);
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

// The tokens of a tile are finished 32 at a time: enough to hide latencies, and few are finished in
// vain.
#define AT_ONCE 4  // times 8 tokens

// fc1: a thread's row r is gate, its row r + 8 the up row of the same column. A warp has 8 columns:
// 16 bytes a token.
DEV void store_gated(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float gate_bias, float up_bias) {
    const int row = c.lane >> 2;
    const Swiglu s = {-1.44269504f * a.alpha, a.beta, a.limit};
    u8* to = (u8*)a.matrix[0].out + (u64)t.first * (KTILES2 * 128) +
             tiled(t.n, row, block * 4 + c.warp) + (c.lane & 3) * 4;
#pragma unroll
    for (int j = 0; j < NMAX / 8; j += AT_ONCE) {
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
            if (8 * (j + i) + row < t.count) *(u32*)(to + (j + i) * 8 * 128) = out[i];
    }
}

// fc2: rows are ordered so that after the transpositions a thread has four neighbours of a token:
// 32 bytes a warp.
DEV void store_plain(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float bias, float bias8) {
    const int column = block * 64 + c.warp * 16 + (c.lane & 3) * 4, row = c.lane >> 2;
    u16* to = (u16*)a.matrix[1].out + (u64)(t.first + row) * COLUMNS2 + column;
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
            if (8 * (j + i) + row < t.count && column < COLUMNS2)
                *(uint2*)(to + i * 8 * COLUMNS2) = out[i];
    }
}

DEV void say_written(const Args& a, const Consumer& c, const Tile& t) {
    if (t.second) return;
    fence_async_proxy();
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
    // Warpgroups begin apart, so that later one finishes a tile while others multiply. They stay
    // apart: whoever is alone at the tensor cores is twice as fast.
    if (STAGGER && warpgroup) sleep_for(warpgroup * STAGGER);
    for (int index; (index = next_tile(m, queue, tiles)) >= 0;) {
        const Tile t = find_tile(m.slots, index);
        const Shape shape = shape_of(t);
        const int ktiles = shape.ktiles;
        if (t.panel * PANEL + c.block >= shape.blocks) {  // no rows: the last panel is not full
            pass_stages(c, m, ring, ktiles);
            say_written(a, c, t);
            continue;
        }
        // One set of sums for all widths, and zeros rather than a first wgmma that overwrites: to
        // ptxas an unset register lives from the kernel's beginning, and the sums of all widths
        // together would not fit.
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
            barrier_init(m.full + 8 * i, 1);
            barrier_init(m.empty + 8 * i, ARRIVALS);
        }
        for (int i = 0; i < QUEUE; i++) {
            barrier_init(m.taken + 8 * i, 1);
            barrier_init(m.free + 8 * i, ARRIVALS);
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
    // A whole warpgroup for the one thread that copies: registers come from a file of each quarter
    // of an SM, so a ninth warp alone would leave two thirds of one to the others.
    if (warpgroup == NWG) {
        registers_less<PRODUCER_REGS>();
        if (thread == 0) produce(a, m);
    } else {
        registers_more<CONSUMER_REGS>();
        consume(a, m, warpgroup, thread);
    }
    let_next_kernel_start();
}
