"""What each of our own kernels promises of a call, on a Hopper GPU: strides, stray numbers, scales,
graphs, streams, and the same bytes every time. Their errors stand in a file of each.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from hopper_mxfp4 import SwiGLU, fused_moe, prepare_experts, reference_moe
from layers import (
    CUDA,
    FAMILY,
    SWIGLU,
    random_call,
    random_layer,
    relative_l2,
    spread_over_ranks,
    with_masked_ids,
)

SMALL = ("gpt_oss", 8, 2880, 384)  # family, experts, hidden, intermediate


SCALE_BYTES = (1, 2, 4, 60, 126, 127, 128, 129, 130, 200, 250)  # beyond, weights are infinite
FP8_SCALE_BYTES = (0, 1, 4, 60, 126, 127, 128, 200, 250)


class Own(NamedTuple):
    """tokens: of a call in each of its ways to run. scale_bytes: E8M0, to the ends it takes."""

    kernel: str
    tokens: tuple[int, ...]
    scale_bytes: tuple[int, ...]
    activations: str = "bf16"


OWN = (
    Own("narrow", (8, 24), SCALE_BYTES),
    Own("wide", (40, 300), (1, 4, 60, 126, 127, 128)),
    Own("native", (8, 300), (1, 127, 128, 129, 250)),
    Own("narrow8", (8, 24), FP8_SCALE_BYTES, "fp8"),
    Own("wide8", (40, 300), FP8_SCALE_BYTES, "fp8"),
    Own("native8", (4, 300), (0, 127, 250), "fp8"),
)
ACTIVATIONS = {own.kernel: own.activations for own in OWN}
each_size = pytest.mark.parametrize(
    ("kernel", "tokens"), [(own.kernel, tokens) for own in OWN for tokens in own.tokens]
)
each_scale = pytest.mark.parametrize(
    ("kernel", "byte"), [(own.kernel, byte) for own in OWN for byte in own.scale_bytes]
)


def prepared(kernel, family, e, h, i, **options):
    return prepare(kernel, family, random_layer(family, e, h, i, **options))


def prepare(kernel, family, w, **options):
    return prepare_experts(
        w,
        family=FAMILY[family],
        swiglu=SWIGLU[family],
        kernel=kernel,
        activations=ACTIVATIONS[kernel],
        **options,
    )


@each_size
def test_any_strides_and_positions(kernel, tokens):
    p = prepared(kernel, *SMALL)
    x, ids, weights = random_call(tokens, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    wide = torch.zeros(tokens, 2891, dtype=torch.bfloat16, device=CUDA)
    for offset in (0, 1, 8, 11):
        wide[:, offset : offset + 2880] = x
        assert torch.equal(fused_moe(wide[:, offset : offset + 2880], ids, weights, p), wanted)
    columns = [t.t().contiguous().t() for t in (x, ids, weights)]
    assert torch.equal(fused_moe(*columns, p), wanted)
    parts = x.repeat_interleave(2, 0)[::2], ids.repeat(1, 2)[:, :4], weights.repeat(1, 2)[:, :4]
    assert torch.equal(fused_moe(*parts, p), wanted)
    assert torch.equal(fused_moe(parts[0], parts[1].long(), parts[2], p), wanted)


@each_size
def test_nan_and_infinity_stay_in_their_row(kernel, tokens):
    p = prepared(kernel, *SMALL)
    x, ids, weights = random_call(tokens, 2880, 8, 4)
    wanted = fused_moe(x, ids, weights, p)
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 3, tokens - 1):
            bad = x.clone()
            bad[row, 2879] = value
            y = fused_moe(bad, ids, weights, p)
            others = torch.arange(tokens, device=CUDA) != row
            assert torch.equal(y[others], wanted[others])
            assert not y[row].isfinite().all()
    bad = x.clone()
    bad[3] = float("nan")
    assert fused_moe(bad, ids, weights, p)[3].isnan().all()


@each_scale
def test_any_scale_byte(kernel, byte):
    family, e, h, i, top_k = "deepseek_v4", 4, 256, 160, 2
    w = random_layer(family, e, h, i)
    w.w13_scale.view(torch.uint8)[:, ::3] = byte
    w.w2_scale.view(torch.uint8)[:] = 121
    swiglu = SwiGLU(1.0, 0.0, None)
    options = {"family": FAMILY[family], "activations": ACTIVATIONS[kernel]}
    x, ids, weights = random_call(9, h, e, top_k)
    x = (x.float() * 2.0 ** min(max(127 - byte, -100), 60)).bfloat16()
    wanted = reference_moe(x, ids, weights, w, swiglu=swiglu, **options)
    p = prepare_experts(w, swiglu=swiglu, kernel=kernel, **options)
    y = fused_moe(x, ids, weights, p)
    finite = wanted.abs() < 3e38
    assert finite.any()
    # Near a tie of e4m3 a value may go either way.
    bound = {"bf16": 6e-3, "fp8": 1e-2}[ACTIVATIONS[kernel]]
    assert relative_l2(y[finite], wanted[finite]) < bound


@each_size
def test_cuda_graphs_follow_routing_and_weights(kernel, tokens):
    p, other = prepared(kernel, *SMALL), prepared(kernel, *SMALL, seed=5)
    x, ids, weights = random_call(tokens, 2880, 8, 4)
    out = torch.empty_like(x)
    fused_moe(x, ids, weights, p, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out)
    for seed in range(4):
        call = random_call(tokens, 2880, 8, 4, seed=20 + seed)
        if seed == 3:
            call[1][:] = 2  # one expert has them all
        for to, source in zip((x, ids, weights), call, strict=True):
            to.copy_(source)
        graph.replay()
        assert torch.equal(out, fused_moe(*call, p))
    for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias"):
        getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, fused_moe(x, ids, weights, other))


@each_size
def test_a_thousand_equal_calls_give_equal_bytes(kernel, tokens):
    p = prepared(kernel, "deepseek_v4", 64, 4096, 2048)
    call = random_call(tokens, 4096, 64, 6)
    first = fused_moe(*call, p)
    differing = torch.zeros((), device=CUDA, dtype=torch.int64)
    for _ in range(1000):
        differing += (fused_moe(*call, p) != first).any()
    assert differing.item() == 0


@each_size
def test_calls_that_follow_each_other_closely(kernel, tokens):
    """Their kernels overlap and share scratch: none reads what the call before has left there."""
    layers = [prepared(kernel, *SMALL), prepared(kernel, "deepseek_v4", 16, 2880, 256)]
    calls = [
        random_call(tokens, 2880, e, k, seed=s) for s in range(8) for e, k in ((8, 4), (16, 6))
    ]
    wanted = []
    for i, call in enumerate(calls):
        wanted.append(fused_moe(*call, layers[i % 2]))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [fused_moe(*call, layers[i % 2]) for i, call in enumerate(calls)]
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, outs, wanted))


@each_size
def test_two_streams_at_once(kernel, tokens):
    p, q = prepared(kernel, *SMALL), prepared(kernel, "deepseek_v4", 16, 4096, 256)
    a, b = random_call(tokens, 2880, 8, 4), random_call(tokens, 4096, 16, 6)
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


@each_size
def test_no_tokens_and_only_masked_ids(kernel, tokens):
    p = prepared(kernel, *SMALL)
    x, ids, weights = random_call(tokens, 2880, 8, 4)
    assert fused_moe(x[:0], ids[:0], weights[:0], p).shape == (0, 2880)
    for masked in (-1, 8, 2**31 - 1, -(2**31)):
        assert not fused_moe(x, torch.full_like(ids, masked), weights, p).any()
    assert not fused_moe(x, torch.full_like(ids, 0).long() + 2**32, weights, p).any()


@each_size
@pytest.mark.parametrize("layer", [SMALL, ("deepseek_v4", 12, 512, 288)], ids=str)
def test_an_expert_map_gives_the_bytes_of_local_ids(kernel, tokens, layer):
    _, e, h, _ = layer
    p = prepared(kernel, *layer)
    for case in range(10):
        g = torch.Generator().manual_seed(case)
        x, ids, weights = random_call(tokens + case % 3, h, e, 4, seed=case)
        if tokens > 9:
            ids = with_masked_ids(ids)
        y = fused_moe(x, ids, weights, p)
        for kind in (torch.int32, torch.int64):
            spread, expert_map = spread_over_ranks(ids.to(kind), e, g)
            columns = spread.t().contiguous().t()
            for given in (spread, columns, spread.repeat_interleave(2, 1)[:, ::2]):
                found = fused_moe(x, given, weights, p, expert_map=expert_map)
                assert torch.equal(found, y), (case, kind)
        beyond = torch.full_like(ids, 0).long() + 2**32
        assert not fused_moe(x, beyond, weights, p, expert_map=expert_map).any()


@each_size
def test_ranks_add_up(kernel, tokens):
    """Experts dealt out one by one; each rank's part is rounded, the whole layer's sum once."""
    family, e, h, i, ranks = "gpt_oss", 16, 2880, 384, 4
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(ranks * tokens, h, e, 4)
    ids = with_masked_ids(ids)
    total = torch.zeros(x.shape, device=CUDA)
    for rank in range(ranks):
        own = slice(rank, None, ranks)
        expert_map = torch.full((e,), -1, dtype=torch.int32, device=CUDA)
        expert_map[own] = torch.arange(e // ranks, dtype=torch.int32, device=CUDA)
        mine = replace(w, **{name: t[own].contiguous() for name, t in w.tensors().items()})
        p = prepare(kernel, family, mine, ep_size=ranks)
        total += fused_moe(x, ids, weights, p, expert_map=expert_map).float()
    options = {"family": FAMILY[family], "swiglu": SWIGLU[family]}
    wanted = reference_moe(x, ids, weights, w, activations=ACTIVATIONS[kernel], **options)
    # Near a tie of e4m3 a value may go either way.
    assert relative_l2(total, wanted) < (6e-3 if kernel != "wide8" else 1e-2)
    assert not total[5].any()


@each_size
def test_cuda_graphs_follow_an_expert_map(kernel, tokens):
    """Written in place."""
    p = prepared(kernel, *SMALL)
    x, ids, weights = random_call(tokens, 2880, 24, 4)
    expert_map = torch.arange(24, dtype=torch.int32, device=CUDA) - 8
    out = torch.empty_like(x)
    fused_moe(x, ids, weights, p, out=out, expert_map=expert_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out, expert_map=expert_map)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        graph.replay()
        local = expert_map[ids.long()]
        assert torch.equal(out, fused_moe(x, local, weights, p))
        expert_map.copy_((torch.randperm(24, generator=g) - 8).int())
