"""The narrow8 kernel on a Hopper GPU: numbers against the float32 reference with fp8 activations,
what it promises of bytes, and the choice between it and wide8.
"""

import pytest
import torch

from hopper_mxfp4 import fused_moe, prepare_experts, reference_moe
from hopper_mxfp4.kernels.narrow import launch
from hopper_mxfp4.kernels.narrow.tiling import cut_layer, segments
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8
from hopper_mxfp4.kernels.native import Native8Kernel
from hopper_mxfp4.run import workspace_bytes
from layers import (
    CUDA,
    FAMILY,
    SWIGLU,
    random_call,
    random_layer,
    relative_l2,
    restored_is,
)
from test_wide8_kernel import SHAPES, expected, with_scales_over_27_octaves, worst_error

ODD = ("deepseek_v4", 8, 7168, 3072, 8), ("gpt_oss", 4, 2880, 96, 4)  # 4 k-tiles a warp, and 1


def prepared(family, e, h, i, kernel="narrow8"):
    return prepare_experts(
        random_layer(family, e, h, i),
        family=FAMILY[family],
        swiglu=SWIGLU[family],
        kernel=kernel,
        activations="fp8",
    )


@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=lambda s: "-".join(map(str, s)))
def test_errors(shape, record_property, monkeypatch):
    w, p = random_layer(*shape[:4]), prepared(*shape[:4])
    assert restored_is(p, w)
    record_property("worst_relative_l2", worst_error(shape, w, p, monkeypatch, most=200))


def test_scales_over_27_octaves_in_a_row(monkeypatch):
    family, e, h, i, top_k = "deepseek_v4", 8, 512, 288, 4
    w, p = with_scales_over_27_octaves(family, e, h, i, "narrow8")
    call = random_call(60, h, e, top_k)
    wanted, uncertainty = expected(call, w, family, monkeypatch)
    assert relative_l2(fused_moe(*call, p), wanted) <= 5e-3 + 1.5 * uncertainty


def test_tokens_of_any_magnitude():
    """Each of a token's groups has a scale of its own."""
    family, e, h, i, top_k = "deepseek_v4", 8, 2880, 384, 4
    p, w = prepared(family, e, h, i), random_layer(family, e, h, i)
    x, ids, weights = random_call(24, h, e, top_k)
    exponents = torch.tensor([-40, -20, 0, 10], device=CUDA).repeat(6)
    x = (x.float() * 2.0 ** exponents[:, None]).bfloat16()
    x[0], x[7, 128:256] = 0, 0
    options = {"family": FAMILY[family], "swiglu": SWIGLU[family], "activations": "fp8"}
    wanted = reference_moe(x, ids, weights, w, **options)
    y = fused_moe(x, ids, weights, p)
    assert not y[0].any()
    for row in range(1, 24):
        assert relative_l2(y[row], wanted[row]) < 3e-2, row


@pytest.mark.parametrize(
    "shape",
    [("gpt_oss", 32, 2880, 2880, 4), ("deepseek_v4", 12, 512, 288, 6)],
    ids=lambda s: "-".join(map(str, s)),
)
def test_a_tokens_bytes_do_not_depend_on_its_batch(shape):
    """Nor on the size of segments, its place in one, or who else is there."""
    family, e, h, i, top_k = shape
    p = prepared(family, e, h, i)
    x, ids, weights = random_call(600, h, e, top_k)
    alone = fused_moe(x, ids, weights, p)
    g = torch.Generator().manual_seed(0)
    for case in range(60):
        most = (8, 64, 300)[case % 3]
        m = int(torch.randint(1, most + 1, (1,), generator=g))
        rows = torch.randperm(600, generator=g)[:m].to(CUDA)
        assert torch.equal(fused_moe(x[rows], ids[rows], weights[rows], p), alone[rows]), m


@pytest.mark.parametrize("segment", [8, 16])
def test_each_segment_at_any_number_of_tokens(segment):
    family, e, h, i, top_k = "gpt_oss", 8, 2880, 384, 4
    p = prepared(family, e, h, i)
    assert segment in segments(p.shape, Gemm8)
    compiled = launch.compiled(cut_layer(p.shape, segment, Gemm8), CUDA.index)
    for m in (1, 7, 50, 500):
        x, ids, weights = random_call(m, h, e, top_k, seed=m)
        needed = launch.workspace_parts(p.shape, m, top_k, Gemm8).end
        memory = torch.full((needed + 4096,), 255, dtype=torch.uint8, device=CUDA)
        out = torch.full_like(x, float("nan"))
        call = launch.Call(x, ids, weights, out, memory[:needed])
        launch.launch(compiled, m, top_k, call, p)
        assert torch.equal(out, fused_moe(x, ids, weights, p)), m
        assert (memory[needed:] == 255).all(), "it wrote beyond its workspace"


@pytest.mark.parametrize(("tokens", "top_k"), [(600, 4), (100, 64), (3, 64)])
def test_many_tokens_and_many_experts_a_token(tokens, top_k, monkeypatch):
    """In parts, in one workspace of the size that was asked for, whatever it holds."""
    e, h, i = 96, 256, 160
    p, w = prepared("gpt_oss", e, h, i), random_layer("gpt_oss", e, h, i)
    call = random_call(tokens, h, e, top_k)
    needed = workspace_bytes(p, tokens, top_k)
    memory = torch.full((needed + 4096,), 255, dtype=torch.uint8, device=CUDA)
    y = fused_moe(*call, p, workspace=memory[:needed])
    assert (memory[needed:] == 255).all(), "it wrote beyond its workspace"
    wanted, uncertainty = expected(call, w, "gpt_oss", monkeypatch)
    assert relative_l2(y, wanted) < 3e-3 + 1.5 * uncertainty


def test_native8_runs_either():
    """Each at its numbers of tokens, on one copy of the weights and with the same bytes."""
    shape, top_k = ("gpt_oss", 8, 2880, 384), 4
    both, few, many = (prepared(*shape, kernel=name) for name in ("native8", "narrow8", "wide8"))
    most = Native8Kernel()._narrow_tokens(both, top_k)
    assert most >= 1
    for m in (1, most, most + 1, 300):
        call = random_call(m, 2880, 8, top_k, seed=m)
        one = few if m <= most else many
        assert torch.equal(fused_moe(*call, both), fused_moe(*call, one)), m
