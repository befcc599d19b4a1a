// What FlashInfer's kernel is handed of a call, in one pass: ids as int32 with holes as -1 and no expert twice in a
// row, their weights, and x padded with zeros. staging.py says why.
typedef unsigned int u32;
typedef unsigned short u16;

struct Args {
    const u16* x;       // bf16 [tokens, 8 columns], strides x_s0 and x_s1
    const void* ids;    // [tokens, top_k] int32 or int64
    const float* topw;  // [tokens, top_k]
    uint4* x_to;        // bf16 [tokens, 8 padded], or null: x is fine as it is
    int* ids_to;        // [tokens, top_k]
    float* topw_to;     // [tokens, top_k]
    long long x_s0, x_s1, ids_s0, ids_s1, topw_s0, topw_s1;
    int tokens, top_k, experts, columns, padded, whole, ids64;  // whole: 8 values of x can be read at once
};

__device__ __forceinline__ int expert_of(const Args& a, int m, int k) {
    const long long at = m * a.ids_s0 + k * a.ids_s1;
    const long long v = a.ids64 ? ((const long long*)a.ids)[at] : ((const int*)a.ids)[at];
    return v >= 0 && v < a.experts ? (int)v : -1;
}

extern "C" __global__ void __launch_bounds__(256) stage(const __grid_constant__ Args a) {
    const int begin = blockIdx.x * 256 + threadIdx.x, step = gridDim.x * 256;
    for (int at = begin; at < a.tokens * a.top_k; at += step) {
        const int m = at / a.top_k, k = at - m * a.top_k;
        const int e = expert_of(a, m, k);
        float sum = a.topw[m * a.topw_s0 + k * a.topw_s1];
        bool first = e >= 0;  // the first of them has it all
        for (int j = 0; j < k; j++) first &= expert_of(a, m, j) != e;  // no branch: the loads need not wait for each other
        for (int j = k + 1; j < a.top_k; j++)
            if (expert_of(a, m, j) == e) sum += a.topw[m * a.topw_s0 + j * a.topw_s1];
        a.ids_to[at] = first ? e : -1;
        a.topw_to[at] = first ? sum : 0;
    }
    if (!a.x_to) return;
    for (int at = begin; at < a.tokens * a.padded; at += step) {
        const int m = at / a.padded, column = at - m * a.padded;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (column < a.columns) {
            const u16* const from = a.x + m * a.x_s0 + 8 * column * a.x_s1;
            if (a.whole) v = *(const uint4*)from;
            else
                for (int i = 0; i < 4; i++) (&v.x)[i] = from[2 * i * a.x_s1] | (u32)from[(2 * i + 1) * a.x_s1] << 16;
        }
        a.x_to[at] = v;
    }
}
