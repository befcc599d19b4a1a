// One grouped GEMM of an MXFP4 MoE layer for many tokens an expert. docs/dev/wide-kernel.md has reasons and numbers.
//
// Operands are swapped: weights are wgmma's A, decoded into registers by the warps that multiply them; tokens are B, in
// shared memory. A block takes 64 NWG WM weight rows x up to NMAX tokens of one expert at a time and walks through
// its share of the tiles. One warpgroup copies (tokens row by row, so that fc1 needs no sorted copy of x); NWG
// warpgroups decode, multiply and finish, each for its own rows: they share the ring of stages and nothing else.
//
// Macros, beside those of schedule.cuh:
//   GATED   1: fc1 (gate and up rows interleaved, SwiGLU); 0: fc2
//   K       the dot product's length;  BLOCKS  its matrix's blocks of 64 rows;  COLUMNS  of the output
//   NWG     consumer warpgroups;  WM  blocks of 64 rows of each;  STAGES  of 64 k
//   CONSUMER_REGS, PRODUCER_REGS  registers a thread after they are dealt out

#define THREADS (128 * (NWG + 1))
#define PANEL (NWG * WM)  // blocks of 64 rows
#define PANELS ((BLOCKS + PANEL - 1) / PANEL)
#define KTILES ((K + 63) / 64)
#define TOKEN_BYTES (NMAX * 128)
#define WORDS_BYTES 2048
#define BLOCK_BYTES 2176  // 64 rows x 64 k: words, then 8 rows x 4 bytes of scales for each warp
#define WEIGHT_BYTES (PANEL * BLOCK_BYTES)

struct Args {
    const u8* weights;   // [E, BLOCKS, KTILES, BLOCK_BYTES], layout.py
    const float* bias;   // [E, BLOCKS * 64] in the order of the blocks' rows, or null
    const u16* x;        // bf16, rows of K
    const int* row_of;   // of a sorted pair, its row of x; null: itself
    const int4* slots;   // schedule.cuh
    u16* out;            // bf16 [sorted pairs, COLUMNS]
    long long x_stride;  // in elements
    float alpha, beta, limit;
};

// Shared memory: tokens of all stages (each 1024-byte aligned), their weights, barriers, slots.
struct Memory {
    u32 tokens, weights, full, empty;
    const int4* slots;
};
DEV Memory carve(u8* base) {
    const u32 at = shared_address(base);
    Memory m;
    m.tokens = at;
    m.weights = at + STAGES * TOKEN_BYTES;
    m.full = m.weights + STAGES * WEIGHT_BYTES;
    m.empty = m.full + 8 * STAGES;
    m.slots = (const int4*)(base + STAGES * (TOKEN_BYTES + WEIGHT_BYTES + 16));
    return m;
}

struct Ring {
    u32 stage = 0, parity = 0;
    DEV void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// ---- producer -----------------------------------------------------------------------------------
// Eight threads copy a token's 64 k; a thread has the same 16 of their 128 bytes in every 16th row.
#define ROWS_EACH (NMAX / 16)
struct Rows {
    u32 from[ROWS_EACH];  // in 16 bytes of x: a pointer would take two of the few registers
    int count;            // rows of this thread that are tokens
};
DEV Rows token_rows(const Args& a, const Tile& tile, int thread) {
    Rows r;
    const int row = thread >> 3;
    r.count = (tile.count - row + 15) >> 4;
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++) {
        const int n = min(row + 16 * i, tile.count - 1) + tile.first;
        r.from[i] = (a.row_of ? a.row_of[n] : n) * (u32)(a.x_stride / 8) + (thread & 7);
    }
    return r;
}

DEV void copy_weights(const Args& a, const Memory& m, const Tile& tile, int kt, u32 stage) {
    const u32 bar = m.full + 8 * stage, to = m.weights + stage * WEIGHT_BYTES;
    barrier_arrive_expect(bar, WEIGHT_BYTES);
#pragma unroll
    for (int b = 0; b < PANEL; b++) {
        const int block = min(tile.panel * PANEL + b, BLOCKS - 1);
        const u8* from = a.weights + (((u64)tile.expert * BLOCKS + block) * KTILES + kt) * BLOCK_BYTES;
        copy_bulk(to + b * BLOCK_BYTES, from, BLOCK_BYTES, bar);
    }
}

DEV void copy_tokens(const Args& a, const Memory& m, const Rows& rows, int kt, u32 stage, int thread) {
    const u32 row = thread >> 3, chunk = thread & 7;
    const u32 to = m.tokens + stage * TOKEN_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4);
    const u32 bytes = K % 64 == 0 || kt * 64 + chunk * 8 < K ? 16 : 0;
    const uint4* from = (const uint4*)a.x + (bytes ? kt * 8 : 0);
#pragma unroll
    for (int i = 0; i < ROWS_EACH; i++) {
        if (i < rows.count) copy16(to + i * 2048, from + rows.from[i], bytes);
    }
    barrier_arrive_after_copies(m.full + 8 * stage);
}

