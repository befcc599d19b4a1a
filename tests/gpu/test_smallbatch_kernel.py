"""The smallbatch kernel on a Hopper GPU: numbers against the float32 reference and the flashinfer
kernel.
"""

import pytest
import torch

from hopper_mxfp4 import fused_moe, prepare_experts, reference_moe
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
    ids[::7, 0] = -1  # masked ids
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
