"""GPT-OSS-20B's and DeepSeek-V4-Flash's own layers inside SGLang's FusedMoE on a Hopper GPU.

Numbers, CUDA graphs and reload.
"""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, ExpertWeights, SwiGLU, reference_moe

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)
if find_spec("torchvision") is None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "sglang" / "stand_ins"))

SIZES = {
    "gpt_oss": (2880, 2880, 32, 4),
    "deepseek_v4": (4096, 2048, 256, 6),
}  # hidden, intermediate, experts, top-k
FAMILY = {"gpt_oss": GPT_OSS, "deepseek_v4": DEEPSEEK_V4}
SWIGLU = {"gpt_oss": SwiGLU(1.702, 1.0, 7.0), "deepseek_v4": SwiGLU(1.0, 0.0, 10.0)}


@pytest.fixture(scope="module")
def sglang():
    """SGLang's Python alone.

    Told at import that there is no GPU, it asks for none of its compiled kernels, and these tests
    use none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        import hopper_mxfp4_sglang
        import sglang_ranks

        hopper_mxfp4_sglang.install()
    sglang_ranks.DEVICE = torch.device("cuda")
    return sglang_ranks


@pytest.fixture(scope="module", params=list(SIZES))
def layer(request, sglang):
    """(family, rank, SGLang's layer, its checkpoint tensors' names there)"""
    from hopper_mxfp4_sglang.layer import MoEMethod

    hidden, intermediate, experts, top_k = SIZES[request.param]
    rank = sglang.Rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOPPER_MXFP4", "on")
        make = sglang.gpt_oss_experts if request.param == "gpt_oss" else sglang.deepseek_experts
        made = make(rank, hidden, intermediate, experts, top_k)
    assert type(made.quant_method) is MoEMethod
    assert made.quant_method.kernel.name in ("native", "flashinfer")
    yield request.param, rank, made, made.quant_method.parameters
    del made
    torch.cuda.empty_cache()


def load(sglang, layer, seed):
    """Random weights through SGLang's loader, one tensor or one expert at a time.

    Returns them as the checkpoint has them.
    """
    family, rank, experts, names = layer
    hidden, intermediate, e, _ = SIZES[family]
    g = torch.Generator("cuda").manual_seed(seed)

    def random(*shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=g, device="cuda", dtype=torch.uint8)

    w = ExpertWeights(
        w13=random(e, 2 * intermediate, hidden // 2),
        w2=random(e, hidden, intermediate // 2),
        w13_scale=random(e, 2 * intermediate, hidden // 32, low=118, high=122),
        w2_scale=random(e, hidden, intermediate // 32, low=118, high=122),
        w13_bias=torch.randn(e, 2 * intermediate, generator=g, device="cuda").bfloat16()
        if FAMILY[family].bias
        else None,
        w2_bias=torch.randn(e, hidden, generator=g, device="cuda").bfloat16()
        if FAMILY[family].bias
        else None,
    )
    with rank:
        for field, tensor in w.tensors().items():
            param = getattr(experts, names[field])
            if family == "gpt_oss":
                param.weight_loader(
                    param, tensor, weight_name=names[field], shard_id=None, expert_id=None
                )
                continue
            tensor = tensor.view(torch.float8_e8m0fnu if field.endswith("scale") else torch.int8)
            for expert in range(e):
                parts = (
                    {"w2": tensor[expert]}
                    if field.startswith("w2")
                    else dict(zip(("w1", "w3"), tensor[expert].chunk(2), strict=True))
                )
                for shard, part in parts.items():
                    param.weight_loader(
                        param, part, weight_name=names[field], shard_id=shard, expert_id=expert
                    )
    sglang.prepare(rank, experts)
    return w


def call(layer, m, seed=0):
    from layers import random_call

    hidden, _, experts, top_k = SIZES[layer[0]]
    x, ids, weights = random_call(m, hidden, experts, top_k, seed)
    return (
        x,
        ids,
        weights * (1.5 if layer[0] == "deepseek_v4" else 1.0),
    )  # the routed scaling factor, which SGLang's top-k puts there


def relative_l2(layer, y, inputs, w):
    wanted = reference_moe(*inputs, w, family=FAMILY[layer[0]], swiglu=SWIGLU[layer[0]])
    return ((y.float() - wanted).norm() / wanted.norm()).item()


def test_numbers(sglang, layer, record_property):
    _, rank, experts, _ = layer
    w = load(sglang, layer, seed=0)
    assert experts.should_fuse_routed_scaling_factor_in_topk
    for m in (1, 16, 256):
        inputs = call(layer, m)
        error = relative_l2(layer, sglang.run(rank, experts, *inputs), inputs, w)
        record_property(f"relative_l2_at_{m}", error)
        assert error < 5e-3
    x, ids, weights = call(layer, 16)
    assert sglang.run(rank, experts, x[:0], ids[:0], weights[:0]).shape == (0, x.shape[1])
    ids[3] = -1
    weights[3] = math.nan
    assert not sglang.run(rank, experts, x, ids, weights)[3].any()


def test_a_captured_graph_runs_the_reloaded_weights(sglang, layer, record_property):
    """As SGLang updates weights from 0.5.21 on: restore, load, prepare.

    And as it did before: straight over.
    """
    _, rank, experts, _ = layer
    load(sglang, layer, seed=0)
    addresses = {name: p.data_ptr() for name, p in experts.named_parameters()}
    inputs = call(layer, 16)
    sglang.run(rank, experts, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sglang.run(rank, experts, *inputs)
    for seed, restored in ((1, True), (2, False), (3, True)):
        if restored:
            sglang.restore(rank, experts)
        w = load(sglang, layer, seed)
        assert {name: p.data_ptr() for name, p in experts.named_parameters()} == addresses
        with torch.inference_mode():
            y.fill_(math.nan)
        graph.replay()
        error = relative_l2(layer, y, inputs, w)
        record_property(f"relative_l2_reload_{seed}", error)
        assert error < 5e-3


def test_memory_of_a_reload(sglang, layer, record_property):
    """Restoring and preparing again go a few experts at a time."""
    _, rank, experts, _ = layer
    load(sglang, layer, seed=0)
    layer_bytes = sum(p.nbytes for p in experts.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sglang.restore(rank, experts)
    sglang.prepare(rank, experts)
    extra = torch.cuda.max_memory_allocated() - before
    record_property("layer_mib", layer_bytes / 2**20)
    record_property("extra_mib", extra / 2**20)
    assert extra <= layer_bytes / 4 + (256 << 20)
