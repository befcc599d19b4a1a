// Who goes where: a call's pairs sorted by expert.
//
// A pair is a token and one of its experts, numbered token * top_k + choice. It is masked where its
// id is not that of one of this rank's experts: where ids are those of all ranks' experts, a map
// says which they are. A segment is an expert with up to SEGMENT_PAIRS of
// its pairs: what is multiplied by one tile of the expert's weights.
#pragma once
#include "ptx.cuh"
#include "types.cuh"

// The expert of the id at an offset into a call's topk_ids; -1 where it is masked.
// expert_map: [num_ids] this rank's expert of each id; null where ids are its experts, num_ids of
// them. Written without branches, so that the loads of several ids stay in flight together.
DEVICE int expert_of(const void* topk_ids, int is_int64, long long offset, const int* expert_map,
                     int num_ids, int num_experts) {
    const long long id =
        is_int64 ? ((const long long*)topk_ids)[offset] : ((const int*)topk_ids)[offset];
    int expert = (u64)id < (u32)num_ids ? (int)id : -1;
    if (expert_map && expert >= 0) expert = expert_map[expert];
    return (u32)expert < (u32)num_experts ? expert : -1;
}

// pair / top_k, exact for fewer than 2^25 pairs and top_k up to 64.
// reciprocal: 2^31 / top_k, rounded up.
DEVICE int token_of(u32 pair, u32 reciprocal) { return (u64)pair * reciprocal >> 31; }

// A call's pairs: its topk_ids, and what else says which expert a pair has.
struct Pairs {
    const void* topk_ids;   // [tokens, top_k] int32 or int64
    const int* expert_map;  // [num_ids] int32 or null, see expert_of
    int num_pairs, top_k, ids_are_int64, ids_token_stride, ids_choice_stride, num_ids;
    u32 top_k_reciprocal;  // see token_of

    // -1 where it is masked.
    DEVICE int expert_of_choice(int token, int choice, int num_experts) const {
        const long long at =
            (long long)token * ids_token_stride + (long long)choice * ids_choice_stride;
        return expert_of(topk_ids, ids_are_int64, at, expert_map, num_ids, num_experts);
    }
    DEVICE int expert_of_pair(int pair, int num_experts) const {
        const int token = token_of(pair, top_k_reciprocal);
        return expert_of_choice(token, pair - token * top_k, num_experts);
    }
};

// Adds up every thread's value. Returns the sum of those before this thread's, in the order of
// threads, and adds the sum of all to `total`. warp_totals: shared, one for each warp.
template <int WARPS>
DEVICE u32 sum_before(u32 value, u32* warp_totals, u32& total) {
    const int lane = lane_index(), warp = warp_index();
    u32 up_to_lane = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const u32 other = __shfl_up_sync(~0u, up_to_lane, distance);
        if (lane >= distance) up_to_lane += other;
    }
    if (lane == 31) warp_totals[warp] = up_to_lane;
    __syncthreads();
    const u32 of_warp = lane < WARPS ? warp_totals[lane] : 0;
    const u32 before = total + __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
    total += __reduce_add_sync(~0u, of_warp);
    return before + up_to_lane - value;
}

struct Segment {
    u32 expert, count, begin;  // its pairs are sorted[begin .. begin + count - 1]
};

// A call's pairs by expert, and its segments in the order of experts, in shared memory. Every block
// finds them for itself: find() is called by all of its threads.
template <int EXPERTS, int SEGMENT_PAIRS, int THREADS>
struct Routing {
    int num_pairs;
    u32* experts;   // [EXPERTS] number of pairs << 16 | where they begin in `sorted`
    int* pairs;     // [num_pairs] place among its expert's pairs << 16 | expert; -1 where masked
    u32* segments;  // [segments, 2] expert << 16 | number of pairs; where they begin in `sorted`
    u16* sorted;    // [num_pairs] pairs by expert

