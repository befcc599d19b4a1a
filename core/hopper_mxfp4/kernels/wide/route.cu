// Before and after the GEMMs of the `wide` kernel: pairs sorted by expert, always in the same
// order; tokens copied to where fc1 reads them; a token's rows added up in the order of its
// choices. Compiled for the layer's sizes, see config.cuh.
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
    int* counts;      // [blocks, NUM_EXPERTS] pairs of an expert among a block's
    int* rows;        // [num_pairs] a pair's row; -1: masked
    int* experts;     // [num_pairs] that it has; -1: masked
    Place* places;    // [num_pairs]
    Slot* slots;      // [NUM_EXPERTS + 1]
    int* arrivals;    // [1 + token_tiles] see wide.cu; zeroed here
    int token_tiles;  // at most
};

// -1 where it is masked, or there is no such pair.
DEVICE int expert_of_pair(const Pairs& pairs, int pair) {
    return pair < pairs.num_pairs ? pairs.expert_of_pair(pair, NUM_EXPERTS) : -1;
}

extern "C" __global__ void __launch_bounds__(PAIRS_PER_BLOCK)
    moe_count(const __grid_constant__ SortArgs args) {
    __shared__ int counts[NUM_EXPERTS];
    launch_next_kernel();
    for (int e = thread_index(); e < NUM_EXPERTS; e += PAIRS_PER_BLOCK) counts[e] = 0;
    __syncthreads();
    const int e = expert_of_pair(args.pairs, blockIdx.x * PAIRS_PER_BLOCK + thread_index());
    if (e >= 0) atomicAdd(counts + e, 1);
    __syncthreads();
    for (int i = thread_index(); i < NUM_EXPERTS; i += PAIRS_PER_BLOCK)
        args.counts[blockIdx.x * NUM_EXPERTS + i] = counts[i];
}

// What the threads before this one have, added up.
DEVICE int sum_of_threads_before(int own) {
    __shared__ u32 warp_totals[SORTING_WARPS];
    u32 total = 0;
    __syncthreads();  // warp_totals is used again
    return sum_before<SORTING_WARPS>(own, warp_totals, total);
}

// Lanes of the warp that have this one's number: how many come before it, and, where none does, how
// many there are.
struct Alike {
    int before, all_of_first;
};
DEVICE Alike alike_in_warp(int number) {
    const u32 alike = __match_any_sync(~0u, number);
    const int before = __popc(alike & ((1u << lane_index()) - 1));
    return {before, before ? 0 : __popc(alike)};
}

// Thread e has expert e, where there is one.
struct OfExpert {
    int num_pairs, token_tiles, width, first_row;
};
DEVICE OfExpert cut_expert(int num_pairs) {
    const int token_tiles = num_token_tiles(num_pairs);
    const int width = num_pairs ? width_of(num_pairs, token_tiles) : 0;
    return {num_pairs, token_tiles, width, sum_of_threads_before(token_tiles * width)};
}

// Experts by the width of their tiles, the widest first: a counting sort by width and warp.
DEVICE void write_slots(const SortArgs& args, const OfExpert& expert) {
    constexpr int WIDTHS = BLOCK_N / STEP_N + 1, EXPERT_WARPS = (NUM_EXPERTS + 31) / 32;
    constexpr int BINS = WIDTHS * EXPERT_WARPS;
    static_assert(MIN_N % STEP_N == 0 && STEP_FROM % STEP_N == 0 && BINS <= PAIRS_PER_BLOCK);
    __shared__ int bins[BINS], in_order[NUM_EXPERTS];
    const int thread = thread_index();
    const bool exists = thread < NUM_EXPERTS, is_bin = thread < BINS;
    if (is_bin) bins[thread] = 0;
    __syncthreads();
    const int bin = (WIDTHS - 1 - expert.width / STEP_N) * EXPERT_WARPS + warp_index();
    const Alike alike = alike_in_warp(exists ? bin : -1);
    if (exists && alike.all_of_first) bins[bin] = alike.all_of_first;
    __syncthreads();
    const int experts_before = sum_of_threads_before(is_bin ? bins[thread] : 0);
    if (is_bin) bins[thread] = experts_before;
    __syncthreads();
    const int slot = exists ? bins[bin] + alike.before : 0;
    if (exists) in_order[slot] = expert.token_tiles;
    __syncthreads();
    const int own = exists ? in_order[thread] : 0, tiles_before = sum_of_threads_before(own);
    if (exists) in_order[thread] = tiles_before;
    if (thread == NUM_EXPERTS - 1) args.slots[NUM_EXPERTS] = {tiles_before + own, 0, 0, 0};
    __syncthreads();
    if (exists) args.slots[slot] = {in_order[slot], thread, expert.first_row, expert.num_pairs};
}

