// What both GEMMs are handed, and the sum.
#pragma once
#include "convert.cuh"
#include "ptx.cuh"
#include "routing.cuh"
#include "types.cuh"

struct GemmArgs {
    const u8* weights;          // in the kernel's layout
    const u8* scales;           // likewise
    const u16* bias;            // bf16 [NUM_EXPERTS, weight rows], or null; w13's is [up; gate]
    const void* x;              // fc1: bf16 [tokens, K]; fc2: Hidden [pairs, K], which fc1 wrote
    const void* topk_ids;       // [tokens, top_k] int32 or int64
    const float* topk_weights;  // [tokens, top_k]; read by fc2 alone
    void* out;                  // fc1: Hidden [pairs, ROWS]; fc2: float [pairs, ROWS]
    int num_pairs, top_k, x_stride, ids_are_int64;
    int ids_token_stride, ids_choice_stride, weights_token_stride, weights_choice_stride;
    u32 top_k_reciprocal;  // see token_of
    float alpha, beta, limit;
};

#if !GATED
struct SumArgs {
    const float* partial;  // [pairs, ROWS]
    const void* topk_ids;
    u16* out;  // bf16 [tokens, ROWS]
    int top_k, ids_are_int64, ids_token_stride, ids_choice_stride;
};

// A token's experts, added up in the order of its choices. Block (b, token): 512 columns of it.
extern "C" __global__ void __launch_bounds__(128) moe_sum(const __grid_constant__ SumArgs args) {
    const int token = blockIdx.y, column = 4 * (blockIdx.x * 128 + threadIdx.x);
    if (column >= ROWS) return;
    u64 present = 0;  // a bit for each choice that is not masked
    for (int choice = 0; choice < args.top_k; choice++) {
        const long long at = (long long)token * args.ids_token_stride +
                             (long long)choice * args.ids_choice_stride;
        const int expert = expert_of(args.topk_ids, args.ids_are_int64, at, NUM_EXPERTS);
        present |= (u64)(expert >= 0) << choice;
    }
    wait_for_previous_kernel();
    float4 sum = make_float4(0, 0, 0, 0);
    for (int choice = 0; choice < args.top_k; choice++) {
        if (!(present >> choice & 1)) continue;
        const u64 pair = (u64)token * args.top_k + choice;
        const float4 part = *(const float4*)(args.partial + pair * ROWS + column);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *(uint2*)(args.out + (u64)token * ROWS + column) =
        make_uint2(round_to_bf16x2(sum.x, sum.y), round_to_bf16x2(sum.z, sum.w));
}
#endif
