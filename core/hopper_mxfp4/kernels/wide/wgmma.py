"""wgmma's wrappers for the numbers of tokens that a kernel is compiled for, as a CUDA header: the
instruction names each of its up to 128 registers.
"""

from collections.abc import Iterable

NAME = "wgmma.cuh"


def header(widths: Iterable[int]) -> str:
    """Defines wgmma<N>(sums, a, b) for each width N, and FOR_EACH_WIDTH(X)."""
    cases = " ".join(f"X({n})" for n in widths)
    return (
        '#pragma once\n#include "types.cuh"\n'
        "// sums [64 x N] += a [64 x 16] b [16 x N]; b: see swizzled_operand.\n"
        "template <int N>\nDEVICE void wgmma(float* sums, const u32* a, u64 b);\n"
        + "".join(map(_wrapper, widths))
        + f"#define FOR_EACH_WIDTH(X) {cases}\n"
    )


def _wrapper(n: int) -> str:
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""template <>
DEVICE void wgmma<{n}>(float* sums, const u32* a, u64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
        "{{{sums}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""
