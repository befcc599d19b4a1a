// The `smallbatch` kernel: a MoE layer for few tokens an expert, on the very bytes that
// FlashInfer's SM90 W4A16 kernel reads. moe_gemm runs twice, for fc1 and for fc2; moe_sum adds up
// each token's experts. docs/dev/smallbatch.md has the reasons and the times.
#include "config.cuh"
#include "finisher.cuh"
#include "gemms_and_sum.cuh"
#include "ptx.cuh"
#include "routing.cuh"
#include "streamer.cuh"

// The weights are zero beyond K, but what lies in shared memory might be NaN. Never written again.
DEVICE void clear_x_beyond_k(u8* x) {
    if (K_PADDED == K) return;
    uint4* const last_chunk = (uint4*)(x + (NUM_CHUNKS - 1) * X_CHUNK_BYTES);
    for (int i = thread_index(); i < X_CHUNK_BYTES / 16; i += NUM_THREADS)
        last_chunk[i] = make_uint4(0, 0, 0, 0);
}

// One grouped GEMM. Streamers multiply, finishers add up and write; a block has a run of units, as
// long as every other's.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, BLOCKS_PER_SM)
    moe_gemm(const __grid_constant__ GemmArgs args) {
    extern __shared__ __align__(128) u8 dynamic[];  // Gemm.shared_bytes in tiling.py
    __shared__ u32 warp_totals[NUM_WARPS];
    __shared__ u64 full[NUM_STAGES], empty[NUM_STAGES];
    float4* const sums = (float4*)(dynamic + NUM_CHUNKS * X_CHUNK_BYTES);
    Routing<NUM_EXPERTS, BLOCK_N, NUM_THREADS> routing((u8*)(sums + NUM_STAGES * STAGE_SUMS),
                                                       args.num_pairs);

    if (thread_index() == 0)
        for (int i = 0; i < NUM_STAGES; i++) {
            mbarrier_init(full + i, NUM_STREAMERS);
            mbarrier_init(empty + i, N_TILES);
        }
    clear_x_beyond_k(dynamic);
    const u32 num_segments = routing.find(warp_totals, [&](u32 pair) {
        const int token = token_of(pair, args.top_k_reciprocal), choice = pair - token * args.top_k;
        return expert_of(args.topk_ids, args.ids_are_int64,
                         (long long)token * args.ids_token_stride +
                             (long long)choice * args.ids_choice_stride,
                         NUM_EXPERTS);
    });
    const long long num_units = (long long)num_segments * UNITS_PER_SEGMENT;
    const Units units = {(int)(num_units * blockIdx.x / gridDim.x),
                         (int)(num_units * (blockIdx.x + 1) / gridDim.x)};
    const Shared shared = {dynamic, sums, full, empty, routing};
    launch_next_kernel();

    if (warp_index() < NUM_STREAMERS) {
        Streamer streamer(args, shared, units);
        streamer.load_first_unit();
        if (!GATED) wait_for_previous_kernel();  // for fc1's rows
        for (int unit = units.begin; unit < units.end; unit++) {
            streamer.gather_x(unit);
            Sums sums = {};
            streamer.multiply(sums, unit + 1 < units.end);
            streamer.publish(sums);
        }
    } else {
        Finisher finisher(args, shared);
        int round = 0;
        for (int unit = units.begin + finisher.stage; unit < units.end; unit += NUM_STAGES) {
            const int segment = unit / UNITS_PER_SEGMENT;
            const int row_block = unit - segment * UNITS_PER_SEGMENT;
            const Finisher::Operands operands = finisher.load(routing.segment(segment), row_block);
            float sums[2][4] = {};
            finisher.collect(sums, operands.count, round++);
            finisher.write(sums, operands, row_block);
        }
    }
}
