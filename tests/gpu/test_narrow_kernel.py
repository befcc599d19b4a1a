"""The narrow kernel on a Hopper GPU: numbers against the float32 reference, and what it promises of
bytes.
"""

import pytest
import torch

from hopper_mxfp4 import fused_moe, prepare_experts, reference_moe, restore_weights
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
    ids[::7, 0] = -1  # masked ids
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


def test_tokens_of_any_magnitude():
    """x goes into the tensor cores multiplied by a power of two of its own for each token."""
    w = random_layer("gpt_oss", 8, 2880, 384)
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"], kernel="narrow")
    x, ids, weights = random_call(24, 2880, 8, 4)
    exponents = torch.tensor([-130, -100, -40, 0, 40, 100], device=CUDA).repeat(4)
    x = (x.double() * 2.0 ** exponents[:, None].double()).bfloat16()
    x[0], x[7, 5] = 0, 2.0**120
    options = {"family": FAMILY["gpt_oss"], "swiglu": SWIGLU["gpt_oss"]}
    wanted = reference_moe(x, ids, weights, restore_weights(p), **options)
    y = fused_moe(x, ids, weights, p)
    for row in range(24):
        assert relative_l2(y[row], wanted[row]) < 6e-3
