"""Our own kernels on odd shapes, small enough to run under compute-sanitizer on a Hopper GPU.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck synccheck initcheck; do
        compute-sanitizer --report-api-errors no --tool $tool \\
            python3 benchmarks/checks/sanitizer_cases.py
    done
    compute-sanitizer --tool racecheck --kernel-regex kns=moe_ --kernel-regex kns=stage \\
        python3 benchmarks/checks/sanitizer_cases.py --every-lane-arrives

Each case runs narrow, narrow8, both cuts of wide and of wide8, and what stages FlashInfer's inputs,
ours with local ids and with global ids and a map; FlashInfer itself is not needed. Results are
compared with the float32 reference, so that a run that skipped a kernel fails. Compiling takes some
20 s a shape the first time; the cache folder keeps it.

In our kernels one lane arrives at an mbarrier for its whole warp, after a __syncwarp. racecheck
does not follow that and takes the other lanes' accesses for unordered. --every-lane-arrives
compiles the same kernels with 32 times as many arrivals, which it does follow: what it then reports
is a race.

--cases 6 7 runs those alone, so that several processes can share them.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hopper_mxfp4 import LayerShape, fused_moe, prepare_experts, reference_moe
from hopper_mxfp4.bench.baselines import activations_of
from hopper_mxfp4.kernels.flashinfer import staging
from hopper_mxfp4.kernels.flashinfer.staging import staged
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.narrow import launch as narrow
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide.tiling import Tiling
from hopper_mxfp4.kernels.wide8.kernel import Wide8Kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/gpu"))
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer, relative_l2

CASES = (
    # family, experts, hidden, intermediate, top_k, tokens
    ("gpt_oss", 5, 96, 160, 3, 37),
    ("gpt_oss", 3, 32, 32, 2, 1),
    ("gpt_oss", 4, 96, 64, 2, 700),
    ("gpt_oss", 8, 2880, 192, 4, 9),
    ("gpt_oss", 8, 2880, 192, 4, 40),
    ("deepseek_v4", 7, 160, 288, 6, 65),
    ("deepseek_v4", 16, 4096, 256, 6, 33),
    ("deepseek_v4", 300, 64, 64, 8, 200),
)
ALL, NONE = 1 << 20, 0
# Kernels, and up to how many pairs an expert those with two cuts take the one for few tokens.
WAYS = {
    "narrow": ("narrow", ALL),
    "wide, few tokens": ("wide", ALL),
    "wide, many tokens": ("wide", NONE),
    "narrow8": ("narrow8", ALL),
    "wide8, few tokens": ("wide8", ALL),
    "wide8, many tokens": ("wide8", NONE),
}
# Relative L2. fp8's definition itself moves by 2e-2 with sums a little off
# (docs/dev/w4a8-kernel.md).
BOUNDS = {"bf16": 6e-3, "fp8": 3e-2}


def every_lane_arrives(source: Source) -> Source:
    """narrow or narrow8 with every lane of a warp arriving, and barriers that wait for all."""
    texts = {source.name: source.text, **source.headers}
    for one, all_lanes, places in (
        ("if (lane == 0) mbarrier_arrive(", "mbarrier_arrive(", 2),
        (
            "mbarrier_init(full + i, NUM_STREAMERS)",
            "mbarrier_init(full + i, 32 * NUM_STREAMERS)",
            1,
        ),
        ("mbarrier_init(empty + i, N_TILES)", "mbarrier_init(empty + i, 32 * N_TILES)", 1),
    ):
        found = sum(text.count(one) for text in texts.values())
        assert found == places, f"{one} stands {found} times in the kernel, not {places}"
        texts = {name: text.replace(one, all_lanes) for name, text in texts.items()}
    return Source(source.name, texts.pop(source.name), texts)


def with_every_lane(cut_layer: Callable[[LayerShape], tuple[Tiling, Tiling]]) -> Any:
    """wide's or wide8's cuts, likewise."""

    def cut(shape: LayerShape) -> tuple[Tiling, ...]:
        return tuple(replace(tiling, every_lane_arrives=True) for tiling in cut_layer(shape))

    return staticmethod(cut)


def run(way: str, family: str, e: int, h: int, i: int, top_k: int, tokens: int) -> None:
    """Compare one kernel with the reference."""
    kernel, few_pairs = WAYS[way]
    WideKernel.few_pairs = Wide8Kernel.few_pairs = few_pairs
    activations = activations_of(kernel)
    options = {
        "family": FAMILY[family],
        "swiglu": SWIGLU[family],
        "activations": activations,
    }
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(tokens, h, e, top_k)
    ids[::5, 0] = -1
    ids[-1] = e  # a row of masked ids alone
    wanted = reference_moe(x, ids, weights, w, **options)
    p = prepare_experts(w, kernel=kernel, **options)
    y = fused_moe(x, ids, weights, p)
    assert torch.equal(fused_moe(at_odd_stride(x), ids.long(), weights, p), y)
    ids, expert_map = spread_over_ranks(ids, e)
    assert torch.equal(fused_moe(x, ids, weights, p, expert_map=expert_map), y)
    columns = ids.long().t().contiguous().t()
    assert torch.equal(fused_moe(x, columns, weights, p, expert_map=expert_map), y)
    assert not y[-1].any()
    error = relative_l2(y, wanted) if wanted.any() else float(y.abs().max())
    print(way, family, e, h, i, top_k, tokens, f"relative L2 {error:.2e}", flush=True)
    assert error < BOUNDS[activations]


def spread_over_ranks(ids: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of twice as many experts, every second one of them here, and their map. Masked ids are
    another rank's experts, or none: both ends of what the map must not be read beyond.
    """
    expert_map = torch.full((2 * e,), -1, dtype=torch.int32, device=CUDA)
    expert_map[1::2] = torch.arange(e, dtype=torch.int32, device=CUDA)
    local = (ids >= 0) & (ids < e)
    masked = torch.arange(ids.numel(), dtype=torch.int32, device=CUDA).view(ids.shape) % 4
    others = torch.tensor([-1, 2 * e, 0, 2 * e - 2], dtype=torch.int32, device=CUDA)[masked.long()]
    return torch.where(local, 2 * ids + 1, others), expert_map


