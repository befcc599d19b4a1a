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
    const float* topk_weights;  // [tokens, top_k]; read by fc2 alone
    void* out;                  // fc1: Hidden [pairs, ROWS]; fc2: float [pairs, ROWS]
    Pairs pairs;
    int x_stride, weights_token_stride, weights_choice_stride;
    float alpha, beta, limit;
};

#if !GATED
struct SumArgs {
    const float* partial;  // [pairs, ROWS]
    u16* out;              // bf16 [tokens, ROWS]
    Pairs pairs;
};

// A token's experts, added up in the order of its choices. Block (b, token): 512 columns of it.
extern "C" __global__ void __launch_bounds__(128) moe_sum(const __grid_constant__ SumArgs args) {
    const int token = blockIdx.y, column = 4 * (blockIdx.x * 128 + threadIdx.x);
    if (column >= ROWS) return;
    u64 present = 0;  // a bit for each choice that is not masked
    for (int choice = 0; choice < args.pairs.top_k; choice++)
        present |= (u64)(args.pairs.expert_of_choice(token, choice, NUM_EXPERTS) >= 0) << choice;
    wait_for_previous_kernel();
    float4 sum = make_float4(0, 0, 0, 0);
    for (int choice = 0; choice < args.pairs.top_k; choice++) {
        if (!(present >> choice & 1)) continue;
        const u64 pair = (u64)token * args.pairs.top_k + choice;
        const float4 part = *(const float4*)(args.partial + pair * ROWS + column);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *(uint2*)(args.out + (u64)token * ROWS + column) =
        make_uint2(round_to_bf16x2(sum.x, sum.y), round_to_bf16x2(sum.z, sum.w));
}
#endif
