"""The wide kernel on a Hopper GPU: numbers against the float32 reference and the flashinfer
kernel.
"""

from dataclasses import replace

import pytest
import torch

from hopper_mxfp4 import (
    SwiGLU,
    fused_moe,
    prepare_experts,
    reference_moe,
    restore_weights,
)
from hopper_mxfp4.run import reserve_workspace, workspace_bytes
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer, relative_l2

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
SMALL = ("gpt_oss", 8, 2880, 384)


def prepared(family, e, h, i, kernel="wide", **options):
    w = random_layer(family, e, h, i, **options)
    return prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel=kernel)


def with_holes(ids):
    """Holes here and there, a row of them, and a row that names one expert only."""
    ids = ids.clone()
    ids[::7, 0] = -1
    ids[5] = -1
    ids[9] = ids[9, 0]
    return ids


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
            x = x * torch.exp(1.5 * torch.randn_like(x.float())).bfloat16()  # heavy tails
        if case % 3 == 2:
            x[:, 7] = 1000
        if m > 9:
            ids = with_holes(ids)
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


def restored_is(p, w) -> bool:
    found = restore_weights(p)
    return all(
        torch.equal(getattr(found, name).view(torch.uint8), t.contiguous().view(torch.uint8))
        for name, t in w.tensors().items()
    )


def test_any_strides_and_positions():
    p = prepared(*SMALL)
    x, ids, weights = random_call(40, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    wide = torch.zeros(40, 2891, dtype=torch.bfloat16, device=CUDA)
    for offset in (0, 1, 8, 11):
        wide[:, offset : offset + 2880] = x
        assert torch.equal(fused_moe(wide[:, offset : offset + 2880], ids, weights, p), wanted)
    assert torch.equal(
        fused_moe(
            x.t().contiguous().t(), ids.t().contiguous().t(), weights.t().contiguous().t(), p
        ),
        wanted,
    )
    assert torch.equal(
        fused_moe(
            x.repeat_interleave(2, 0)[::2],
            ids.long().repeat(1, 2)[:, :4],
            weights.repeat(1, 2)[:, :4],
            p,
        ),
        wanted,
    )


def test_nan_and_infinity_stay_in_their_row():
    p = prepared(*SMALL)
    x, ids, weights = random_call(300, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 11, 299):
            bad = x.clone()
            bad[row, 2879] = value
            y = fused_moe(bad, ids, weights, p)
            others = torch.arange(300, device=CUDA) != row
            assert torch.equal(y[others], wanted[others])
    bad = x.clone()
    bad[3] = float("nan")
    assert fused_moe(bad, ids, weights, p)[3].isnan().all()


@pytest.mark.parametrize("byte", [0, 1, 4, 60, 126, 127, 128])
def test_any_scale_byte(byte):
    family, e, h, i, top_k = "deepseek_v4", 4, 256, 160, 2
    w = random_layer(family, e, h, i)
    w.w13_scale.view(torch.uint8)[:, ::3] = byte
    w.w2_scale.view(torch.uint8)[:] = 121
    x, ids, weights = random_call(9, h, e, top_k)
    x = (x.float() * 2.0 ** min(max(127 - byte, -60), 60)).bfloat16()
    swiglu = SwiGLU(1.0, 0.0, None)
    wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=swiglu)
    p = prepare_experts(w, family=FAMILY[family], swiglu=swiglu, kernel="wide")
    y = fused_moe(x, ids, weights, p)
    finite = wanted.abs() < 3e38
    assert finite.any()
    assert relative_l2(y[finite], wanted[finite]) < 6e-3


def test_cuda_graphs_follow_routing_and_weights():
    p, other = prepared(*SMALL), prepared(*SMALL, seed=5)
    x, ids, weights = random_call(200, 2880, 8, 4)
    out = torch.empty_like(x)
    fused_moe(x, ids, weights, p, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out)
    for seed in range(4):
        x2, ids2, weights2 = random_call(200, 2880, 8, 4, seed=20 + seed)
        if seed == 3:
            ids2[:] = 2  # one expert has them all
        for to, source in ((x, x2), (ids, ids2), (weights, weights2)):
            to.copy_(source)
        graph.replay()
        assert torch.equal(out, fused_moe(x2, ids2, weights2, p))
    for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias"):
        getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, fused_moe(x, ids, weights, other))


def test_a_thousand_equal_calls_give_equal_bytes():
    p = prepared("deepseek_v4", 64, 4096, 2048)
    x, ids, weights = random_call(500, 4096, 64, 6)
    first = fused_moe(x, ids, weights, p)
    differing = torch.zeros((), device=CUDA, dtype=torch.int64)
    for _ in range(1000):
        differing += (fused_moe(x, ids, weights, p) != first).any()
    assert differing.item() == 0


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


def test_two_streams_at_once():
    p, q = prepared(*SMALL), prepared("deepseek_v4", 16, 4096, 256)
    a, b = random_call(300, 2880, 8, 4), random_call(300, 4096, 16, 6)
    wanted = fused_moe(*a, p), fused_moe(*b, q)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    made = [[], []]
    for _ in range(50):
        for stream, call, layer, found in zip(streams, (a, b), (p, q), made, strict=True):
            with torch.cuda.stream(stream):
                found.append(fused_moe(*call, layer))
    torch.cuda.synchronize()
    for found, expected in zip(made, wanted, strict=True):
        assert all(torch.equal(y, expected) for y in found)


def test_no_tokens_and_only_holes():
    p = prepared(*SMALL)
    x, ids, weights = random_call(70, 2880, 8, 4)
    assert fused_moe(x[:0], ids[:0], weights[:0], p).shape == (0, 2880)
    for hole in (-1, 8, 2**31 - 1, -(2**31)):
        assert not fused_moe(x, torch.full_like(ids, hole), weights, p).any()
    assert not fused_moe(x, torch.full_like(ids, 0).long() + 2**32, weights, p).any()


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