// Numbers that a thread loads before it adds them up, so that it waits for them together.
constexpr int AT_ONCE = 8;

// Pairs of the thread's expert in moe_count's blocks.
struct OfBlocks {
    int before, all;  // before this block, and in all of them
};
DEVICE OfBlocks pairs_of_blocks(const SortArgs& args) {
    OfBlocks pairs = {0, 0};
    for (int first = 0; first < gridDim.x; first += AT_ONCE) {
        int of_block[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            of_block[i] = first + i < gridDim.x
                              ? args.counts[(first + i) * NUM_EXPERTS + thread_index()]
                              : 0;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            pairs.before += first + i < blockIdx.x ? of_block[i] : 0;
            pairs.all += of_block[i];
        }
    }
    return pairs;
}

// In place of how many pairs of the thread's expert each warp has: how many come before them.
// Returns how many come before the next block's.
DEVICE int add_up_warps(u16* pairs_of_warps, int before) {
    for (int first = 0; first < SORTING_WARPS; first += AT_ONCE) {
        u16* const from = pairs_of_warps + first * NUM_EXPERTS + thread_index();
        int of_warp[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) of_warp[i] = from[i * NUM_EXPERTS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            from[i * NUM_EXPERTS] = before;
            before += of_warp[i];
        }
    }
    return before;
}

extern "C" __global__ void __launch_bounds__(PAIRS_PER_BLOCK)
    moe_sort(const __grid_constant__ SortArgs args) {
    extern __shared__ u16 pairs_of_warps[];  // [SORTING_WARPS, NUM_EXPERTS]
    __shared__ int first_row[NUM_EXPERTS], width[NUM_EXPERTS];
    const int thread = thread_index();
    const bool has_expert = thread < NUM_EXPERTS;
    launch_next_kernel();
    for (int i = thread; i < SORTING_WARPS * NUM_EXPERTS / 2; i += PAIRS_PER_BLOCK)
        ((u32*)pairs_of_warps)[i] = 0;
    wait_for_previous_kernel();

    // A pair's place among its expert's: behind those of the blocks before, of the block's warps
    // before, and of its warp's lanes before.
    const int pair = blockIdx.x * PAIRS_PER_BLOCK + thread, e = expert_of_pair(args.pairs, pair);
    const Alike alike = alike_in_warp(e);
    u16* const of_warp = pairs_of_warps + warp_index() * NUM_EXPERTS + e;
    __syncthreads();
    if (e >= 0 && alike.all_of_first) *of_warp = alike.all_of_first;
    __syncthreads();
    int num_pairs = 0;
    if (has_expert && gridDim.x == 1) {  // whose pairs nobody needs to have counted
        num_pairs = add_up_warps(pairs_of_warps, 0);
    } else if (has_expert) {
        const OfBlocks of_blocks = pairs_of_blocks(args);
        add_up_warps(pairs_of_warps, of_blocks.before);
        num_pairs = of_blocks.all;
    }
    const OfExpert expert = cut_expert(num_pairs);
    if (has_expert) first_row[thread] = expert.first_row, width[thread] = expert.width;
    __syncthreads();
    if (pair < args.pairs.num_pairs) {
        args.experts[pair] = e;
        if (e >= 0) {
            const int place = *of_warp + alike.before;
            args.rows[pair] = first_row[e] + place;
            args.places[pair] = {(u16)width[e], (u16)(place % width[e])};
        } else {
            args.rows[pair] = -1;
        }
    }

    if (blockIdx.x == 0) {
        write_slots(args, expert);
        for (int i = thread; i <= args.token_tiles; i += PAIRS_PER_BLOCK) args.arrivals[i] = 0;
    }
}

