"""wgmma's wrappers for the numbers of tokens that a kernel is compiled for, as a CUDA header: the
instruction names each of its up to 128 registers.
"""

from collections.abc import Iterable
from typing import NamedTuple

NAME = "wgmma.cuh"


class Kind(NamedTuple):
    """depth_and_types: of the instruction, behind its number of tokens. last: operands after the
    one that says whether it adds to what is there.
    """

    depth_and_types: str
    last: str


BF16 = Kind("k16.f32.bf16.bf16", "1, 1, 0")
E5M2_E4M3 = Kind("k32.f32.e5m2.e4m3", "1, 1")


def header(widths: Iterable[int], kind: Kind = BF16) -> str:
    """Defines wgmma<N>(sums, a, b) for each width N, wgmma_first<N>, which overwrites the sums, and
    FOR_EACH_WIDTH(X).
    """
    widths = tuple(widths)
    cases = " ".join(f"X({n})" for n in widths)
    return (
        '#pragma once\n#include "types.cuh"\n'
        "// sums [64 x N] += a [64 x K] b [K x N]; b: see swizzled_operand.\n"
        + "".join(
            f"template <int N>\nDEVICE void {name}(float* sums, const u32* a, u64 b);\n"
            + "".join(_wrapper(name, n, kind, adds) for n in widths)
            for name, adds in (("wgmma", 1), ("wgmma_first", 0))
        )
        + f"#define FOR_EACH_WIDTH(X) {cases}\n"
    )


def _wrapper(name: str, n: int, kind: Kind, adds: int) -> str:
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""template <>
DEVICE void {name}<{n}>(float* sums, const u32* a, u64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{n}{kind.depth_and_types} "
        "{{{sums}}}, {{{a}}}, %{count + 4}, {adds}, {kind.last};"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""
