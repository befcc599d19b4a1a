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

DEVICE u32 load_streamed_word(const u8* from) {
    u32 value;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

DEVICE uint2 load_streamed_8(const u8* from) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(from));
    return value;
}

// What an earlier kernel wrote, however old L1's copy of it is.
DEVICE int load_from_l2(const int* from) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

// ---- Global memory between blocks ---------------------------------------------------------------

DEVICE int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

DEVICE void add_release(int* to, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

DEVICE void sleep_for(u32 nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }

// ---- Arithmetic ---------------------------------------------------------------------------------

DEVICE u32 mul_bf16x2(u32 a, u32 b) {
    u32 product;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// The larger of each half.
DEVICE u32 max_u16x2(u32 a, u32 b) { return __vmaxu2(a, b); }

DEVICE u16 round_to_bf16(float value) {
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// Low half first.
DEVICE u32 round_to_bf16x2(float low, float high) {
    u32 rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(high), "f"(low));
    return rounded;
}

// e4m3, low byte first; beyond 448 it is 448, and NaN stays NaN.
DEVICE u32 round_to_e4m3x2(float low, float high) {
    u16 rounded;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(rounded) : "f"(high), "f"(low));
    return rounded;
}

// Two numbers of e4m3 as fp16, which has them all.
DEVICE u32 e4m3x2_to_fp16x2(u32 pair) {
    u32 numbers;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(numbers) : "h"((u16)pair));
    return numbers;
}

// Four of eight bytes, low's first, each chosen by the lower three bits of a nibble whose fourth is
// zero.
DEVICE u32 permute_bytes(u32 low, u32 high, u32 which) {
    u32 chosen;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(low), "r"(high), "r"(which));
    return chosen;
}

DEVICE u32 byte_of(u32 word, int which) { return permute_bytes(word, 0, 0x4440 + which); }

// The same on the pipe that multiplies, for loops whose pipe of logic and permutes is the busier.
DEVICE u32 multiplied_byte_of(u32 word, int which) { return __dp4a(word, 1u << 8 * which, 0u); }

DEVICE u32 rotate_right(u32 word, int bits) { return __funnelshift_r(word, word, bits); }

// NaN where one of them is.
DEVICE float min_nan(float a, float b) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
}

DEVICE float max_nan(float a, float b) {
    float greatest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(greatest) : "f"(a), "f"(b));
    return greatest;
}

DEVICE float exp2_approx(float a) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a));
    return power;
}

DEVICE float reciprocal_approx(float a) {
    float quotient;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(a));
    return quotient;
}

// An 8 x 8 matrix of 16-bit numbers, spread over the warp as mma fragments are, transposed.
DEVICE u32 transpose_8x8(u32 of_lane) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(of_lane));
    return transposed;
}

// sums [16 x 8] += a [16 x 16] b [16 x 8], each spread over the warp's lanes as PTX prescribes.
DEVICE void mma_m16n8k16(float* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of fp16 numbers.
DEVICE void mma_m16n8k16_fp16(float* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
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

// Four matrices of 8 rows by 16 bytes, each a register of every lane: 4 * (lane % 4) and on of row
// lane / 4. Lane i has the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix_x4(u32 (&to)[4], u32 shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address)
                 : "memory");
}

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

// The same by the barrier's address in shared memory, where a barrier is one of a ring's.
DEVICE void mbarrier_init_at(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void mbarrier_arrive_at(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for that many bytes of copies as well.
DEVICE void mbarrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE void mbarrier_wait_at(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{ .reg .pred p;\n"
            "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Before the copy engine or other blocks see initialised barriers.
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE uint4 load_shared_16(u32 from) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(from));
    return value;
}

DEVICE uint2 load_shared_8(u32 from) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from));
    return value;
}

DEVICE u32 load_shared_4(u32 from) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
    return value;
}

DEVICE void store_shared_4(u32 to, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Raises a number to another, whoever else does.
DEVICE void max_shared(u32 at, u32 value) {
    asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}

// A run of bytes by the copy engine, counted on a barrier. All three are multiples of 16.
DEVICE void copy_bulk(u32 to_shared, const void* from_global, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to_shared),
        "l"(from_global), "r"(bytes), "r"(barrier)
        : "memory");
}

// Between ordinary accesses and those of the copy engine and the tensor cores, either way round.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- wgmma; wide/wgmma.py writes the instruction itself for each number of tokens ---------------

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most so many groups are in flight.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What a wgmma wrote is not read before the wait that stands ahead of this.
DEVICE void keep_in_place(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// A number that is the same in all lanes, in a uniform register, where the compiler could not know
// it. A wgmma wants its descriptors there, and they would be moved for each.
DEVICE u32 same_in_all_lanes(u32 number) { return __reduce_max_sync(~0u, number); }

// Describes a K-major operand: rows of 128 bytes with the 128-byte swizzle, in eights.
DEVICE u64 swizzled_operand(u32 at) { return 1ull << 62 | 64ull << 32 | (at >> 4 & 0x3fff); }

// Registers of each of a warpgroup's threads from here on.
template <int COUNT>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- Threads that wait for each other -----------------------------------------------------------

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
