// What FlashInfer's kernel is handed of a call, in one pass: ids as int32 with masked ids as -1 and
// no expert twice in a row, their weights, and x padded with zeros. staging.py says why.
#include "ptx.cuh"
#include "routing.cuh"
#include "types.cuh"

struct Args {
    const u16* x;       // bf16 [tokens, 8 columns], strides x_s0 and x_s1
    const void* ids;    // [tokens, top_k] int32 or int64
    const float* topw;  // [tokens, top_k]
    uint4* x_to;        // bf16 [tokens, 8 padded], or null: x is fine as it is
    int* ids_to;        // [tokens, top_k]
    float* topw_to;     // [tokens, top_k]
    long long x_s0, x_s1, ids_s0, ids_s1, topw_s0, topw_s1;
    int tokens, top_k, experts, columns, padded;
    int aligned;  // whether 8 values of x can be read at once
    int ids_are_int64;
};

constexpr int NUM_THREADS = 256;

DEVICE int expert_of_choice(const Args& args, int token, int choice) {
    const long long at = token * args.ids_s0 + choice * args.ids_s1;
    return expert_of(args.ids, args.ids_are_int64, at, nullptr, args.experts,
                     args.experts);
}

// The first of a row's equal ids gets the sum of their weights; the others become masked.
DEVICE void merge_repeats(const Args& args, int begin, int step) {
    for (int pair = begin; pair < args.tokens * args.top_k; pair += step) {
        const int token = pair / args.top_k, choice = pair - token * args.top_k;
        const int expert = expert_of_choice(args, token, choice);
        float weight = args.topw[token * args.topw_s0 + choice * args.topw_s1];
        bool first = expert >= 0;
        for (int other = 0; other < choice; other++)  // no early exit: the loads need not wait
            first &= expert_of_choice(args, token, other) != expert;
        for (int other = choice + 1; other < args.top_k; other++)
            if (expert_of_choice(args, token, other) == expert)
                weight += args.topw[token * args.topw_s0 + other * args.topw_s1];
        args.ids_to[pair] = first ? expert : -1;
        args.topw_to[pair] = first ? weight : 0;
    }
}

DEVICE void pad_x(const Args& args, int begin, int step) {
    for (int at = begin; at < args.tokens * args.padded; at += step) {
        const int token = at / args.padded, column = at - token * args.padded;
        uint4 values = make_uint4(0, 0, 0, 0);
        if (column < args.columns) {
            const u16* const from = args.x + token * args.x_s0 + 8 * column * args.x_s1;
            if (args.aligned)
                values = *(const uint4*)from;
            else
                for (int i = 0; i < 4; i++)
                    (&values.x)[i] =
                        from[2 * i * args.x_s1] | (u32)from[(2 * i + 1) * args.x_s1] << 16;
        }
        args.x_to[at] = values;
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    stage(const __grid_constant__ Args args) {
    const int begin = blockIdx.x * NUM_THREADS + thread_index(), step = gridDim.x * NUM_THREADS;
    merge_repeats(args, begin, step);
    if (args.x_to) pad_x(args, begin, step);
}