def stage(e: int, h: int, top_k: int, tokens: int) -> None:
    """What FlashInfer would be handed."""
    x, ids, weights = random_call(tokens, h, e, top_k)
    padded = -(-h // 128) * 128
    to = staged(
        torch.empty(tokens, padded, dtype=torch.bfloat16, device=CUDA),
        torch.empty(tokens, top_k, dtype=torch.int32, device=CUDA),
        torch.empty(tokens, top_k, device=CUDA),
    )
    staging.stager(CUDA)(at_odd_stride(x), ids.long(), weights, e, to)
    assert torch.equal(to.x[:, :h], x)
    assert not to.x[:, h:].any()


def at_odd_stride(x: torch.Tensor) -> torch.Tensor:
    """Its values in rows that begin anywhere, between numbers that nobody may read."""
    tokens, h = x.shape
    rows = torch.full((tokens, h + 3), float("nan"), dtype=x.dtype, device=x.device)
    rows[:, 3:] = x
    return rows[:, 3:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--every-lane-arrives", action="store_true")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="by number")
    options = parser.parse_args()
    if options.every_lane_arrives:
        as_shipped = narrow.source
        narrow.source = lambda kind: every_lane_arrives(as_shipped(kind))
        for kernel in (WideKernel, Wide8Kernel):
            kernel.cut_layer = with_every_lane(kernel.cut_layer)
    cases = [CASES[number] for number in options.cases]
    for case in cases:
        for way in WAYS:
            run(way, *case)
        _, e, h, _, top_k, tokens = case
        stage(e, h, top_k, tokens)
    print(f"{len(cases)} cases passed")
