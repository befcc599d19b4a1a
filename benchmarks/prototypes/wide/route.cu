// Before and after the GEMMs: pairs (a token and one of its experts) sorted by expert on the
// device, always in the same order; tokens copied to where fc1 reads them; a token's rows added up
// in the order of its experts. Macros: schedule.cuh's, TOPK, COLUMNS (hidden size), INTER.
#define CHUNK 1024  // pairs of a block, one a thread
#define INTER_PADDED ((INTER + 63) / 64 * 64)
#define PADDED ((COLUMNS + 63) / 64 * 64)

struct RouteArgs {
    const int* ids;  // [pairs]; an id that is no expert is a hole
    int* counts;     // [blocks, E]
    int* place;      // of a pair, its row (schedule.cuh); -1: a hole
    int4* experts;   // of an expert, its first row and the width of its tiles
    int4* slots;     // schedule.cuh
    int* ready;      // wide.cu: zeroed here
    int pairs, token_tiles;  // at most
};

DEV int expert_of(const RouteArgs& a, int pair) {
    const int id = pair < a.pairs ? a.ids[pair] : -1;
    return id >= 0 && id < E ? id : -1;
}

extern "C" __global__ void __launch_bounds__(CHUNK)
route_count(const __grid_constant__ RouteArgs a) {
    __shared__ int count[E];
    for (int e = threadIdx.x; e < E; e += CHUNK) count[e] = 0;
    __syncthreads();
    const int e = expert_of(a, blockIdx.x * CHUNK + threadIdx.x);
    if (e >= 0) atomicAdd(count + e, 1);
    __syncthreads();
    for (int i = threadIdx.x; i < E; i += CHUNK) a.counts[blockIdx.x * E + i] = count[i];
    let_next_kernel_start();
}

// The sum of what the threads before this one have; E <= CHUNK numbers, one a thread.
DEV int sum_before(int own) {
    __shared__ int warps[CHUNK / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int scan = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, scan, d);
        if (lane >= d) scan += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = scan;
    __syncthreads();
    int before = 0;
    for (int i = 0; i < warp; i++) before += warps[i];
    return before + scan - own;
}

// Experts by width of their tiles, the widest first, for find_tile.
DEV void make_slots(const RouteArgs& a, int begin, int count) {
    __shared__ int width[E], sorted[E];
    const int e = threadIdx.x, tiles = tiles_of(count), mine = count ? width_of(count, tiles) : 0;
    if (e < E) width[e] = mine;
    __syncthreads();
    int rank = 0;
    for (int i = 0; i < E; i++) rank += width[i] > mine || (width[i] == mine && i < e);
    if (e < E) sorted[rank] = tiles;
    __syncthreads();
    const int own = e < E ? sorted[e] : 0, before = sum_before(own);
    __syncthreads();
    if (e < E) sorted[e] = before;
    if (e == E - 1) a.slots[E] = make_int4(before + own, 0, 0, 0);
    __syncthreads();
    if (e < E) a.slots[rank] = make_int4(sorted[rank], e, begin, count);
    if (e < E) a.experts[e] = make_int4(begin, mine, 0, 0);
}

extern "C" __global__ void __launch_bounds__(CHUNK)
route_place(const __grid_constant__ RouteArgs a) {
    __shared__ int start[E];
    __shared__ u16 in_warp[CHUNK / 32][E];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    for (int i = thread; i < CHUNK / 32 * E; i += CHUNK) (&in_warp[0][0])[i] = 0;
    wait_for_kernel_before();
    int before = 0, total = 0;
    if (thread < E)
        for (int b = 0; b < gridDim.x; b++) {
            const int count = a.counts[b * E + thread];
            before += b < blockIdx.x ? count : 0;
            total += count;
        }
    const int begin = sum_before(tiles_of(total) * width_of(total, tiles_of(total)));
    if (thread < E) start[thread] = begin + before;
    __syncthreads();
    // A pair's rank among its expert's: in the warp, of the warps before, of the blocks before.
    const int pair = blockIdx.x * CHUNK + thread, e = expert_of(a, pair);
    const u32 same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) in_warp[warp][e] = __popc(same);
    __syncthreads();
    if (thread < E) {
        int sum = 0;
        for (int w = 0; w < CHUNK / 32; w++) {
            const int count = in_warp[w][thread];
            in_warp[w][thread] = sum, sum += count;
        }
    }
    __syncthreads();
    if (pair < a.pairs) {
        const int at = e < 0 ? -1 : start[e] + in_warp[warp][e] + rank;
        a.place[pair] = at;
    }
    if (blockIdx.x == 0) {
        make_slots(a, begin, total);
        for (int i = thread; i <= a.token_tiles; i += CHUNK) a.ready[i] = 0;
    }
    let_next_kernel_start();
}

