"""The smallbatch kernel on a Hopper GPU: numbers against the float32 reference and the flashinfer
kernel.
"""

import pytest
import torch

from hopper_mxfp4 import SwiGLU, fused_moe, prepare_experts, reference_moe
from hopper_mxfp4.kernels.hybrid import small_tokens
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer, relative_l2

SHAPES = [
    # family, experts, hidden, intermediate, top_k
    ("gpt_oss", 32, 2880, 2880, 4),
    ("gpt_oss", 32, 2880, 736, 4),
    ("gpt_oss", 8, 2880, 384, 4),
    ("deepseek_v4", 64, 4096, 2048, 6),
    ("deepseek_v4", 16, 4096, 256, 6),
    ("deepseek_v4", 8, 7168, 3072, 8),
    ("gpt_oss", 3, 32, 32, 2),
    ("deepseek_v4", 600, 160, 96, 8),
]


def prepared(family, e, h, i, kernel="smallbatch", **options):
    w = random_layer(family, e, h, i, **options)
    return prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel=kernel)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_errors_are_no_worse_than_flashinfers_in_a_thousand_cases(shape, record_property):
    family, e, h, i, top_k = shape
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(384, h, e, top_k)
    ids[::7, 0] = -1  # holes
    ids[5] = -1
    ids[9] = ids[9, 0]  # one expert twice and more
    wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
    p = prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel="smallbatch")
    stock = prepared(family, e, h, i, "flashinfer")
    theirs = relative_l2(fused_moe(x, ids, weights, stock), wanted)
    alone = fused_moe(x, ids, weights, p)
    ours = relative_l2(alone, wanted)
    assert ours <= 1.05 * theirs
    assert relative_l2(alone[9], wanted[9]) < 6e-3
    g = torch.Generator().manual_seed(0)
    cases = 125
    for case in range(cases):
        m = int(torch.randint(1, 65 if case % 5 else 300, (1,), generator=g))
        rows = torch.randperm(384, generator=g)[:m].to(CUDA)
        some = ids[rows].long() if case % 2 else ids[rows]
        y = fused_moe(x[rows], some, weights[rows], p)
        assert torch.equal(y, alone[rows]), (
            f"case {case}: a token's bytes depend on its batch of {m}"
        )
    record_property("cases", cases)
    record_property("relative_l2", ours)
    record_property("flashinfer_relative_l2", theirs)


def test_any_strides_and_positions():
    p = prepared("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(16, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    wide = torch.zeros(16, 2891, dtype=torch.bfloat16, device=CUDA)
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
            x.repeat_interleave(2, 0)[::2], ids.repeat(1, 2)[:, :4], weights.repeat(1, 2)[:, :4], p
        ),
        wanted,
    )


def test_nan_and_infinity_stay_in_their_row():
    p = prepared("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(24, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 11, 23):
            bad = x.clone()
            bad[row, 2879] = value
            y = fused_moe(bad, ids, weights, p)
            others = torch.arange(24, device=CUDA) != row
            assert torch.equal(y[others], wanted[others])
    bad = x.clone()
    bad[3] = float("nan")
    assert fused_moe(bad, ids, weights, p)[3].isnan().all()


@pytest.mark.parametrize("byte", [4, 60, 126, 127, 128, 129, 130, 200, 250])
def test_any_scale_byte(byte):
    """Beyond 128 one bf16 factor can't hold the scale."""
    family, e, h, i, top_k = "deepseek_v4", 4, 256, 160, 2
    w = random_layer(family, e, h, i)
    w.w13_scale.view(torch.uint8)[:, ::3] = byte
    w.w2_scale.view(torch.uint8)[:] = 121
    x, ids, weights = random_call(9, h, e, top_k)
    x = (x.float() * 2.0 ** min(max(127 - byte, -60), 60)).bfloat16()
    swiglu = SwiGLU(1.0, 0.0, None)
    wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=swiglu)
    y = fused_moe(
        x,
        ids,
        weights,
        prepare_experts(w, family=FAMILY[family], swiglu=swiglu, kernel="smallbatch"),
    )
    finite = wanted.abs() < 3e38
    assert finite.any()
    assert relative_l2(y[finite], wanted[finite]) < 6e-3


def test_cuda_graphs_follow_routing_and_weights():
    p, other = prepared("gpt_oss", 32, 2880, 2880), prepared("gpt_oss", 32, 2880, 2880, seed=5)
    x, ids, weights = random_call(16, 2880, 32, 4)
    out = torch.empty_like(x)
    fused_moe(x, ids, weights, p, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out)
    for seed in range(3):
        x2, ids2, weights2 = random_call(16, 2880, 32, 4, seed=20 + seed)
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
    x, ids, weights = random_call(32, 4096, 64, 6)
    first, differing = (
        fused_moe(x, ids, weights, p),
        torch.zeros((), device=CUDA, dtype=torch.int64),
    )
    for _ in range(1000):
        differing += (fused_moe(x, ids, weights, p) != first).any()
    assert differing.item() == 0


def test_two_streams_at_once():
    p, q = prepared("gpt_oss", 8, 2880, 736), prepared("deepseek_v4", 16, 4096, 256)
    a, b = random_call(8, 2880, 8, 4), random_call(8, 4096, 16, 6)
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


def test_hybrid_is_one_of_its_two_kernels():
    hybrid = prepared("gpt_oss", 8, 2880, 384, "hybrid")
    small, large = (
        prepared("gpt_oss", 8, 2880, 384),
        prepared("gpt_oss", 8, 2880, 384, "flashinfer"),
    )
    edge = small_tokens(hybrid, 4)
    assert edge > 0
    for tokens, one in ((1, small), (edge, small), (edge + 1, large), (4 * edge, large)):
        call = random_call(tokens, 2880, 8, 4)
        y, wanted = fused_moe(*call, hybrid), fused_moe(*call, one)
        # flashinfer adds a token's experts in any order unless told otherwise
        assert torch.equal(y, wanted) if one is small else relative_l2(y, wanted.float()) < 4e-3


def test_no_tokens_and_only_holes():
    p = prepared("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(5, 2880, 8, 4)
    assert fused_moe(x[:0], ids[:0], weights[:0], p).shape == (0, 2880)
    for hole in (-1, 8, 2**31 - 1, -(2**31)):
        assert not fused_moe(x, torch.full_like(ids, hole), weights, p).any()
    assert not fused_moe(x, torch.full_like(ids, 0).long() + 2**32, weights, p).any()
