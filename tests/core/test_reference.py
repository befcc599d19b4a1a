"""`reference_moe` against other people's code and formulas, on weights dequantised by this suite's
own dequantiser.
"""

import copy

import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, SwiGLU, reference_moe
from hopper_mxfp4.kernels.reference import moe as reference
from random_layers import (
    ALL_SCALES,
    FAMILIES,
    FAMILY_IDS,
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    clone,
    dequantize,
    random_weights,
)

GPT_OSS_ACT = SwiGLU(1.702, 1.0, 7.0)


def route(
    tokens: int, experts: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = (
        torch.rand(tokens, experts, generator=generator).softmax(dim=1).topk(top_k, dim=1)
    )
    return ids, weights / weights.sum(dim=1, keepdim=True)


def inputs(tokens: int, hidden: int, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    return scale * torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def assert_close(seen: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Relative to the size of the whole, since single elements may cancel to nothing."""
    assert (seen.shape, seen.dtype) == (wanted.shape, torch.float32)
    error = (seen.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("scale_dtype", "weight_dtype"),
    [(torch.uint8, torch.uint8), (torch.float8_e8m0fnu, torch.int8), (torch.float32, torch.uint8)],
    ids=str,
)
def test_gpt_oss_as_transformers_computes_it(scale_dtype, weight_dtype, dtype) -> None:
    """GptOssExperts of transformers, in float32; x large enough that the clamp at 7 matters."""
    modeling = pytest.importorskip(
        "transformers.models.gpt_oss.modeling_gpt_oss", reason="transformers is the oracle"
    )
    from transformers import GptOssConfig

    config = GptOssConfig(
        hidden_size=192, intermediate_size=96, num_local_experts=6, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    w = random_weights(GPT_OSS, 6, 192, 96, scale_dtype=scale_dtype, weight_dtype=weight_dtype)
    experts = modeling.GptOssExperts(config)
    values = {
        "gate_up_proj": dequantize(w.w13, w.w13_scale).transpose(1, 2),
        "gate_up_proj_bias": w.w13_bias.float(),
        "down_proj": dequantize(w.w2, w.w2_scale).transpose(1, 2),
        "down_proj_bias": w.w2_bias.float(),
    }
    experts.load_state_dict(values)
    x = inputs(50, 192).to(dtype)
    ids, weights = route(50, 6, 3)
    with torch.no_grad():
        wanted = experts(x.float(), ids, weights)
    swiglu = SwiGLU.from_config(config)
    assert swiglu == GPT_OSS_ACT
    seen = reference_moe(x, ids.int(), weights, w, family=GPT_OSS, swiglu=swiglu)
    assert_close(seen, wanted)
    unclamped = reference_moe(x, ids, weights, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, None))
    assert (unclamped - wanted).norm() / wanted.norm() > 1e-3, "these inputs never reach the clamp"


def dense_deepseek(x, ids, weights, w, limit: float | None) -> torch.Tensor:
    """DeepSeek-V4's experts, each on every token, in float64."""
    w13, w2 = dequantize(w.w13, w.w13_scale).double(), dequantize(w.w2, w.w2_scale).double()
    gate, up = torch.einsum("mh,erh->emr", x.double(), w13).chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    each = torch.einsum("emi,ehi->emh", torch.nn.functional.silu(gate) * up, w2)
    share = torch.zeros(len(w13), len(x), dtype=torch.double)
    for m in range(len(x)):
        for e, weight in zip(ids[m].tolist(), weights[m].tolist(), strict=True):
            share[e, m] += weight
    return torch.einsum("em,emh->mh", share, each)


@pytest.mark.parametrize("limit", [10.0, None])
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
def test_deepseek_v4_as_the_formula_says(weight_dtype, limit) -> None:
    w = random_weights(
        DEEPSEEK_V4, 5, 160, 224, weight_dtype=weight_dtype, scale_dtype=torch.float8_e8m0fnu
    )
    x = inputs(40, 160, scale=2.0)
    ids, weights = route(40, 5, 4)
    seen = reference_moe(x, ids, weights, w, family=DEEPSEEK_V4, swiglu=SwiGLU(limit=limit))
    assert_close(seen, dense_deepseek(x, ids, weights, w, limit))
    other = dense_deepseek(x, ids, weights, w, None if limit else 10.0)
    assert (seen - other).norm() / other.norm() > 1e-3, "these inputs never reach the clamp"


def test_deepseek_v4_as_transformers_computes_it() -> None:
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers is the oracle"
    )
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=128, moe_intermediate_size=96, n_routed_experts=4)
    config._experts_implementation = "eager"
    experts = modeling.DeepseekV4Experts(config)
    e, rows, h = experts.gate_up_proj.shape
    w = random_weights(DEEPSEEK_V4, e, h, rows // 2)
    experts.load_state_dict(
        {"gate_up_proj": dequantize(w.w13, w.w13_scale), "down_proj": dequantize(w.w2, w.w2_scale)}
    )
    x = inputs(30, h, scale=2.0)
    ids, weights = route(30, e, 3)
    with torch.no_grad():
        wanted = experts(x, ids, weights)
    assert_close(
        reference_moe(x, ids, weights, w, family=DEEPSEEK_V4, swiglu=SwiGLU.from_config(config)),
        wanted,
    )


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_every_scale_and_code_dequantises_exactly(scale_dtype) -> None:
    """All 256 weight bytes under all 255 scales, 2**-127 (a subnormal) and 2**127 included; float32
    ends before 2 * 2**127.
    """
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 16, 1).contiguous()
    weight = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    seen = reference.dequantize(weight, scales)
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for byte in (0, 1, 2, 126, 127, 128, 252, 253, 254):
        for code_byte in range(256):
            for place, code in enumerate((code_byte & 15, code_byte >> 4)):
                exact = magnitudes[code & 7] * 2.0 ** (byte - 127)  # a Python float has the range
                exact = -exact if code & 8 else exact
                wanted = exact if abs(exact) < 2.0**128 else float("inf") * (1 if exact > 0 else -1)
                assert seen[byte, code_byte // 16, 2 * (code_byte % 16) + place].item() == wanted
    assert torch.equal(seen, dequantize(weight, scales))
    # Through the whole weights, with scales as the checkpoint holds them: expert 0 as an identity
    # of known values.
    w = random_weights(DEEPSEEK_V4, 2, 32, 32, scale_dtype=scale_dtype, scales=ALL_SCALES)
    expert = reference.dequantize_expert(w, 1, DEEPSEEK_V4)
    assert torch.equal(torch.cat((expert.gate, expert.up)), dequantize(w.w13, w.w13_scale)[1])
    assert torch.equal(expert.down, dequantize(w.w2, w.w2_scale)[1])


@pytest.mark.parametrize("byte", [0, 254])
def test_extreme_scales_reach_the_result(byte) -> None:
    """2**-127 in w13, where float32's subnormals must not be flushed, and 2**127 in w2, each undone
    by the rest of the layer.
    """
    w = random_weights(DEEPSEEK_V4, 1, 32, 32)
    w.w13.fill_(0x11 if byte == 0 else 0x22)  # all 0.5 or all 1
    w.w2.fill_(0x22)
    w.w13_scale.fill_(byte if byte == 0 else 127 - 64)
    w.w2_scale.fill_(127 if byte == 0 else byte)
    x = torch.full((1, 32), 2.0**124 if byte == 0 else 1.0)
    seen = reference_moe(
        x,
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        w,
        family=DEEPSEEK_V4,
        swiglu=SwiGLU(),
    )
    g = torch.tensor(32 * 0.5 * 2.0**-3 if byte == 0 else 32 * 2.0**-64, dtype=torch.double)
    wanted = 32 * g * torch.sigmoid(g) * g * (1.0 if byte == 0 else 2.0**127)
    assert torch.allclose(seen.double(), wanted.expand(1, 32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_tokens_taken_in_parts_give_the_same(family, monkeypatch) -> None:
    """Most experts get more tokens than a part holds, some of them twice in one row."""
    w = random_weights(family, 3, 96, 64)
    x = inputs(37, 96)
    generator = torch.Generator().manual_seed(3)
    ids, weights = (
        torch.randint(-1, 4, (37, 4), generator=generator),
        torch.rand(37, 4, generator=generator),
    )
    whole = reference_moe(x, ids, weights, w, family=family, swiglu=GPT_OSS_ACT)
    widest = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(reference, "_ROWS", 5)
    monkeypatch.setattr(
        reference, "_linear", lambda x, *rest: widest.append(len(x)) or linear(x, *rest)
    )
    parts = reference_moe(x, ids, weights, w, family=family, swiglu=GPT_OSS_ACT)
    assert max(widest) == 5
    assert sum(widest) == 3 * ((ids >= 0) & (ids < 3)).sum()
    assert_close(parts, whole)


def test_products_stay_in_float32(monkeypatch) -> None:
    """vLLM and SGLang may allow TF32 for the process; the reference must neither use it nor change
    the setting.
    """
    w = random_weights(DEEPSEEK_V4, 1, 32, 32)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        reference,
        "_linear",
        lambda *args: seen.append(torch.get_float32_matmul_precision()) or linear(*args),
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        call = (inputs(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
        reference_moe(*call, w, family=DEEPSEEK_V4, swiglu=SwiGLU())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 3


def test_masked_ids_and_unused_experts_are_never_read(monkeypatch) -> None:
    """Ids outside 0..E-1 add nothing, and an expert that no token asks for is not dequantised."""
    w = random_weights(DEEPSEEK_V4, 4, 64, 32)
    asked = []
    dequantize_expert = reference.dequantize_expert
    monkeypatch.setattr(
        reference,
        "dequantize_expert",
        lambda w, e, family: asked.append(e) or dequantize_expert(w, e, family),
    )
    x = inputs(3, 64)
    ids = torch.tensor([[2, -1], [4, -5], [2**40, 2]])
    weights = torch.tensor([[0.5, float("nan")], [float("nan"), float("inf")], [float("nan"), 2.0]])
    seen = reference_moe(x, ids, weights, w, family=DEEPSEEK_V4, swiglu=SwiGLU())
    assert asked == [2]
    assert not seen[1].any()
    # The same two tokens in both calls: a CPU's product of two rows need not round as one of three.
    plain = torch.tensor([[2], [2]]), torch.ones(2, 1)
    alone = reference_moe(x[[0, 2]], *plain, w, family=DEEPSEEK_V4, swiglu=SwiGLU())
    assert torch.allclose(seen[0], 0.5 * alone[0])
    assert torch.allclose(seen[2], 2.0 * alone[1])


def test_the_reference_changes_nothing() -> None:
    w = random_weights(GPT_OSS, 2, 64, 32)
    x = inputs(5, 64)
    ids, weights = route(5, 2, 2)
    call = (x, ids, weights, *w.tensors().values())
    before = copy.deepcopy(call)
    reference_moe(x, ids, weights, clone(w), family=GPT_OSS, swiglu=GPT_OSS_ACT)
    reference_moe(x, ids, weights, w, family=GPT_OSS, swiglu=GPT_OSS_ACT)
    for seen, wanted in zip(call, before, strict=True):
        assert torch.equal(seen, wanted)


def test_the_reference_refuses_bad_weights() -> None:
    w = random_weights(GPT_OSS, 2, 64, 32)
    w.w2_scale[1, 3, 0] = 255
    with pytest.raises(ValueError, match=r"w2_scale\[1, 3, 0\] is 255"):
        reference_moe(inputs(1, 64), *route(1, 2, 1), w, family=GPT_OSS, swiglu=GPT_OSS_ACT)
