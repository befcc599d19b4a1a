// The `smallbatch` kernel: one grouped GEMM of a MoE layer for few tokens an expert, on the very bytes that
// FlashInfer's SM90 W4A16 kernel reads. docs/kernels/smallbatch.md has the reasons, the predictions and the times.
//
// Compiled for a layer's sizes, which come as macros:
//   GATED  1: fc1 (gate and up rows, SwiGLU, one bf16 row a pair); 0: fc2 (times the top-k weight, one float row a pair)
//   K, KP  the dot product's true length, and padded to 128;  ROWS, ROWSP  output rows (I or H), true and padded
//   E      experts;  NT  tokens of an expert at a time, in eights
//   WK     warps that share a dot product;  CH  chunks of 128 k of each;  BUFS  units whose sums may wait;  CTAS  blocks an SM
//
// A pair is a token and one of its experts. A segment is an expert with up to 8 NT of its pairs; a unit is 32 rows of
// a segment (16 gate and 16 up, or 32 of w2) and the whole dot product. Blocks take equal runs of units.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define CHUNK 128
#define CHUNKS (KP / CHUNK)
#define WARPS (WK + NT * BUFS)  // beside the WK, one for each 8 tokens of each buffer of sums
#define THREADS (32 * WARPS)
#define TOKENS (8 * NT)
#define UNITS (GATED ? ROWS / 16 : ROWS / 32)
#define WROWS (GATED ? 2 * ROWSP : ROWSP)
#define ROW_BYTES (KP / 2)
#define XCHUNK (2048 * NT)       // bytes of a chunk of x in shared memory

struct Args {
    const u8* w;        // [E, WROWS, KP/2], FlashInfer's interleaved words
    const u8* scale;    // [E, WROWS/64, KP/128, 16, 16], its folded E8M0 bytes
    const u16* bias;    // [E, WROWS] bf16, or null
    const u16* x;       // fc1: bf16 [M, K], rows x_stride apart; fc2: bf16 [pairs, K], ROWS of fc1 each
    const void* ids;    // [M, top_k] int32 or int64
    const float* topw;  // [M, top_k]
    void* out;          // fc1: bf16 [pairs, ROWS]; fc2: float [pairs, ROWS]
    int pairs, top_k, x_stride, ids64, ids_s0, ids_s1, topw_s0, topw_s1;
    u32 magic;  // 2^31 / top_k rounded up, to divide by it
    float alpha, beta, limit;
};