    // Lays itself out from that address on; takes bytes() of it.
    DEVICE Routing(u8* memory, int num_pairs) : num_pairs(num_pairs) {
        experts = (u32*)memory;
        pairs = (int*)(experts + EXPERTS);
        segments = (u32*)(pairs + num_pairs);
        const int most_segments = min(num_pairs, EXPERTS + num_pairs / SEGMENT_PAIRS);
        sorted = (u16*)(segments + 2 * most_segments);
    }

    DEVICE Segment segment(int i) const {
        const u32 expert_and_count = segments[2 * i];
        return {expert_and_count >> 16, expert_and_count & 0xffff, segments[2 * i + 1]};
    }

    // Returns the number of segments. expert_of_pair(pair): -1 where it is masked.
    template <class ExpertOfPair>
    DEVICE u32 find(u32* warp_totals, ExpertOfPair expert_of_pair) {
        count_pairs(expert_of_pair);
        bool any_split = false;
        const u32 num_segments = cut_segments(warp_totals, any_split);
        __syncthreads();
        sort_pairs();
        // A pair's place among its expert's pairs is a race, and mostly no matter: its sums are the
        // same in any. But all blocks must put the same pairs into each segment of an expert that
        // has several, so there the places follow the order of pairs.
        if (__syncthreads_or(any_split)) {
            order_split_experts();
            __syncthreads();
            sort_pairs();
            __syncthreads();
        }
        return num_segments;
    }

    // How many pairs each expert has, and each pair's place among them.
    template <class ExpertOfPair>
    DEVICE void count_pairs(ExpertOfPair expert_of_pair) {
        for (int e = thread_index(); e < EXPERTS; e += THREADS) experts[e] = 0;
#pragma unroll 2  // four times, ptxas spills more where a segment has 16 pairs
        for (int p = thread_index(); p < num_pairs; p += THREADS) pairs[p] = expert_of_pair(p);
        __syncthreads();
        for (int p = thread_index(); p < num_pairs; p += THREADS)
            if (pairs[p] >= 0) pairs[p] |= atomicAdd(experts + pairs[p], 1) << 16;
        __syncthreads();
    }

    // Where each expert's pairs begin, and its segments. Returns the number of segments.
    // any_split: set where an expert of this thread has more than one.
    DEVICE u32 cut_segments(u32* warp_totals, bool& any_split) {
        u32 total = 0;  // of the experts so far: segments << 16 | pairs
        for (int first = 0; first < EXPERTS; first += THREADS) {
            const int e = first + thread_index();
            const u32 count = e < EXPERTS ? experts[e] : 0;
            const u32 own = (count + SEGMENT_PAIRS - 1) / SEGMENT_PAIRS << 16 | count;
            if (first) __syncthreads();  // warp_totals is used again
            const u32 before = sum_before<THREADS / 32>(own, warp_totals, total);
            if (count) {
                const u32 begin = before & 0xffff;
                experts[e] = count << 16 | begin;
                u32 segment = before >> 16;
                for (u32 done = 0; done < count; done += SEGMENT_PAIRS, segment++) {
                    segments[2 * segment] = (u32)e << 16 | min(count - done, SEGMENT_PAIRS);
                    segments[2 * segment + 1] = begin + done;
                }
            }
            any_split |= count > SEGMENT_PAIRS;
        }
        return total >> 16;
    }

    DEVICE void sort_pairs() {
        for (int p = thread_index(); p < num_pairs; p += THREADS)
            if (pairs[p] >= 0)
                sorted[(experts[pairs[p] & 0xffff] & 0xffff) + (pairs[p] >> 16)] = p;
    }

    DEVICE void order_split_experts() {
        for (int p = thread_index(); p < num_pairs; p += THREADS) {
            if (pairs[p] < 0) continue;
            const u32 e = pairs[p] & 0xffff, begin = experts[e] & 0xffff, count = experts[e] >> 16;
            if (count <= SEGMENT_PAIRS) continue;
            u32 place = 0;
            for (u32 i = 0; i < count; i++) place += sorted[begin + i] < p;
            pairs[p] = place << 16 | e;
        }
    }
};
