"""The wide kernel on a Hopper GPU: numbers against the float32 reference and the flashinfer
kernel.
"""

from dataclasses import replace

import pytest
import torch

from hopper_mxfp4 import (
    fused_moe,
    prepare_experts,
    reference_moe,
)
from hopper_mxfp4.run import reserve_workspace, workspace_bytes
from layers import (
    CUDA,
    FAMILY,
    SWIGLU,
    heavy_tailed,
    random_call,
    random_layer,
    relative_l2,
    restored_is,
    with_masked_ids,
)

SHAPES = [
    # family, experts, hidden, intermediate, top_k
    ("gpt_oss", 32, 2880, 2880, 4),
    ("gpt_oss", 32, 2880, 736, 4),
    ("gpt_oss", 8, 2880, 672, 4),
    ("gpt_oss", 8, 2880, 384, 4),
    ("gpt_oss", 8, 2880, 192, 4),
    ("deepseek_v4", 64, 4096, 2048, 6),
    ("deepseek_v4", 16, 4096, 256, 6),
    ("deepseek_v4", 16, 512, 576, 8),
    ("deepseek_v4", 12, 512, 288, 6),
    ("gpt_oss", 3, 32, 32, 2),
    ("deepseek_v4", 1024, 160, 96, 8),
]


def prepared(family, e, h, i, kernel="wide", **options):
    w = random_layer(family, e, h, i, **options)
    return prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel=kernel)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_errors_are_no_worse_than_flashinfers(shape, record_property):
    family, e, h, i, top_k = shape
    w = random_layer(family, e, h, i)
    p = prepared(family, e, h, i)
    stock = prepared(family, e, h, i, "flashinfer")
    assert restored_is(p, w)
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for case, m in enumerate((1, 2, 17, 130, 384, 700, *torch.randint(1, 900, (6,), generator=g))):
        x, ids, weights = random_call(int(m), h, e, top_k, seed=case)
        if case % 3 == 1:
            x = heavy_tailed(x, seed=case)
        if case % 3 == 2:
            x[:, 7] = 1000
        if m > 9:
            ids = with_masked_ids(ids)
        wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
        y = fused_moe(x, ids.long() if case % 2 else ids, weights, p)
        ours, theirs = (relative_l2(z, wanted) for z in (y, fused_moe(x, ids, weights, stock)))
        assert ours <= 5e-3, (m, ours)
        if y.numel() >= 1 << 14:  # of fewer numbers the errors are chance
            assert ours <= 1.05 * theirs, (m, ours, theirs)
        worst = max(worst, ours)
        if m > 9:
            assert not y[5].any()
            assert relative_l2(y[9], wanted[9]) < 6e-3
    record_property("worst_relative_l2", worst)


@pytest.mark.parametrize(
    "shape",
    [("gpt_oss", 32, 2880, 2880, 4), ("deepseek_v4", 12, 512, 288, 6)],
    ids=lambda s: "-".join(map(str, s)),
)
def test_a_tokens_bytes_do_not_depend_on_its_batch(shape):
    """Widths of tiles, the place in one and who else is there change, the order of sums does
    not.
    """
    family, e, h, i, top_k = shape
    p = prepared(family, e, h, i)
    x, ids, weights = random_call(3000, h, e, top_k)
    alone = fused_moe(x, ids, weights, p)
    g = torch.Generator().manual_seed(0)
    for m in (1, 2, 15, 63, 64, 65, 200, 511, 1000, 2048):
        rows = torch.randperm(3000, generator=g)[:m].to(CUDA)
        assert torch.equal(fused_moe(x[rows], ids[rows], weights[rows], p), alone[rows]), m


@pytest.mark.parametrize(("tokens", "top_k"), [(16384, 4), (20000, 4), (1500, 64), (3, 64)])
def test_many_tokens_and_many_experts_a_token(tokens, top_k):
    """In parts, in one workspace of the size that was asked for, whatever it holds."""
    e, h, i = 96, 256, 160
    p = prepared("gpt_oss", e, h, i)
    w = random_layer("gpt_oss", e, h, i)
    x, ids, weights = random_call(tokens, h, e, top_k)
    needed = workspace_bytes(p, tokens, top_k)
    memory = torch.full((needed + 4096,), 255, dtype=torch.uint8, device=CUDA)
    y = fused_moe(x, ids, weights, p, workspace=memory[:needed])
    assert (memory[needed:] == 255).all(), "it wrote beyond its workspace"
    some = torch.arange(0, tokens, max(tokens // 300, 1), device=CUDA)
    wanted = reference_moe(
        x[some], ids[some], weights[some], w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"]
    )
    assert relative_l2(y[some], wanted) < 5e-3


def test_memory():
    """Beside the weights a layer holds nothing; a call takes what was reserved."""
    p = prepared("gpt_oss", 32, 2880, 2880)
    needed = reserve_workspace(p, 8192, 4)
    call = random_call(8192, 2880, 32, 4)
    out = fused_moe(*call, p)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_moe(*call, p, out=out)
    assert torch.cuda.max_memory_allocated() == held
    assert needed < 450 << 20


def test_repacking_is_quick():
    """A layer of GPT-OSS-20B, 0.4 GB, in well under a second."""
    w = random_layer("gpt_oss", 32, 2880, 2880)
    for _ in range(2):
        again = replace(w, **{name: t.clone() for name, t in w.tensors().items()})
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        prepare_experts(again, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"], kernel="wide")
        end.record()
        torch.cuda.synchronize()
    assert begin.elapsed_time(end) < 500
