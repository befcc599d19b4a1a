"""The narrow kernel on a Hopper GPU: numbers against the float32 reference, and what it promises of
bytes.
"""

import pytest
import torch

from hopper_mxfp4 import SwiGLU, fused_moe, prepare_experts, reference_moe
from layers import CUDA, FAMILY, SWIGLU, random_call, random_layer, relative_l2

SHAPES = [
    # family, experts, hidden, intermediate, top_k
    ("gpt_oss", 32, 2880, 2880, 4),
    ("gpt_oss", 32, 2880, 736, 4),
    ("gpt_oss", 16, 2880, 192, 4),
    ("deepseek_v4", 64, 4096, 2048, 6),
    ("deepseek_v4", 16, 4096, 256, 6),
    ("deepseek_v4", 8, 7168, 3072, 8),
    ("gpt_oss", 3, 32, 32, 2),
    ("deepseek_v4", 600, 160, 96, 8),
]


def prepared(family, e, h, i, **options):
    w = random_layer(family, e, h, i, **options)
    return prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel="narrow")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_errors_and_bytes_in_a_thousand_cases(shape, record_property):
    """A token's bytes are the same beside any others, in segments of 8 and of 16 tokens."""
    family, e, h, i, top_k = shape
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(384, h, e, top_k)
    ids[::7, 0] = -1  # holes
    ids[5] = -1
    ids[9] = ids[9, -1]  # one expert twice and more
    wanted = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
    p = prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family], kernel="narrow")
    alone = fused_moe(x, ids, weights, p)
    error = relative_l2(alone, wanted)
    assert error < 3e-3
    assert relative_l2(alone[9], wanted[9]) < 6e-3
    assert not alone[5].any()
    g = torch.Generator().manual_seed(0)
    cases = 125
    for case in range(cases):
        most = (8, 64, 300)[case % 3]
        m = int(torch.randint(1, most + 1, (1,), generator=g))
        rows = torch.randperm(384, generator=g)[:m].to(CUDA)
        some = ids[rows].long() if case % 2 else ids[rows]
        y = fused_moe(x[rows], some, weights[rows], p)
        assert torch.equal(y, alone[rows]), (
            f"case {case}: a token's bytes depend on its batch of {m}"
        )
    record_property("cases", cases)
    record_property("relative_l2", error)


def test_any_strides_and_positions():
    p = prepared("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(16, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    wide = torch.zeros(16, 2891, dtype=torch.bfloat16, device=CUDA)
    for offset in (0, 1, 8, 11):
        wide[:, offset : offset + 2880] = x
        assert torch.equal(fused_moe(wide[:, offset : offset + 2880], ids, weights, p), wanted)
    columns = ids.t().contiguous().t(), weights.t().contiguous().t()
    assert torch.equal(fused_moe(x.t().contiguous().t(), *columns, p), wanted)
    parts = ids.repeat(1, 2)[:, :4], weights.repeat(1, 2)[:, :4]
    assert torch.equal(fused_moe(x.repeat_interleave(2, 0)[::2], *parts, p), wanted)


@pytest.mark.parametrize("tokens", [8, 24])
def test_nan_and_infinity_stay_in_their_row(tokens):
    p = prepared("gpt_oss", 8, 2880, 384)
    x, ids, weights = random_call(tokens, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 3, tokens - 1):
            bad = x.clone()
            bad[row, 2879] = value
            y = fused_moe(bad, ids, weights, p)
            others = torch.arange(tokens, device=CUDA) != row
            assert torch.equal(y[others], wanted[others])
            assert not y[row].isfinite().any()
    bad = x.clone()
    bad[3] = float("nan")
    assert fused_moe(bad, ids, weights, p)[3].isnan().all()


@pytest.mark.parametrize("byte", [2, 4, 60, 126, 127, 128, 129, 130, 200, 250, 254])
def test_any_scale_byte(byte):
    family, e, h, i, top_k = "deepseek_v4", 4, 256, 160, 2
    w = random_layer(family, e, h, i)
    w.w13_scale.view(torch.uint8)[:, ::3] = byte
    w.w2_scale.view(torch.uint8)[:] = 121
    x, ids, weights = random_call(9, h, e, top_k)
    x = (x.float() * 2.0 ** min(max(127 - byte, -60), 60)).bfloat16()
    swiglu, options = SwiGLU(1.0, 0.0, None), {"family": FAMILY[family]}
    wanted = reference_moe(x, ids, weights, w, swiglu=swiglu, **options)
    p = prepare_experts(w, swiglu=swiglu, kernel="narrow", **options)
    y = fused_moe(x, ids, weights, p)
    finite = wanted.abs() < 3e38
    assert finite.any()
    assert relative_l2(y[finite], wanted[finite]) < 6e-3


def test_tokens_of_any_magnitude():
    """x goes into the tensor cores multiplied by a power of two of its own for each token."""
    w = random_layer("gpt_oss", 8, 2880, 384)
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"], kernel="narrow")
    x, ids, weights = random_call(24, 2880, 8, 4)
    exponents = torch.tensor([-130, -100, -40, 0, 40, 100], device=CUDA).repeat(4)
    x = (x.double() * 2.0 ** exponents[:, None].double()).bfloat16()
    x[0], x[7, 5] = 0, 2.0**120
    options = {"family": FAMILY["gpt_oss"], "swiglu": SWIGLU["gpt_oss"]}
    wanted, y = reference_moe(x, ids, weights, w, **options), fused_moe(x, ids, weights, p)
    for row in range(24):
        assert relative_l2(y[row], wanted[row]) < 6e-3


def test_cuda_graphs_follow_routing_and_weights():
    p, other = prepared("gpt_oss", 32, 2880, 2880), prepared("gpt_oss", 32, 2880, 2880, seed=5)
    for tokens in (8, 16):
        x, ids, weights = random_call(tokens, 2880, 32, 4)
        out = torch.empty_like(x)
        fused_moe(x, ids, weights, p, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused_moe(x, ids, weights, p, out=out)
        for seed in range(3):
            call = random_call(tokens, 2880, 32, 4, seed=20 + seed)
            for to, source in zip((x, ids, weights), call, strict=True):
                to.copy_(source)
            graph.replay()
            assert torch.equal(out, fused_moe(*call, p))
    for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias"):
        getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, fused_moe(x, ids, weights, other))


@pytest.mark.parametrize("tokens", [8, 32])
def test_a_thousand_equal_calls_give_equal_bytes(tokens):
    p = prepared("deepseek_v4", 64, 4096, 2048)
    x, ids, weights = random_call(tokens, 4096, 64, 6)
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


def test_no_tokens_and_only_holes():
    p = prepared("gpt_oss", 8, 2880, 384)
    for tokens in (5, 50):
        x, ids, weights = random_call(tokens, 2880, 8, 4)
        assert fused_moe(x[:0], ids[:0], weights[:0], p).shape == (0, 2880)
        for hole in (-1, 8, 2**31 - 1, -(2**31)):
            assert not fused_moe(x, torch.full_like(ids, hole), weights, p).any()
        assert not fused_moe(x, torch.full_like(ids, 0).long() + 2**32, weights, p).any()