__device__ __forceinline__ uint4 load16(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
__device__ __forceinline__ u32 load1(const u8* p) {
    u32 v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
    u32 d;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ void mma(float* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float to_float(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 to_bf16(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u64* b, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* b) {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"(shared(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* b, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(shared(b)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void sync_streamers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WK) : "memory"); }

// pair / top_k, exact for the pairs of a call
__device__ __forceinline__ int token_of(u32 pair, u32 magic) { return (u64)pair * magic >> 31; }

// A pair's expert, -1 where it is a hole.
__device__ __forceinline__ int expert_of(const void* ids, int ids64, long long at) {
    const long long v = ids64 ? ((const long long*)ids)[at] : ((const int*)ids)[at];
    return v >= 0 && v < E ? (int)v : -1;
}

// What a warp multiplies at a time: two slabs of 16 rows x 128 k. A lane holds 16 bytes of its row r (h = 0) and of
// r + 8 (h = 1); each of the words has k0, k0+1, k0+8, k0+9 of both rows (facts in layout.py).
struct Step {
    uint4 w[2][2];  // slab, h
    u32 s[2][2];    // slab, row r or r + 8: the E8M0 byte of the lane's 32 k
};
template <bool B>
struct Flag {
    static constexpr bool on = B;
};

#define BITS 0x81C081C0u  // sign, exponent and mantissa of two e2m1 values as scattered in a word
__device__ __forceinline__ u32 last_pair(u32 v) { return (v << 1 & 0x80008000u) | (v >> 3 & 0x01800180u) | (v >> 7 & 0x00400040u); }

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) moe_gemm(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    u8* const xs = memory;                                  // x of a segment, as the tensor cores' B fragments
    constexpr int SUMS = WK * 2 * NT * 32;                  // float4s of a buffer
    float4* const sums = (float4*)(memory + CHUNKS * XCHUNK);
    u32* const expert = (u32*)(sums + BUFS * SUMS);         // pairs << 16 | where they begin in list, of each expert
    int* const ids = (int*)(expert + E);                    // of each pair: place among its expert's << 16 | expert
    const int pairs = a.pairs;
    u32* const segment = (u32*)(ids + pairs);               // expert << 16 | pairs of it, then where they begin in list
    u16* const list = (u16*)(segment + 2 * min(pairs, E + pairs / TOKENS));  // pairs by expert
    __shared__ u32 warp_total[WARPS];
    __shared__ u64 full[BUFS], empty[BUFS];

    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int g = lane >> 2, t = lane & 3;

    // ---- Segments: every block finds them for itself, in the order of experts -----------------------
    for (int e = tid; e < E; e += THREADS) expert[e] = 0;
    for (int p = tid; p < pairs; p += THREADS) {
        const int m = token_of(p, a.magic), k = p - m * a.top_k;
        ids[p] = expert_of(a.ids, a.ids64, (long long)m * a.ids_s0 + (long long)k * a.ids_s1);
    }
    if (tid == 0)
        for (int i = 0; i < BUFS; i++) barrier_init(full + i, WK), barrier_init(empty + i, NT);
    if (KP > K)  // zeros beyond K in the last chunk, never written again; w has zeros there too, but x might be NaN
        for (int i = tid; i < XCHUNK / 16; i += THREADS) ((uint4*)(xs + (CHUNKS - 1) * XCHUNK))[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int p = tid; p < pairs; p += THREADS)
        if (ids[p] >= 0) ids[p] |= atomicAdd(expert + ids[p], 1) << 16;
    __syncthreads();
    u32 before = 0;  // of the experts so far: segments << 16 | pairs
    bool several = false;
    for (int e0 = 0; e0 < E; e0 += THREADS) {
        const int e = e0 + tid;
        const u32 mine = e < E ? expert[e] : 0;
        const u32 own = (mine + TOKENS - 1) / TOKENS << 16 | mine;
        u32 scan = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const u32 o = __shfl_up_sync(~0u, scan, d);
            if (lane >= d) scan += o;
        }
        if (e0) __syncthreads();
        if (lane == 31) warp_total[warp] = scan;
        __syncthreads();
        u32 first = before + scan - own;
        for (int i = 0; i < WARPS; i++) {
            first += i < warp ? warp_total[i] : 0;
            before += warp_total[i];
        }
        if (mine) {
            const u32 at = first & 0xffff;
            expert[e] = mine << 16 | at;
            for (u32 done = 0, seg = first >> 16; done < mine; done += TOKENS, seg++) {
                segment[2 * seg] = (u32)e << 16 | min(mine - done, TOKENS);
                segment[2 * seg + 1] = at + done;
            }
        }
        several |= mine > TOKENS;
    }
    __syncthreads();
    auto fill = [&] {
        for (int p = tid; p < pairs; p += THREADS)
            if (ids[p] >= 0) list[(expert[ids[p] & 0xffff] & 0xffff) + (ids[p] >> 16)] = p;
    };
    fill();
    // Which place a pair got within its expert is chance and no matter: its sums are the same in any. But where an
    // expert has more than one segment, all blocks must put the same pairs into each: there it is the pairs' order.
    if (__syncthreads_or(several)) {
        for (int p = tid; p < pairs; p += THREADS) {
            if (ids[p] < 0) continue;
            const u32 e = ids[p] & 0xffff, at = expert[e] & 0xffff, mine = expert[e] >> 16;
            if (mine <= TOKENS) continue;
            u32 place = 0;
            for (u32 i = 0; i < mine; i++) place += list[at + i] < p;
            ids[p] = place << 16 | e;
        }
        __syncthreads();
        fill();
        __syncthreads();
    }
    const long long units = (long long)(before >> 16) * UNITS;
    const int lo = (int)(units * blockIdx.x / gridDim.x), hi = (int)(units * (blockIdx.x + 1) / gridDim.x);
    asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may begin to begin

    if (warp < WK) {  // ---- Streamers: weights from memory to tensor cores, by way of registers -----
        const u8* const w_lane = a.w + (u64)g * ROW_BYTES + warp * (CHUNK / 2) + 16 * t;
        const u8* const s_lane = a.scale + warp * 256 + g * 16 + t;
        const u8* const x_lane = xs + warp * XCHUNK + lane * 16;
        const bool tail = CHUNK * (warp + WK * (CH - 1)) + 64 * (t >> 1) < K;  // whether the lane's part of the last step exists
        constexpr int W_SLAB = GATED ? -ROWSP * ROW_BYTES : 16 * ROW_BYTES;    // from the first slab to the second
        constexpr int S_SLAB = GATED ? -(ROWSP / 64) * CHUNKS * 256 : 4;
        // The next unit to load. One address for its weights and one for its scales; all else is a constant offset.
        int seg_next = lo / UNITS, r_next = lo - seg_next * UNITS;
        u32 e_next = lo < hi ? segment[2 * seg_next] >> 16 : 0;
        const u8 *w_unit, *s_unit;
        auto locate = [&] {
            const int row = GATED ? ROWSP + 16 * r_next : 32 * r_next;  // gate is w13's second half
            w_unit = w_lane + (u64)(e_next * (u32)WROWS + row) * ROW_BYTES;
            s_unit = s_lane + (u64)(e_next * (u32)(WROWS / 64) + (row >> 6)) * (CHUNKS * 256) + (row >> 2 & 12);
            if (++r_next == UNITS) {
                r_next = 0, seg_next++;
                if (seg_next * UNITS < hi) e_next = segment[2 * seg_next] >> 16;
            }
        };
        auto load = [&](Step& q, int step) {
            const bool live = step < CH - 1 || tail;
#pragma unroll
            for (int slab = 0; slab < 2; slab++) {
                const u8* p = w_unit + slab * W_SLAB + step * WK * (CHUNK / 2);
                const u8* s = s_unit + slab * S_SLAB + step * WK * 256;
#pragma unroll
                for (int h = 0; h < 2; h++) q.w[slab][h] = live ? load16(p + h * 8 * ROW_BYTES) : make_uint4(0, 0, 0, 0);
                q.s[slab][0] = live ? load1(s) : 1;
                q.s[slab][1] = live ? load1(s + 128) : 1;
            }
        };

        Step steps[CH];
        if (lo < hi) {
            locate();
#pragma unroll
            for (int i = 0; i < CH; i++) load(steps[i], i);
        }
        if (!GATED) asm volatile("griddepcontrol.wait;" ::: "memory");  // fc1's rows are there from here on

        u32 done = 0;
        int segment_end = lo;
        for (int unit = lo; unit < hi; unit++, done++) {
            if (unit >= segment_end) {  // x of the next segment: 16 bytes go where lane 4 n + t reads them
                const int seg = unit / UNITS;
                const u32 count = segment[2 * seg] & 0xffff, at = segment[2 * seg + 1];
                segment_end = (seg + 1) * UNITS;
                if (done) sync_streamers();
                for (u32 n = 0; n < count; n++) {
                    const int pair = list[at + n];
                    const u16* const row = a.x + (long long)(GATED ? token_of(pair, a.magic) : pair) * a.x_stride;
                    for (int q = tid; q < K / 8; q += 32 * WK) {
                        const int c = q >> 4, slice = q >> 2 & 3, part = q & 3;
                        u8* const to = xs + c * XCHUNK + (part * NT + (n >> 3)) * 512 + ((n & 7) * 4 + slice) * 16;
                        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(row + 8 * q) : "memory");
                    }
                }
                asm volatile("cp.async.wait_all;" ::: "memory");
                sync_streamers();
            }
            const bool more = unit + 1 < hi;
            if (more) locate();
            float acc[2][NT][4] = {};
#pragma unroll
            for (int i = 0; i < CH; i++) {
                Step& q = steps[i];
                auto multiply = [&](auto large) {
                    // The bits of a weight are 2^-126 of its value. An E8M0 byte e becomes the bf16 2^(e - 127 + 126), which
                    // overflows beyond e = 128: there the rest is a second factor.
                    u32 factor[2][2];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const u32 e = q.s[j >> 1][j & 1];
                        factor[j >> 1][j & 1] = ((large.on && e > 128 ? 128 : e) + 126) * 0x800080u;
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        uint4 x[2][NT];
#pragma unroll
                        for (int j = 0; j < 2 * NT; j++)
                            x[j / NT][j % NT] = *(const uint4*)(x_lane + i * WK * XCHUNK + ((2 * h + j / NT) * NT + j % NT) * 512);
#pragma unroll
                        for (int word = 0; word < 4; word += 2)
#pragma unroll
                            for (int slab = 0; slab < 2; slab++) {
                                // Two words make two A fragments: the low pairs of both, then the high pairs, so that the two
                                // registers of x that go with a fragment are neighbours.
                                const u32 v = (&q.w[slab][h].x)[word], w = (&q.w[slab][h].x)[word + 1];
                                u32 f[2][4] = {{v & BITS, v << 3 & BITS, w & BITS, w << 3 & BITS},
                                               {v << 6 & BITS, last_pair(v), w << 6 & BITS, last_pair(w)}};
#pragma unroll
                                for (int half = 0; half < 2; half++) {
#pragma unroll
                                    for (int j = 0; j < 4; j++) {
                                        f[half][j] = mul2(f[half][j], factor[slab][j & 1]);
                                        const u32 e = q.s[slab][j & 1];
                                        if (large.on) f[half][j] = mul2(f[half][j], (e > 128 ? e - 1 : 127) * 0x800080u);
                                    }
#pragma unroll
                                    for (int n = 0; n < NT; n++)
                                        mma(acc[slab][n], f[half], (&x[half][n].x)[word], (&x[half][n].x)[word + 1]);
                                }
                            }
                    }
                };
                if (warp + WK * i < CHUNKS) {
                    const u32 any = q.s[0][0] | q.s[0][1] | q.s[1][0] | q.s[1][1];
                    if (__any_sync(~0u, any & 0x80)) multiply(Flag<true>{});
                    else multiply(Flag<false>{});
                }
                if (more) load(q, i);  // its registers are free again
            }
            // Warps that drift apart read far-apart rows, which costs memory bandwidth: keep them together.
            sync_streamers();
            const u32 buf = done % BUFS, round = done / BUFS;
            if (round) barrier_wait(empty + buf, (round - 1) & 1);
            float4* const to = sums + buf * SUMS + warp * 2 * NT * 32 + lane;
#pragma unroll
            for (int j = 0; j < 2 * NT; j++) {
                const float* p = acc[j / NT][j % NT];
                to[j * 32] = make_float4(p[0], p[1], p[2], p[3]);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(full + buf);
        }
    } else {  // ---- Finishers: add up the warps' parts of the dot product, and what comes after it ----
        const int nt = (warp - WK) % NT, buf = (warp - WK) / NT;
        for (int unit = lo + buf, round = 0; unit < hi; unit += BUFS, round++) {
            const int seg = unit / UNITS, r = unit - seg * UNITS;
            const u32 e = segment[2 * seg] >> 16, at = segment[2 * seg + 1];
            const int count = segment[2 * seg] & 0xffff;
            float bias[2][2] = {};  // slab, row g or g + 8
            if (a.bias)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int row = GATED ? 16 * r + (j & 2 ? 0 : ROWSP) : 32 * r + 8 * (j & 2);
                    bias[j >> 1][j & 1] = to_float(a.bias[(u64)e * WROWS + row + g + 8 * (j & 1)]);
                }
            int pair[2];
            float topw[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int n = 8 * nt + 2 * t + j;
                pair[j] = n < count ? list[at + n] : -1;
                if (!GATED && pair[j] >= 0) {
                    const int m = token_of(pair[j], a.magic), k = pair[j] - m * a.top_k;
                    topw[j] = a.topw[(long long)m * a.topw_s0 + (long long)k * a.topw_s1];
                }
            }
            barrier_wait(full + buf, round & 1);
            float s[2][4] = {};
            if (8 * nt < count) {
                const float4* const from = sums + buf * SUMS + nt * 32 + lane;
#pragma unroll 4
                for (int i = 0; i < WK; i++)
#pragma unroll
                    for (int slab = 0; slab < 2; slab++) {
                        const float4 v = from[(2 * i + slab) * NT * 32];
                        s[slab][0] += v.x, s[slab][1] += v.y, s[slab][2] += v.z, s[slab][3] += v.w;
                    }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + buf);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = i & 1, half = i >> 1;  // of two tokens, of rows g and g + 8
                if (pair[j] < 0) continue;
                const float v0 = s[0][i] + bias[0][half], v1 = s[1][i] + bias[1][half];
                const u64 to = (u64)pair[j] * ROWS + (GATED ? 16 : 32) * r + g + 8 * half;
                if (GATED) {
                    // Not fminf and fmaxf, which would make a NaN a number.
                    const float gate = v0 > a.limit ? a.limit : v0, up = v1 > a.limit ? a.limit : v1 < -a.limit ? -a.limit : v1;
                    ((u16*)a.out)[to] = to_bf16(gate / (1.0f + __expf(-a.alpha * gate)) * (up + a.beta));
                } else {
                    ((float*)a.out)[to] = v0 * topw[j];
                    ((float*)a.out)[to + 16] = v1 * topw[j];
                }
            }
        }
    }
}