struct TokenArgs {
    const u16* x;         // bf16 [tokens, COLUMNS], rows x_stride apart
    const int* ids;       // [tokens, TOPK]
    const int* place;     // the same
    const int4* experts;  // of route_place
    u8* tokens;           // bf16 [rows, PADDED] as schedule.cuh says
    u8* h;                // [rows, INTER_PADDED]: its columns beyond what fc1 writes become zeros
    long long x_stride;
};

// A block copies a token to the tiles of its experts.
extern "C" __global__ void __launch_bounds__(128)
route_tokens(const __grid_constant__ TokenArgs a) {
    const int token = blockIdx.x;
    const uint4* x = (const uint4*)(a.x + token * a.x_stride);
    uint4 v[(PADDED / 8 + 127) / 128];
#pragma unroll
    for (int i = 0; i < (PADDED / 8 + 127) / 128; i++) {
        const int chunk = threadIdx.x + 128 * i;
        v[i] = chunk < COLUMNS / 8 ? x[chunk] : make_uint4(0, 0, 0, 0);
    }
    wait_for_kernel_before();
#pragma unroll
    for (int k = 0; k < TOPK; k++) {
        const int row = a.place[token * TOPK + k];
        if (row < 0) continue;
        const int4 expert = a.experts[a.ids[token * TOPK + k]];
        const int in_tile = (row - expert.x) % expert.y, first = row - in_tile;
        u8* to = a.tokens + (u64)first * (PADDED * 2);
#pragma unroll
        for (int i = 0; i < (PADDED / 8 + 127) / 128; i++) {
            const int chunk = threadIdx.x + 128 * i;
            if (chunk < PADDED / 8) *(uint4*)(to + tiled(expert.y, in_tile, chunk)) = v[i];
        }
        const int written = (INTER + 31) / 32 * 4, chunk = written + threadIdx.x;
        if (chunk < INTER_PADDED / 8)
            *(uint4*)(a.h + (u64)first * (INTER_PADDED * 2) + tiled(expert.y, in_tile, chunk)) =
                make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();  // the copy engine reads it
    let_next_kernel_start();
}

struct SumArgs {
    const u16* rows;    // bf16 [sorted pairs, COLUMNS]
    const int* place;   // [tokens, TOPK]
    const float* topw;  // [tokens, TOPK]
    u16* out;           // bf16 [tokens, COLUMNS]
    int tokens;
};

DEV void add_row(float (&sum)[8], uint4 row, float weight) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 v = (&row.x)[i];
        sum[2 * i] += weight * __uint_as_float(v << 16);
        sum[2 * i + 1] += weight * __uint_as_float(v & 0xffff0000u);
    }
}

// Eight columns of a token a thread.
extern "C" __global__ void __launch_bounds__(256) route_sum(const __grid_constant__ SumArgs a) {
    const u32 index = blockIdx.x * 256 + threadIdx.x, token = index / (COLUMNS / 8);
    const u32 column = (index - token * (COLUMNS / 8)) * 8;
    wait_for_kernel_before();
    if (token >= a.tokens) return;
    uint4 row[TOPK];
    int place[TOPK];
#pragma unroll
    for (int k = 0; k < TOPK; k++) place[k] = a.place[token * TOPK + k];
#pragma unroll
    for (int k = 0; k < TOPK; k++)
        if (place[k] >= 0) row[k] = *(const uint4*)(a.rows + (u64)place[k] * COLUMNS + column);
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < TOPK; k++)
        if (place[k] >= 0) add_row(sum, row[k], a.topw[token * TOPK + k]);
    *(uint4*)(a.out + (u64)token * COLUMNS + column) =
        make_uint4(pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]),
                   pack_bf16x2(sum[4], sum[5]), pack_bf16x2(sum[6], sum[7]));
}
