// Both grouped GEMMs of the `wide` kernel: a MoE layer for many tokens an expert. wide8 has headers
// of its own for what its numbers are, and the rest from here. docs/dev/wide-kernel.md has the
// reasons and the times.
//
// Operands are swapped: weights are wgmma's A, decoded into registers by the warps that multiply
// them; tokens are B, in shared memory. A block of threads takes a panel of weight rows and up to
// BLOCK_N tokens of one expert at a time. fc2's tiles follow fc1's in the same launch: a tile waits
// until all panels of fc1 have written its tokens. fc2's output takes the place of fc1's tokens,
// which nobody reads again.
#include "consumer.cuh"
#include "producer.cuh"
#include "ptx.cuh"
#include "shared.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    moe_gemms(const __grid_constant__ GemmArgs args) {
    extern __shared__ __align__(1024) u8 memory[];
    const Shared shared(memory);
    Consumer::prepare(shared);
    prepare_barriers(shared);
    const int warpgroup = thread_index() >> 7;
    const bool copies = thread_index() == 128 * NUM_CONSUMERS;
    Producer producer(args, shared);
    wait_for_previous_kernel();
    launch_next_kernel();  // not before the wait: moe_sum reads at once what moe_sort wrote
    const int first_tile = copies ? producer.take() : 0;  // comes while the slots do
    load_slots(shared, args);
    __syncthreads();
    // A whole warpgroup for the one thread that copies: registers come from a file of each quarter
    // of an SM, so a single warp more would leave two thirds of one to the others.
    if (warpgroup == NUM_CONSUMERS) {
        give_registers<PRODUCER_REGISTERS>();
        if (copies) producer.run(first_tile);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        Consumer(args, shared, warpgroup).run(warpgroup);
    }
}
