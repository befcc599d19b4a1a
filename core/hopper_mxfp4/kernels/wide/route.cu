// Before and after the GEMMs of the `wide` kernel: pairs sorted by expert, always in the same
// order; tokens copied to where fc1 reads them; a token's rows added up in the order of its
// experts. Compiled for the layer's sizes, see config.cuh.
#include "convert.cuh"
#include "gather.cuh"
#include "pairs.cuh"
#include "ptx.cuh"
#include "routing.cuh"
#include "schedule.cuh"

constexpr int PAIRS_PER_BLOCK = 1024;  // one a thread
constexpr int SORTING_WARPS = PAIRS_PER_BLOCK / 32;
static_assert(NUM_EXPERTS <= PAIRS_PER_BLOCK);

struct SortArgs {
    Pairs pairs;
    int* counts;          // [blocks, NUM_EXPERTS] pairs of an expert among a block's
    int* rows;            // [num_pairs] a pair's row; -1: masked
    ExpertRows* experts;  // [NUM_EXPERTS]
    Slot* slots;          // [NUM_EXPERTS + 1]
    int* arrivals;        // [1 + token_tiles] see wide.cu; zeroed here
    int token_tiles;      // at most
};

// -1 where it is masked, or there is no such pair.
DEVICE int expert_of_pair(const Pairs& pairs, int pair) {
    return pair < pairs.num_pairs ? pairs.expert_of_pair(pair, NUM_EXPERTS) : -1;
}

extern "C" __global__ void __launch_bounds__(PAIRS_PER_BLOCK)
    moe_count(const __grid_constant__ SortArgs args) {
    __shared__ int counts[NUM_EXPERTS];
    for (int e = thread_index(); e < NUM_EXPERTS; e += PAIRS_PER_BLOCK) counts[e] = 0;
    __syncthreads();
    const int e = expert_of_pair(args.pairs, blockIdx.x * PAIRS_PER_BLOCK + thread_index());
    if (e >= 0) atomicAdd(counts + e, 1);
    __syncthreads();
    for (int i = thread_index(); i < NUM_EXPERTS; i += PAIRS_PER_BLOCK)
        args.counts[blockIdx.x * NUM_EXPERTS + i] = counts[i];
    launch_next_kernel();
}

// What the threads before this one have, added up.
DEVICE int sum_of_threads_before(int own) {
    __shared__ u32 warp_totals[SORTING_WARPS];
    u32 total = 0;
    __syncthreads();  // warp_totals is used again
    return sum_before<SORTING_WARPS>(own, warp_totals, total);
}

// Experts by the width of their tiles, the widest first. Thread e has expert e, where there is one.
DEVICE void write_slots(const SortArgs& args, int first_row, int num_pairs) {
    __shared__ int widths[NUM_EXPERTS], in_order[NUM_EXPERTS];
    const int e = thread_index();
    const bool exists = e < NUM_EXPERTS;
    const int token_tiles = num_token_tiles(num_pairs);
    const int width = num_pairs ? width_of(num_pairs, token_tiles) : 0;
    if (exists) widths[e] = width;
    __syncthreads();
    int rank = 0;
    for (int i = 0; i < NUM_EXPERTS; i++)
        rank += widths[i] > width || (widths[i] == width && i < e);
    if (exists) in_order[rank] = token_tiles;
    __syncthreads();
    const int own = exists ? in_order[e] : 0, before = sum_of_threads_before(own);
    __syncthreads();
    if (exists) in_order[e] = before;
    if (e == NUM_EXPERTS - 1) args.slots[NUM_EXPERTS] = {before + own, 0, 0, 0};
    __syncthreads();
    if (exists) {
        args.slots[rank] = {in_order[rank], e, first_row, num_pairs};
        args.experts[e] = {first_row, width};
    }
}