#if !GATED
struct SumArgs {
    const float* partial;  // [pairs, ROWS]
    const void* ids;
    u16* out;  // bf16 [M, ROWS]
    int top_k, ids64, ids_s0, ids_s1;
};

// A token's experts, added up in their order. Block (b, m): 512 columns of token m.
extern "C" __global__ void __launch_bounds__(128) moe_sum(const __grid_constant__ SumArgs a) {
    const int m = blockIdx.y, column = 4 * (blockIdx.x * 128 + threadIdx.x);
    if (column >= ROWS) return;
    u64 live = 0;
    for (int k = 0; k < a.top_k; k++)
        live |= (u64)(expert_of(a.ids, a.ids64, (long long)m * a.ids_s0 + (long long)k * a.ids_s1) >= 0) << k;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float4 s = make_float4(0, 0, 0, 0);
    for (int k = 0; k < a.top_k; k++) {
        if (!(live >> k & 1)) continue;
        const float4 p = *(const float4*)(a.partial + ((u64)m * a.top_k + k) * ROWS + column);
        s.x += p.x, s.y += p.y, s.z += p.z, s.w += p.w;
    }
    uint2 o;
    o.x = to_bf16(s.x) | (u32)to_bf16(s.y) << 16;
    o.y = to_bf16(s.z) | (u32)to_bf16(s.w) << 16;
    *(uint2*)(a.out + (u64)m * ROWS + column) = o;
}
#endif
