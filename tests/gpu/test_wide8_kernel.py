"""The wide8 kernel on a Hopper GPU: numbers against the float32 reference with fp8 activations."""

from dataclasses import replace

import pytest
import torch

from hopper_mxfp4 import fused_moe, prepare_experts, reference_moe
from hopper_mxfp4.kernels.reference import moe as reference
from hopper_mxfp4.kernels.wide import launch
from hopper_mxfp4.kernels.wide8.tiling import cut_layer
from hopper_mxfp4.run import workspace_bytes
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
    ("gpt_oss", 8, 2880, 192, 4),
    ("deepseek_v4", 64, 4096, 2048, 6),
    ("deepseek_v4", 16, 4096, 256, 6),
    ("deepseek_v4", 16, 512, 576, 8),
    ("deepseek_v4", 12, 512, 288, 6),
    ("gpt_oss", 3, 32, 32, 2),
    ("deepseek_v4", 1024, 160, 96, 8),
]
# Of the tensor cores' sums, relative to a token's: they add fewer bits than float32 has. It moves a
# value that is next to a tie of e4m3 to its other side.
NOISE = 2e-4
FEW_TOKENS = 64


def prepared(family, e, h, i, **options):
    w = random_layer(family, e, h, i, **options)
    return prepare_experts(
        w, family=FAMILY[family], swiglu=SWIGLU[family], kernel="wide8", activations="fp8"
    )


def expected(call, w, family, monkeypatch, draws=None):
    """The reference's output, and how far it moves at most where fc1's results are as uncertain as
    the tensor cores make them.

    Of a few tokens a single value on the other side of a tie decides, so more draws are made.
    """
    draws = draws or (1 if len(call[0]) > FEW_TOKENS else 12)
    g = torch.Generator(CUDA).manual_seed(0)
    options = {"family": FAMILY[family], "swiglu": SWIGLU[family], "activations": "fp8"}
    wanted = reference_moe(*call, w, **options)
    quantise, calls = reference.quantise, [0]

    def uncertain(x):
        calls[0] += 1
        if calls[0] % 2:  # x itself; fc1's result comes next
            return quantise(x)
        noise = torch.randn(x.shape, generator=g, device=x.device)
        return quantise(x + NOISE * x.square().mean(-1, keepdim=True).sqrt() * noise)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "quantise", uncertain)
        moved = [reference_moe(*call, w, **options) for _ in range(draws)]
    return wanted, max(relative_l2(each, wanted) for each in moved)


def worst_error(shape, w, p, monkeypatch, most):
    """Of calls of up to so many tokens, the largest relative L2; each is held to its bound."""
    family, e, h, _, top_k = shape
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for case, m in enumerate((1, 2, 5, 17, 130, 384, *torch.randint(1, most, (6,), generator=g))):
        x, ids, weights = random_call(int(m), h, e, top_k, seed=case)
        if case % 3 == 1:
            x = heavy_tailed(x, seed=case)
        if case % 3 == 2:
            x[:, 7] = 1000
        if m > 9:
            ids = with_masked_ids(ids)
        wanted, uncertainty = expected((x, ids, weights), w, family, monkeypatch)
        y = fused_moe(x, ids.long() if case % 2 else ids, weights, p)
        ours = relative_l2(y, wanted)
        # Of a few tokens, one large value that crosses where none of the draws did counts as much
        # as all the others.
        times = 1.5 if m > FEW_TOKENS else 3
        assert ours <= 3e-3 + times * uncertainty, (m, ours, uncertainty)
        worst = max(worst, ours)
        if m > 9:
            assert not y[5].any()
    return worst


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_errors(shape, record_property, monkeypatch):
    w, p = random_layer(*shape[:4]), prepared(*shape[:4])
    assert restored_is(p, w)
    record_property("worst_relative_l2", worst_error(shape, w, p, monkeypatch, most=900))


def with_scales_over_27_octaves(family, e, h, i, kernel):
    """A layer's weights, and as that kernel has them."""
    w = random_layer(family, e, h, i)
    g = torch.Generator(CUDA).manual_seed(1)
    for name in ("w13_scale", "w2_scale"):
        scale = getattr(w, name)
        base = torch.randint(90, 100, (*scale.shape[:2], 1), generator=g, device=CUDA)
        spread = torch.randint(0, 27, scale.shape, generator=g, device=CUDA)
        spread[..., 0], spread[..., 1] = 0, 26
        scale.copy_((base + spread).byte())
    p = prepare_experts(
        replace(w, **{name: t.clone() for name, t in w.tensors().items()}),
        family=FAMILY[family],
        swiglu=SWIGLU[family],
        kernel=kernel,
        activations="fp8",
    )
    return w, p


def test_scales_over_27_octaves_in_a_row(monkeypatch):
    family, e, h, i, top_k = "deepseek_v4", 8, 512, 288, 4
    w, p = with_scales_over_27_octaves(family, e, h, i, "wide8")
    call = random_call(200, h, e, top_k)
    wanted, uncertainty = expected(call, w, family, monkeypatch)
    assert relative_l2(fused_moe(*call, p), wanted) <= 5e-3 + 1.5 * uncertainty


@pytest.mark.parametrize(
    "shape",
    [("gpt_oss", 32, 2880, 2880, 4), ("deepseek_v4", 12, 512, 288, 6)],
    ids=lambda s: "-".join(map(str, s)),
)
def test_a_tokens_bytes_do_not_depend_on_its_batch(shape):
    """Nor on the cut: widths of tiles, the place in one and who else is there change, the order of
    sums does not.
    """
    family, e, h, i, top_k = shape
    p = prepared(family, e, h, i)
    x, ids, weights = random_call(3000, h, e, top_k)
    alone = fused_moe(x, ids, weights, p)
    g = torch.Generator().manual_seed(0)
    for m in (1, 2, 15, 63, 64, 65, 200, 511, 1000, 2048):
        rows = torch.randperm(3000, generator=g)[:m].to(CUDA)
        assert torch.equal(fused_moe(x[rows], ids[rows], weights[rows], p), alone[rows]), m


@pytest.mark.parametrize("cut", [0, 1], ids=["few", "many"])
def test_each_cut_at_any_number_of_tokens(cut):
    family, e, h, i, top_k = "gpt_oss", 8, 2880, 384, 4
    p = prepared(family, e, h, i)
    compiled = launch.compiled(cut_layer(p.shape)[cut], CUDA.index)
    for m in (1, 7, 50, 500, 1500):
        x, ids, weights = random_call(m, h, e, top_k, seed=m)
        needed = launch.workspace_parts(compiled.tiling, m, top_k).end
        memory = torch.full((needed + 4096,), 255, dtype=torch.uint8, device=CUDA)
        out = torch.full_like(x, float("nan"))
        call = launch.Call(x, ids, weights, out, memory[:needed])
        launch.launch(compiled, m, top_k, call, p)
        assert torch.equal(out, fused_moe(x, ids, weights, p)), m
        assert (memory[needed:] == 255).all(), "it wrote beyond its workspace"


@pytest.mark.parametrize(("tokens", "top_k"), [(16384, 4), (20000, 4), (1500, 64), (3, 64)])
def test_many_tokens_and_many_experts_a_token(tokens, top_k, monkeypatch):
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
    call = x[some], ids[some], weights[some]
    wanted, uncertainty = expected(call, w, "gpt_oss", monkeypatch)
    assert relative_l2(y[some], wanted) < 3e-3 + 1.5 * uncertainty
