"""DeepSeek-V4-Flash's own layer inside vLLM's RoutedExperts on a Hopper GPU.

Numbers, CUDA graphs and reload.
"""

import math

import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, ExpertWeights, SwiGLU, env, reference_moe

pytest.importorskip("vllm", reason="vLLM is not installed")

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4096, 2048, 256, 6
PARAMETERS = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
# What the checkpoint declares, and vLLM runs by default, is fp8. There near a tie of e4m3 a value
# may go either way.
ACTIVATIONS = {"native": "bf16", "flashinfer": "bf16", "native8": "fp8"}
BOUND = {"bf16": 5e-3, "fp8": 1e-2}


@pytest.fixture(scope="module", params=ACTIVATIONS)
def layer(request, tmp_path_factory):
    from hopper_mxfp4_vllm.layer import DeepseekV4Method
    from models import Rank, configure, deepseek_v4_moe, experts_of, write_deepseek_v4_config

    sizes = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    folder = write_deepseek_v4_config(tmp_path_factory.mktemp("deepseek"), **sizes)
    with pytest.MonkeyPatch.context() as patch:
        # Whatever the shell has set: with `auto` a layer that is declined would quietly stay stock,
        # with `on` vLLM stops with the reason.
        patch.setenv(env.MODE.name, "on")
        patch.setenv(env.KERNEL.name, request.param)
        patch.setenv(env.ACTIVATIONS.name, ACTIVATIONS[request.param])
        rank = Rank(configure(folder))
        experts = experts_of(deepseek_v4_moe(rank))
    method = experts.quant_method
    assert isinstance(method, DeepseekV4Method), (
        f"{type(rank.config.quant_config).__name__}, the config that vLLM made, gave the layer "
        f"{type(method).__name__} although {env.MODE.name}=on takes over or stops; see above for "
        "lines of hopper-mxfp4, and whether the plugin was loaded"
    )
    assert method.kernel.name == request.param
    assert method.activations == ACTIVATIONS[request.param]
    return rank, experts


def fill(experts, seed):
    """Random weights, as a loader leaves them; nothing is padded at these sizes.

    Returns the checkpoint's tensors.
    """
    g = torch.Generator("cuda").manual_seed(seed)
    for name in PARAMETERS:
        low, high = (118, 122) if name.endswith("scale") else (0, 256)
        param = getattr(experts, name)
        param.data.copy_(
            torch.randint(low, high, param.shape, generator=g, device="cuda", dtype=torch.uint8)
        )
    return ExpertWeights(*(getattr(experts, name).clone() for name in PARAMETERS))


def prepare(rank, experts):
    with rank:
        experts.quant_method.process_weights_after_loading(experts)


def call(m, seed=0):
    from layers import random_call

    x, ids, weights = random_call(m, HIDDEN, EXPERTS, TOP_K, seed)
    return x, ids, weights * 1.5  # the routed scaling factor, which vLLM's router puts there


def relative_l2(y, call, w, activations):
    wanted = reference_moe(
        *call, w, family=DEEPSEEK_V4, swiglu=SwiGLU(1.0, 0.0, 10.0), activations=activations
    )
    return ((y.float() - wanted).norm() / wanted.norm()).item()


def test_numbers(layer, record_property):
    from models import run

    rank, experts = layer
    activations = experts.quant_method.activations
    w = fill(experts, seed=0)
    prepare(rank, experts)
    for m in (1, 16, 256):
        inputs = call(m)
        error = relative_l2(run(rank, experts, *inputs), inputs, w, activations)
        record_property(f"relative_l2_at_{m}", error)
        assert error < BOUND[activations]


def test_a_captured_graph_runs_the_reloaded_weights(layer, record_property):
    from models import run

    rank, experts = layer
    activations = experts.quant_method.activations
    fill(experts, seed=0)
    prepare(rank, experts)
    x, ids, weights = call(16)
    addresses = [getattr(experts, name).data_ptr() for name in PARAMETERS]
    run(rank, experts, x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(rank, experts, x, ids, weights)
    for seed in (1, 2):
        w = fill(experts, seed)
        prepare(rank, experts)
        assert [getattr(experts, name).data_ptr() for name in PARAMETERS] == addresses
        with torch.inference_mode():  # vLLM made it so
            y.fill_(math.nan)
        graph.replay()
        error = relative_l2(y, (x, ids, weights), w, activations)
        record_property(f"relative_l2_reload_{seed}", error)
        assert error < BOUND[activations]
