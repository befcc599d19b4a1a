"""Our own kernels on odd shapes, small enough to run under compute-sanitizer on a Hopper GPU.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck synccheck initcheck; do
        compute-sanitizer --report-api-errors no --tool $tool \\
            python3 benchmarks/checks/sanitizer_cases.py
    done
    compute-sanitizer --tool racecheck --kernel-regex kns=moe_ --kernel-regex kns=stage \\
        python3 benchmarks/checks/sanitizer_cases.py --every-lane-arrives

Each case is compared with the float32 reference too, so that a run that skipped a kernel fails.

In the kernel one lane arrives at an mbarrier for its whole warp, after a __syncwarp. racecheck does
not follow that and takes the other lanes' accesses for unordered. --every-lane-arrives compiles the
same kernel with 32 times as many arrivals, which it does follow: what it then reports is a race.
"""

import sys
from pathlib import Path

import torch
from hopper_mxfp4.kernels.smallbatch import launch

from hopper_mxfp4 import fused_moe, prepare_experts, reference_moe
from hopper_mxfp4.kernels.flashinfer import staging
from hopper_mxfp4.kernels.flashinfer.staging import staged
from hopper_mxfp4.kernels.jit.sources import Source

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/gpu"))
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer, relative_l2

CASES = (
    # family, experts, hidden, intermediate, top_k, tokens
    ("gpt_oss", 5, 96, 160, 3, 37),
    ("gpt_oss", 3, 32, 32, 2, 1),
    ("gpt_oss", 8, 2880, 192, 4, 9),
    ("deepseek_v4", 7, 160, 288, 6, 65),
    ("deepseek_v4", 16, 4096, 256, 6, 33),
    ("deepseek_v4", 300, 64, 64, 8, 200),
)


def every_lane_arrives(source: Source) -> Source:
    """The kernel with every lane of a warp arriving, and barriers that wait for all of them."""
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


def run(family: str, e: int, h: int, i: int, top_k: int, tokens: int) -> float:
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(tokens, h, e, top_k)
    ids[::5, 0] = -1
    ids[-1] = e  # a row of masked ids alone
    wide = torch.full((tokens, h + 3), float("nan"), dtype=torch.bfloat16, device=CUDA)
    wide[:, 3:] = x
    wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
    p = prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel="smallbatch")
    y = fused_moe(x, ids, weights, p)
    assert torch.equal(fused_moe(wide[:, 3:], ids.long(), weights, p), y)
    padded = -(-h // 128) * 128
    to = staged(
        torch.empty(tokens, padded, dtype=torch.bfloat16, device=CUDA),
        torch.empty(tokens, top_k, dtype=torch.int32, device=CUDA),
        torch.empty(tokens, top_k, device=CUDA),
    )
    staging.stager(CUDA)(wide[:, 3:], ids.long(), weights, e, to)
    assert torch.equal(to.x[:, :h], x)
    assert not to.x[:, h:].any()
    return relative_l2(y, wanted) if wanted.any() else float(y.abs().max())


if __name__ == "__main__":
    if "--every-lane-arrives" in sys.argv[1:]:
        changed = every_lane_arrives(launch.source())
        launch.source = lambda: changed
    for case in CASES:
        error = run(*case)
        print(*case, f"relative L2 {error:.2e}", flush=True)
        assert error < 6e-3
    print(f"{len(CASES)} cases passed")
