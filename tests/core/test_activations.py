"""8-bit activations: what `reference_moe` computes with them, against a slow second statement of
it, and how they are asked for.
"""

import numpy as np
import pytest
import torch

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    allocate_weights,
    env,
    fused_moe,
    prepare_experts,
    reference_moe,
)
from hopper_mxfp4.kernels.reference.moe import quantise
from hopper_mxfp4.kernels.select import choose_kernel
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.registry import kernels
from random_layers import FAMILIES, FAMILY_IDS, clone, dequantize, random_weights

SWIGLU = {"gpt_oss": SwiGLU(1.702, 1.0, 7.0), "deepseek_v4": SwiGLU(1.0, 0.0, 10.0)}
CPU = torch.device("cpu")

# e4m3 by its definition (OCP 8-bit floating point, revision 1.0): bias 7, three bits of mantissa,
# 448 the largest; in the order of their bytes, so that even places have even mantissas.
E4M3 = np.array(
    [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ][:-1]
)


def nearest_e4m3(value: float) -> float:
    """Ties to even."""
    distance = np.abs(E4M3 - abs(value))
    best = np.flatnonzero(distance == distance.min())
    return float(np.sign(value) * E4M3[best[best % 2 == 0][0] if len(best) > 1 else best[0]])


def slowly_quantised(row: np.ndarray) -> np.ndarray:
    out = []
    for start in range(0, len(row), 128):
        group = row[start : start + 128].astype(np.float32)
        scale = np.float32(np.abs(group).max()) * np.float32(1 / 448)
        out += [
            np.float32(nearest_e4m3(float(np.float32(v) / scale))) * scale
            if scale
            else np.float32(0)
            for v in group
        ]
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("k", [32, 128, 288, 2880])
def test_groups_of_128_are_quantised(k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(5, k, generator=g)
    x[1] *= torch.exp(3 * torch.randn(k, generator=g))
    x[2, 7] = 1000
    x[3] = x[3].bfloat16().float()
    x[3, 0] = 3.5  # its scale is a power of two: many ties
    x[4, :32] = 0
    wanted = np.stack([slowly_quantised(row.numpy()) for row in x])
    assert np.array_equal(quantise(x).numpy(), wanted)


def test_zeros_nan_and_infinity():
    x = torch.ones(4, 256)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 200] = -float("inf")
    q = quantise(x)
    assert torch.equal(q[0], x[0])
    assert q[1, :128].isnan().all()
    assert q[2, 200].isnan()
    for row, group in ((1, slice(128, None)), (2, slice(128)), (3, slice(None))):
        assert torch.equal(q[row, group], torch.ones_like(q[row, group]))


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_both_inputs_are_quantised(family):
    """Token by token in float64, on this suite's own dequantised weights."""
    w = random_weights(family, 3, 288, 160)
    swiglu = SWIGLU[family.name]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 288, generator=g).bfloat16()
    ids = torch.tensor([[0, 1], [2, 2], [1, -1], [0, 2], [2, 1], [1, 0]])
    weights = torch.rand(6, 2, generator=g)
    w13, w2 = dequantize(w.w13, w.w13_scale).double(), dequantize(w.w2, w.w2_scale).double()
    wanted = torch.zeros(6, 288, dtype=torch.double)
    for token in range(6):
        q = torch.from_numpy(slowly_quantised(x[token].float().numpy())).double()
        for choice in range(2):
            e = int(ids[token, choice])
            if e < 0:
                continue
            rows = w13[e] @ q
            if family.bias:
                rows += w.w13_bias[e].double()
            gate, up = (rows[0::2], rows[1::2]) if family.rows == "interleaved" else rows.chunk(2)
            h = swiglu(gate.float(), up.float()).numpy()
            y = w2[e] @ torch.from_numpy(slowly_quantised(h)).double()
            if family.bias:
                y += w.w2_bias[e].double()
            wanted[token] += weights[token, choice].double() * y
    options = {"family": family, "swiglu": swiglu}
    seen = reference_moe(x, ids, weights, w, activations="fp8", **options).double()
    # Float32 and float64 may round a value near a tie of e4m3 to different sides.
    assert (seen - wanted).norm() < 1e-3 * wanted.norm()
    full = reference_moe(x, ids, weights, w, **options).double()
    assert 5e-3 < (seen - full).norm() / full.norm() < 8e-2