extern "C" __global__ void __launch_bounds__(PAIRS_PER_BLOCK)
    moe_sort(const __grid_constant__ SortArgs args) {
    extern __shared__ u16 pairs_before[];  // [SORTING_WARPS, NUM_EXPERTS] of a block's, see below
    __shared__ int first_of_block[NUM_EXPERTS];
    const int thread = thread_index(), lane = lane_index(), warp = warp_index();
    for (int i = thread; i < SORTING_WARPS * NUM_EXPERTS; i += PAIRS_PER_BLOCK) pairs_before[i] = 0;
    wait_for_previous_kernel();

    // A pair's place among its expert's in the block: those of the warp before it, and those of the
    // warps before.
    const int pair = blockIdx.x * PAIRS_PER_BLOCK + thread, e = expert_of_pair(args.pairs, pair);
    const u32 same_expert = __match_any_sync(~0u, e);
    const int in_warp = __popc(same_expert & ((1u << lane) - 1));
    __syncthreads();
    if (e >= 0 && in_warp == 0) pairs_before[warp * NUM_EXPERTS + e] = __popc(same_expert);
    __syncthreads();

    // An expert a thread: its pairs, and those of the blocks before this one. A single block needs
    // no moe_count.
    int before = 0, count = 0;
    if (thread < NUM_EXPERTS) {
        for (int w = 0; w < SORTING_WARPS; w++) {
            const int of_warp = pairs_before[w * NUM_EXPERTS + thread];
            pairs_before[w * NUM_EXPERTS + thread] = count;
            count += of_warp;
        }
        if (gridDim.x > 1) {
            count = 0;
            for (int block = 0; block < gridDim.x; block++) {
                const int of_block = args.counts[block * NUM_EXPERTS + thread];
                before += block < blockIdx.x ? of_block : 0;
                count += of_block;
            }
        }
    }
    const int token_tiles = num_token_tiles(count);
    const int first_row = sum_of_threads_before(token_tiles * width_of(count, token_tiles));
    if (thread < NUM_EXPERTS) first_of_block[thread] = first_row + before;
    __syncthreads();
    if (pair < args.pairs.num_pairs)
        args.rows[pair] =
            e < 0 ? -1 : first_of_block[e] + pairs_before[warp * NUM_EXPERTS + e] + in_warp;

    if (blockIdx.x == 0) {
        write_slots(args, first_row, count);
        for (int i = thread; i <= args.token_tiles; i += PAIRS_PER_BLOCK) args.arrivals[i] = 0;
    }
    launch_next_kernel();
}

// How many of a token's choices are worked on at a time: their loads are in flight together.
constexpr int CHOICES = 8;

struct SumArgs {
    Pairs pairs;
    const u16* outputs;         // bf16 [rows, HIDDEN_PADDED], fc2's
    const int* rows;            // moe_sort's
    const u16* bias;            // bf16 [NUM_EXPERTS, HIDDEN_PADDED], or null
    const float* topk_weights;  // [tokens, top_k]
    u16* out;                   // bf16 [tokens, HIDDEN]
    int num_tokens, weights_token_stride, weights_choice_stride;
};

DEVICE void add_chunk(float (&sums)[CHUNK], uint4 chunk, float weight) {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
        const u32 pair = (&chunk.x)[i];
        sums[2 * i] += weight * bf16_to_float(pair & 0xffff);
        sums[2 * i + 1] += weight * bf16_to_float(pair >> 16);
    }
}

constexpr int SUM_THREADS = 256;

// A token's experts, added up in the order of its choices; a thread has a chunk of columns. fc2's
// biases come in here, in float32: they may be much larger than the products, which are rounded.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    moe_sum(const __grid_constant__ SumArgs args) {
    constexpr u32 CHUNKS = HIDDEN / CHUNK;
    const u32 index = blockIdx.x * SUM_THREADS + thread_index(), token = index / CHUNKS;
    const u32 column = (index - token * CHUNKS) * CHUNK;
    wait_for_previous_kernel();
    if (token >= args.num_tokens) return;
    const int top_k = args.pairs.top_k;
    float sums[CHUNK] = {};
    for (int first = 0; first < top_k; first += CHOICES) {
        int rows[CHOICES];
        uint4 chunks[CHOICES], biases[CHOICES];
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            rows[i] = first + i < top_k ? args.rows[token * top_k + first + i] : -1;
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            if (rows[i] >= 0) {
                chunks[i] = *(const uint4*)(args.outputs + (u64)rows[i] * HIDDEN_PADDED + column);
                if (args.bias) {
                    const u64 expert =
                        args.pairs.expert_of_choice(token, first + i, NUM_EXPERTS);
                    biases[i] = *(const uint4*)(args.bias + expert * HIDDEN_PADDED + column);
                }
            }
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            if (rows[i] >= 0) {
                const float weight =
                    args.topk_weights[(long long)token * args.weights_token_stride +
                                      (long long)(first + i) * args.weights_choice_stride];
                add_chunk(sums, chunks[i], weight);
                if (args.bias) add_chunk(sums, biases[i], weight);
            }
    }
    *(uint4*)(args.out + (u64)token * HIDDEN + column) =
        make_uint4(round_to_bf16x2(sums[0], sums[1]), round_to_bf16x2(sums[2], sums[3]),
                   round_to_bf16x2(sums[4], sums[5]), round_to_bf16x2(sums[6], sums[7]));
}