// How many of a token's choices are worked on at a time: their loads are in flight together.
constexpr int CHOICES = 4;

struct SumArgs {
    const u16* outputs;         // bf16 [rows, HIDDEN_PADDED], fc2's
    const int* rows;            // moe_sort's
    const int* experts;         // moe_sort's
    const u16* bias;            // bf16 [NUM_EXPERTS, HIDDEN_PADDED], or null
    const float* topk_weights;  // [tokens, top_k]
    u16* out;                   // bf16 [tokens, HIDDEN]
    int num_tokens, top_k, weights_token_stride, weights_choice_stride;
};

DEVICE void add_chunk(float (&sums)[CHUNK], uint4 chunk, float weight) {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
        const u32 pair = (&chunk.x)[i];
        sums[2 * i] += weight * bf16_to_float(pair & 0xffff);
        sums[2 * i + 1] += weight * bf16_to_float(pair >> 16);
    }
}

// What a thread adds up: a chunk of columns of a token, over the token's choices.
struct Sum {
    const SumArgs& args;
    const u32 token, column;
    float sums[CHUNK] = {};

    DEVICE Sum(const SumArgs& args, u32 token, u32 column)
        : args(args), token(token), column(column) {}

    DEVICE float weight_of(int choice) const {
        return args.topk_weights[(long long)token * args.weights_token_stride +
                                 (long long)choice * args.weights_choice_stride];
    }

    // before_outputs(): between what is known before fc2 has written and what it writes. fc2's
    // biases come in here, in float32: they may be much larger than the products, which are
    // rounded.
    template <class BeforeOutputs>
    DEVICE void add(int first, BeforeOutputs before_outputs) {
        int rows[CHOICES], experts[CHOICES];
        float weights[CHOICES];
        uint4 outputs[CHOICES], biases[CHOICES];
        const u32 pair = token * args.top_k + first;
#pragma unroll
        for (int i = 0; i < CHOICES; i++) {
            const bool exists = first + i < args.top_k;
            rows[i] = exists ? load_from_l2(args.rows + pair + i) : -1;
            experts[i] = exists ? load_from_l2(args.experts + pair + i) : 0;
            weights[i] = exists ? weight_of(first + i) : 0.0f;
        }
        if (args.bias)
#pragma unroll
            for (int i = 0; i < CHOICES; i++)
                if (rows[i] >= 0)
                    biases[i] =
                        *(const uint4*)(args.bias + (u64)experts[i] * HIDDEN_PADDED + column);
        before_outputs();
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            if (rows[i] >= 0)
                outputs[i] = *(const uint4*)(args.outputs + (u64)rows[i] * HIDDEN_PADDED + column);
#pragma unroll
        for (int i = 0; i < CHOICES; i++)
            if (rows[i] >= 0) {
                add_chunk(sums, outputs[i], weights[i]);
                if (args.bias) add_chunk(sums, biases[i], weights[i]);
            }
    }

    DEVICE void store() const {
        *(uint4*)(args.out + (u64)token * HIDDEN + column) =
            make_uint4(round_to_bf16x2(sums[0], sums[1]), round_to_bf16x2(sums[2], sums[3]),
                       round_to_bf16x2(sums[4], sums[5]), round_to_bf16x2(sums[6], sums[7]));
    }
};

constexpr int SUM_THREADS = 256;

// Its blocks start where those of the GEMMs have ended. What they need beside fc2's output was
// there before fc2 began, so they read it while fc2 goes on elsewhere.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    moe_sum(const __grid_constant__ SumArgs args) {
    constexpr u32 CHUNKS = HIDDEN / CHUNK;
    const u32 index = blockIdx.x * SUM_THREADS + thread_index(), token = index / CHUNKS;
    if (token >= args.num_tokens) return;
    Sum sum(args, token, (index - token * CHUNKS) * CHUNK);
    sum.add(0, wait_for_previous_kernel);
    for (int first = CHOICES; first < args.top_k; first += CHOICES) sum.add(first, [] {});
    sum.store();
}