DEV void produce(const Args& a, const Memory& m, int thread) {
    Ring ring;
    const int tiles = m.slots[E].x * PANELS;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = find_tile(m.slots, PANELS, index);
        Rows rows = token_rows(a, tile, thread);
        for (int kt = 0; kt < KTILES; kt++, ring.advance()) {
            barrier_wait(m.empty + 8 * ring.stage, ring.parity ^ 1);
            if (thread == 0) copy_weights(a, m, tile, kt, ring.stage);
            copy_tokens(a, m, rows, kt, ring.stage, thread);
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

// acc = weights x tokens over all of K. While the tensor cores work on a stage, the next one is waited for and decoded:
// so its latencies, which bind narrow tiles, are off the path. No wgmma is in flight where the loop turns: with one,
// ptxas serialises all of them as soon as some five widths are compiled into a kernel.
template <int N>
DEV void main_loop(const Consumer& c, const Memory& m, Ring& ring, float (&acc)[WM][NMAX / 2]) {
    Fragments f[2];
    decode_stage(c, m, ring, f[0]);
#pragma unroll 1
    for (int kt = 0; kt < KTILES; kt += 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (kt + half == KTILES) break;
            const u32 stage = ring.stage;
            ring.advance();
            multiply_stage<N>(m, stage, f[half], acc);
            if (kt + half + 1 < KTILES) decode_stage(c, m, ring, f[half ^ 1]);
            wgmma_wait<0>();
            if (c.lane == 0) barrier_arrive(m.empty + 8 * stage);
        }
    }
}

// Not fminf and fmaxf, which would make a NaN a number.
DEV float swiglu(float gate, float up, const Args& a) {
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    return __fdividef(gate, 1.0f + __expf(-a.alpha * gate)) * (up + a.beta);
}

// fc1: a thread's row r is gate, its row r + 8 the up row of the same column. A warp has 8 columns: 16 bytes a token.
DEV void store_gated(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float gate_bias, float up_bias) {
    const int column = block * 32 + c.warp * 8 + (c.lane & 3) * 2;
    u16* to = a.out + (u64)(t.first + (c.lane >> 2)) * COLUMNS + column;
#pragma unroll
    for (int j = 0; j < NMAX / 8; j++, to += 8 * COLUMNS) {
        if (8 * j >= t.count) break;
        const float* v = acc + 4 * j;
        const float h0 = swiglu(v[0] + gate_bias, v[2] + up_bias, a);
        const float h1 = swiglu(v[1] + gate_bias, v[3] + up_bias, a);
        const u32 out = transpose8x8(pack_bf16x2(h0, h1));
        if (8 * j + (c.lane >> 2) < t.count && column < COLUMNS) *(u32*)to = out;
    }
}

// fc2: rows are ordered so that after the transpositions a thread has four neighbours of a token: 32 bytes a warp.
DEV void store_plain(const Args& a, const Tile& t, const Consumer& c, int block, const float* acc,
                     float bias, float bias8) {
    const int column = block * 64 + c.warp * 16 + (c.lane & 3) * 4;
    u16* to = a.out + (u64)(t.first + (c.lane >> 2)) * COLUMNS + column;
#pragma unroll
    for (int j = 0; j < NMAX / 8; j++, to += 8 * COLUMNS) {
        if (8 * j >= t.count) break;
        const float* v = acc + 4 * j;
        const u32 low = transpose8x8(pack_bf16x2(v[0] + bias, v[1] + bias));
        const u32 high = transpose8x8(pack_bf16x2(v[2] + bias8, v[3] + bias8));
        if (8 * j + (c.lane >> 2) < t.count && column < COLUMNS) *(uint2*)to = make_uint2(low, high);
    }
}

DEV void finish(const Args& a, const Consumer& c, const Tile& t, const float (&acc)[WM][NMAX / 2]) {
#pragma unroll
    for (int i = 0; i < WM; i++) {
        const int block = t.panel * PANEL + c.block + i;
        if (block >= BLOCKS) break;
        float bias[2] = {0, 0};
        if (a.bias) {
            const float* from = a.bias + ((u64)t.expert * BLOCKS + block) * 64 + c.warp * 16;
            bias[0] = from[c.lane >> 2], bias[1] = from[(c.lane >> 2) + 8];
        }
        if (GATED) store_gated(a, t, c, block, acc[i], bias[0], bias[1]);
        else store_plain(a, t, c, block, acc[i], bias[0], bias[1]);
    }
}

DEV void consume(const Args& a, const Memory& m, int warpgroup, int thread) {
    Consumer c;
    c.warp = thread >> 5, c.lane = thread & 31, c.block = warpgroup * WM;
    c.words = m.weights + c.block * BLOCK_BYTES + thread * 16;
    c.scales = m.weights + c.block * BLOCK_BYTES + WORDS_BYTES + c.warp * 32 + (c.lane >> 2) * 4;
    Ring ring;
    const int tiles = m.slots[E].x * PANELS;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile t = find_tile(m.slots, PANELS, index);
        // One set of sums for all widths, and zeros rather than a first wgmma that overwrites: to ptxas an unset register
        // lives from the kernel's beginning, and the sums of all widths together would not fit.
        float acc[WM][NMAX / 2] = {};
        switch (__shfl_sync(~0u, t.n, 0)) {
#define CASE(N) \
    case N: main_loop<N>(c, m, ring, acc); break;
            FOR_EACH_N(CASE)
#undef CASE
        }
        finish(a, c, t, acc);
    }
}

DEV void begin(const Args& a, const Memory& m, u8* memory) {
    int4* slots = (int4*)m.slots;
    for (int i = threadIdx.x; i <= E; i += THREADS) slots[i] = a.slots[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(m.full + 8 * i, 128 + 1);  // those who copy tokens, and the weights
            barrier_init(m.empty + 8 * i, 4 * NWG);
        }
        barrier_init_visible();
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide_gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 memory[];
    const Memory m = carve(memory);
    wait_for_kernel_before();
    begin(a, m, memory);
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
