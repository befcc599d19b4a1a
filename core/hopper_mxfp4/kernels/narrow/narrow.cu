// The `narrow` kernel: a MoE layer for few tokens an expert, on the tiles layout. moe_gemm runs
// twice, for fc1 and for fc2; moe_sum adds up each token's experts. narrow8 has headers of its own
// for what its numbers are, and the rest from here. docs/dev/narrow-kernel.md has the reasons and
// the times.
#include "config.cuh"
#include "finisher.cuh"
#include "arguments.cuh"
#include "ptx.cuh"
#include "routing.cuh"
#include "streamer.cuh"

DEVICE void ask_for_first_unit(Streamer& streamer) {
    streamer.locate_next();
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; i++) streamer.ask_for_tile(i);
}

// Adds a unit's products to `sums`, and asks for the next unit's k-tiles in place of those that are
// done. A warp waits for all that is under way: the hardware has one flag for all loads that live
// across a branch. A ring in shared memory, without that, was slower (narrow-kernel.md).
DEVICE void multiply(Streamer& streamer, bool more, Sums& sums) {
    if (more) streamer.locate_next();
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; i++) {
        streamer.multiply_tile(i, sums);
        if (more) streamer.ask_for_tile(i);
    }
}

DEVICE void stream(const GemmArgs& args, const Shared& shared, Units units) {
    Streamer streamer(args, shared, units);
    if (units.begin == units.end) {
        if (!GATED) wait_for_previous_kernel();  // or the sum could end before fc1
        return;
    }
    // fc1 asks for x before any weights, behind which it would have to wait; fc2 can't yet.
    if (GATED) streamer.ask_for_x(units.begin);
    ask_for_first_unit(streamer);
    if (!GATED) {
        wait_for_previous_kernel();
        streamer.ask_for_x(units.begin);
    }
    for (int unit = units.begin; unit < units.end; unit++) {
        if (unit > units.begin) streamer.ask_for_x(unit);
        streamer.take_x(unit);
        Sums sums = {};
        multiply(streamer, unit + 1 < units.end, sums);
        streamer.publish(sums);
    }
}

DEVICE void finish(const GemmArgs& args, const Shared& shared, Units units) {
    Finisher finisher(args, shared);
    int round = 0;
    for (int unit = units.begin + finisher.stage; unit < units.end; unit += NUM_STAGES) {
        const int index = unit / UNITS_PER_SEGMENT, block = unit - index * UNITS_PER_SEGMENT;
        const Segment segment = shared.routing.segment(index);
        const Finisher::Operands operands = finisher.load(segment, block);
        float sums[SLICES][4] = {};
        finisher.collect(sums, operands.count, round++);
        finisher.write(sums, operands, block);
    }
}

// One grouped GEMM. Streamers multiply, finishers add up and write; a block has a run of units, as
// long as every other's.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, BLOCKS_PER_SM)
    moe_gemm(const __grid_constant__ GemmArgs args) {
    extern __shared__ __align__(128) u8 dynamic[];  // Gemm.shared_bytes in tiling.py
    __shared__ u32 warp_totals[NUM_WARPS];
    __shared__ u64 full[NUM_STAGES], empty[NUM_STAGES];
    float4* const sums = (float4*)(dynamic + NUM_STREAMERS * X_WARP_BYTES);
    float* const x_factors = (float*)(sums + NUM_STAGES * STAGE_SUMS);
    Routing<NUM_EXPERTS, BLOCK_N, NUM_THREADS> routing(
        (u8*)(x_factors + NUM_STREAMERS * X_FACTORS), args.pairs.num_pairs);
    const Shared shared = {dynamic, x_factors, sums, full, empty, routing};

    if (thread_index() == 0)
        for (int i = 0; i < NUM_STAGES; i++) {
            mbarrier_init(full + i, NUM_STREAMERS);
            mbarrier_init(empty + i, N_TILES);
        }
    const u32 num_segments = routing.find(
        warp_totals, [&](u32 pair) { return args.pairs.expert_of_pair(pair, NUM_EXPERTS); });
    const long long num_units = (long long)num_segments * UNITS_PER_SEGMENT;
    const Units units = {(int)(num_units * blockIdx.x / gridDim.x),
                         (int)(num_units * (blockIdx.x + 1) / gridDim.x)};
    launch_next_kernel();
    if (warp_index() < NUM_STREAMERS)
        stream(args, shared, units);
    else
        finish(args, shared, units);
}
