// One function for each PTX instruction that our kernels use; no other file has inline PTX.
// Before them, who a thread is.
#pragma once
#include "types.cuh"

// ---- Threads of a block -------------------------------------------------------------------------

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane_index() { return thread_index() & 31; }
DEVICE int warp_index() { return thread_index() >> 5; }

// ---- Loads from global memory -------------------------------------------------------------------

// 16 bytes that nobody reads again soon: they take no place in L1, and L2 fetches the 256 bytes
// around them, whose other parts neighbouring warps ask for at the same time.
DEVICE uint4 load_streamed(const u8* from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

DEVICE u32 load_byte(const u8* from) {
    u32 value;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

// ---- Arithmetic ---------------------------------------------------------------------------------

DEVICE u32 mul_bf16x2(u32 a, u32 b) {
    u32 product;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

DEVICE u16 round_to_bf16(float value) {
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// sums [16 x 8] += a [16 x 16] b [16 x 8], each spread over the warp's lanes as PTX prescribes.
DEVICE void mma_m16n8k16(float* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Shared memory and barriers -----------------------------------------------------------------

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE void cp_async_16(void* to_shared, const void* from_global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
                 "l"(from_global)
                 : "memory");
}

DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE void mbarrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

DEVICE void mbarrier_arrive(u64* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                     shared_address(barrier))
                 : "memory");
}

DEVICE void mbarrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Waits for that many of the block's threads; ID 0 is __syncthreads'.
template <int ID, int THREADS>
DEVICE void sync_threads_of() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// ---- Programmatic dependent launch --------------------------------------------------------------

// Lets the next kernel's blocks start as soon as there is room for them.
DEVICE void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits until the kernel before this one has ended and what it wrote can be read.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