def test_the_reference_refuses_others():
    w = random_weights(GPT_OSS, 2, 32, 32)
    call = torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    with pytest.raises(ValueError, match="activations is 'int8'; give 'bf16' or 'fp8'"):
        reference_moe(*call, w, family=GPT_OSS, swiglu=SwiGLU(), activations="int8")


# ---- How they are asked for ---------------------------------------------------------------------


def prepared(**options):
    w = random_weights(DEEPSEEK_V4, 2, 160, 96)
    return w, prepare_experts(clone(w), family=DEEPSEEK_V4, swiglu=SwiGLU(), **options)


def test_bf16_unless_asked(monkeypatch):
    assert prepared()[1].activations == "bf16"
    monkeypatch.setenv(env.ACTIVATIONS.name, "fp8")
    assert prepared()[1].activations == "fp8"
    assert prepared(activations="bf16")[1].activations == "bf16"
    monkeypatch.setenv(env.ACTIVATIONS.name, "auto")  # there is no framework
    assert prepared()[1].activations == "bf16"
    monkeypatch.setenv(env.ACTIVATIONS.name, "fp4")
    with pytest.raises(ValueError, match="'fp4' is not one of auto, bf16, fp8"):
        prepared()
    with pytest.raises(ValueError, match="activations is 'fp4'; give 'bf16' or 'fp8'"):
        prepared(activations="fp4")


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_the_reference_kernel_does_as_asked(activations):
    w, p = prepared(activations=activations)
    x = torch.randn(5, 160).bfloat16()
    ids, weights = torch.randint(0, 2, (5, 2)), torch.rand(5, 2)
    wanted = reference_moe(
        x, ids, weights, w, family=DEEPSEEK_V4, swiglu=SwiGLU(), activations=activations
    )
    assert torch.equal(fused_moe(x, ids, weights, p), wanted.bfloat16())


def test_every_kernel_says_what_it_does():
    assert {name: sorted(kernel.activations) for name, kernel in kernels().items()} == {
        "native": ["bf16"],
        "narrow": ["bf16"],
        "wide": ["bf16"],
        "native8": ["fp8"],
        "narrow8": ["fp8"],
        "wide8": ["fp8"],
        "flashinfer": ["bf16"],
        "reference": ["bf16", "fp8"],
    }


@pytest.mark.parametrize(
    ("kernel", "activations", "does"), [("wide", "fp8", "bf16"), ("wide8", "bf16", "fp8")]
)
def test_a_kernel_is_asked_for_no_others(kernel, activations, does, monkeypatch):
    monkeypatch.setattr(WideKernel, "unsupported_reason", lambda *args: None)  # nor any other
    refusal = (
        f"kernel {kernel} can't run: it multiplies {does} activations, and {activations} ones are "
        f"to run here; set HOPPER_MXFP4_ACTIVATIONS={does}, or name no kernel"
    )
    shape = LayerShape(2, 160, 96)
    with pytest.raises(KernelUnavailable, match=refusal):
        choose_kernel(kernel, shape, CPU, activations=activations)
    with pytest.raises(KernelUnavailable, match=refusal):
        prepared(kernel=kernel, activations=activations)
    with pytest.raises(KernelUnavailable, match=refusal):
        prepared(kernel=kernels()[kernel], activations=activations)
    with pytest.raises(KernelUnavailable, match=refusal):
        allocate_weights(shape, family=GPT_OSS, device=CPU, kernel=kernel, activations=activations)
    assert choose_kernel(kernel, shape, CPU, activations=does).name == kernel
