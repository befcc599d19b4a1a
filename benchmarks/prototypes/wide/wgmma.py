"""The wgmma wrappers of the wide kernel, one for each number of tokens, as CUDA C++."""


def wrapper(n: int) -> str:
    """wgmma of 64 rows x n tokens x 16 k, A from registers, B by a shared memory descriptor."""
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
template <>
DEV void wgmma<{n}>(float* d, const u32* a, u64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}, {{{a}}}, %{count + 4}, "
        "1, 1, 1, 0;"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}"""


def wrappers(widths: list[int]) -> str:
    cases = " ".join(f"X({n})" for n in widths)
    head = "\ntemplate <int N>\nDEV void wgmma(float* d, const u32* a, u64 b);"
    return head + "".join(map(wrapper, widths)) + f"\n#define FOR_EACH_N(X) {cases}\n"
