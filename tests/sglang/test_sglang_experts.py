"""The layers inside SGLang, rank by rank, against `reference_moe`.

Blocks, loaders, dispatcher and top-k are SGLang's own.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import standard

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GENERIC,
    GPT_OSS,
    CheckpointFamily,
    ExpertWeights,
    SwiGLU,
    observe,
    reference_moe,
)
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.plugin import hookimpl
from hopper_mxfp4_sglang.hooks import prepare_updated
from hopper_mxfp4_sglang.layer import MoEMethod
from sglang_ranks import (
    DEEPSEEK_FACTOR,
    DEEPSEEK_LIMIT,
    DEVICE,
    GptOss,
    Rank,
    deepseek_experts,
    deepseek_quant_config,
    gpt_oss_config,
    gpt_oss_experts,
    prepare,
    restore,
    run,
)

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 2880, 4, 2, 9
CONFIG = gpt_oss_config(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)


def random_bytes(g, *shape, low=0, high=256):
    return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)


def gpt_oss_weights(seed=0):
    """GPT-OSS's intermediate size, whose shards are uneven.

    736, 736, 736 and 672 over four ranks; seven of 384 and one of 192 over eight.
    """
    g = torch.Generator().manual_seed(seed)
    e, h, i = EXPERTS, HIDDEN, INTERMEDIATE
    return ExpertWeights(
        w13=random_bytes(g, e, 2 * i, h // 2),
        w2=random_bytes(g, e, h, i // 2),
        w13_scale=random_bytes(g, e, 2 * i, h // 32, low=118, high=122),
        w2_scale=random_bytes(g, e, h, i // 32, low=118, high=122),
        w13_bias=torch.randn(e, 2 * i, generator=g).bfloat16(),
        w2_bias=torch.randn(e, h, generator=g).bfloat16(),
    )


CHECKPOINT_NAMES = {
    "w13": "gate_up_proj_blocks",
    "w2": "down_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w2_scale": "down_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2_bias": "down_proj_bias",
}


def gpt_oss_tensors(w, only=tuple(CHECKPOINT_NAMES)):
    """By the checkpoint's names and shapes."""
    for field in only:
        t = getattr(w, field).clone()
        yield (
            f"model.layers.0.mlp.experts.{CHECKPOINT_NAMES[field]}",
            t.unflatten(2, (-1, 16)) if field in ("w13", "w2") else t,
        )


def gpt_oss(rank, w):
    model = GptOss(rank, CONFIG)
    model.load_weights(gpt_oss_tensors(w))
    prepare(rank, model)
    return model


def calls(hidden, experts=EXPERTS, tokens=TOKENS, top_k=TOP_K, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).int()
    ids[2, 1] = ids[5] = -1  # padding, as SGLang marks it
    weights = torch.rand(tokens, top_k, generator=g)
    return torch.randn(tokens, hidden, generator=g).bfloat16(), ids, weights


def relative_l2(y, reference):
    return ((y.float() - reference).norm() / reference.norm()).item()


def addresses(experts):
    return {name: p.data_ptr() for name, p in experts.named_parameters()}


def gpt_oss_reference(w, call):
    return reference_moe(*call, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0))


@pytest.mark.parametrize(
    ("size", "expert_parallel"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
)
def test_gpt_oss_ranks_sum_to_the_reference(size, expert_parallel):
    w, call = gpt_oss_weights(), calls(HIDDEN)
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(size):
        rank = Rank(size, r, expert_parallel)
        experts = gpt_oss(rank, w).experts
        assert type(experts.quant_method) is MoEMethod
        part = run(rank, experts, *call)
        assert part.abs().max() > 0
        assert not part[5].any()
        total += part.float()
    assert relative_l2(total, gpt_oss_reference(w, call)) < 5e-3


def test_a_whole_block_routes_as_sglang_does():
    """Router, top-k and experts of SGLang's own block; its input is not written."""
    rank, w = Rank(), gpt_oss_weights()
    model = gpt_oss(rank, w)
    x = calls(HIDDEN)[0]
    before = x.clone()
    g = torch.Generator().manual_seed(1)
    with rank, torch.inference_mode():
        model.block.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=g))
        model.block.router.bias.copy_(torch.randn(EXPERTS, generator=g))
        logits = torch.nn.functional.linear(x, model.block.router.weight, model.block.router.bias)
        topk = model.block.topk(x, logits)
        y = model.experts(x, topk)
    weights, ids = logits.float().topk(TOP_K)
    assert torch.equal(topk.topk_ids.long().sort().values, ids.sort().values)
    assert relative_l2(y, gpt_oss_reference(w, (x, ids, weights.softmax(-1)))) < 5e-3
    assert torch.equal(x, before)


def test_no_token_and_nothing_but_padding():
    """What reaches a layer under DP attention, and what SGLang captures its CUDA graphs with."""
    rank = Rank()
    experts = gpt_oss(rank, gpt_oss_weights()).experts
    x, ids, weights = calls(HIDDEN)
    assert run(rank, experts, x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)
    assert not run(
        rank, experts, x, torch.full_like(ids, -1), torch.full_like(weights, float("nan"))
    ).any()


@pytest.fixture
def calls_seen():
    seen = []
    end = observe.watch(lambda p, call: seen.append(call))
    yield seen
    end()


def test_ids_reach_the_kernel_as_the_router_gave_them(calls_seen):
    """Under EP SGLang's dispatcher makes none of them local: the kernel does, by a map that stays
    where CUDA graphs have it, and that is right again after sleep.
    """
    w, call = gpt_oss_weights(), calls(HIDDEN)
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(2):
        rank = Rank(2, r, 2)
        model = gpt_oss(rank, w)
        run(rank, model.experts, *call)
        sleep_and_resume(model.experts)
        restore(rank, model)
        model.load_weights(gpt_oss_tensors(w))
        prepare(rank, model)
        total += run(rank, model.experts, *call).float()
        first, second = (seen.expert_map for seen in calls_seen[-2:])
        assert first.data_ptr() == second.data_ptr()
        assert second.tolist() == [[0, 1, 2, 3], [-2, -1, 0, 1]][r]
    assert all(seen.topk_ids is call[1] for seen in calls_seen)
    assert relative_l2(total, gpt_oss_reference(w, call)) < 5e-3


@pytest.mark.parametrize("global_ids", [False, True])
def test_sglang_goes_on_where_it_masks_padding_thereafter(global_ids, monkeypatch, calls_seen):
    """SGLANG_OPT_MASK_DP_PAD_MOE; under some backends ids stay global even so."""
    monkeypatch.setattr(standard, "_MASK_DP_PAD_MOE", True, raising=False)
    w, (x, ids, weights) = gpt_oss_weights(), calls(HIDDEN)
    ids = ids.clamp(min=0)  # older releases take -1 for the last expert
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(2):
        rank = Rank(2, r, 2)
        experts = gpt_oss(rank, w).experts
        if global_ids:
            experts.dispatcher.skip_local_expert_mapping = True
            with rank:
                experts.quant_method.process_weights_after_loading(experts)
        total += run(rank, experts, x, ids, weights).float()
        assert (calls_seen[-1].expert_map is not None) == global_ids
    assert relative_l2(total, gpt_oss_reference(w, (x, ids, weights))) < 5e-3


@pytest.mark.parametrize("backend", ["auto", "triton", "triton_kernel"])
def test_the_router_gives_standard_topk_whatever_the_backend(backend):
    """For GPT-OSS SGLang turns auto into triton_kernel, whose top-k format only that one reads."""
    rank = Rank(resolved={"moe_runner_backend": backend})
    model = GptOss(rank, CONFIG)
    assert type(model.experts.quant_method) is MoEMethod
    assert model.block.topk.topk_config.output_format.name == "STANDARD"


def test_piecewise_graphs():
    """SGLang compiles a model around its own opaque operator for the experts: traced without a
    break, whatever number of tokens, and what it gives is the layer's.
    """
    context = pytest.importorskip(
        "sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph.context_manager",
        reason="this SGLang has other piecewise graphs",
    )
    from sglang.srt.layers.moe.fused_moe_triton import layer as sglangs
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    operator = sglangs.moe_forward_piecewise_cuda_graph_impl
    if "__wrapped__" not in vars(operator):
        pytest.skip("this SGLang's operator has no function to register for a CPU")
    rank, w = Rank(), gpt_oss_weights()
    experts = gpt_oss(rank, w).experts
    graphs = []
    library = torch.library.Library("sglang", "FRAGMENT")  # SGLang registers it for a GPU alone
    library.impl(operator.__name__, operator.__wrapped__, "CPU")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def block(x, ids, weights):
        routed = StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=x)
        return experts(x * 2, routed) + x

    running = context.set_tc_piecewise_forward_context(None, [], None, [experts], [])
    with rank, torch.no_grad(), context.enable_tc_piecewise_cuda_graph(), running:
        for tokens in (TOKENS, 17):
            x, ids, weights = calls(HIDDEN, tokens=tokens)
            y = block(x, ids, weights)
            wanted = gpt_oss_reference(w, (x * 2, ids, weights)) + x
            assert relative_l2(y, wanted) < 5e-3
    assert len(graphs) == 1
    operators = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("moe_forward_piecewise_cuda_graph_impl" in name for name in operators)


# --- weight updates ----------------------------------------------------------------------------


def sleep_and_resume(experts):
    """SGLang's memory saver gives other pages at the same addresses.

    Parameters and constants then hold anything.
    """
    prepared = experts.quant_method.prepared
    for t in (
        *(p.data for p in experts.parameters()),
        prepared.alpha,
        prepared.beta,
        prepared.limit,
        experts.quant_method.expert_map,
    ):
        if t is not None:
            t.view(torch.uint8).fill_(255)


@pytest.mark.parametrize("how", ["restored first", "straight over", "after sleep"])
@pytest.mark.parametrize(("size", "r"), [(1, 0), (4, 3), (8, 7)])
def test_gpt_oss_reloads_in_place(size, r, how):
    """Other weights through the same parameters, three times.

    The addresses, which CUDA graphs hold, stay.
    """
    rank, call = Rank(size, r), calls(HIDDEN)
    first, other = gpt_oss_weights(), gpt_oss_weights(seed=1)
    model = gpt_oss(rank, first)
    where = addresses(model.experts)
    results = [
        run(rank, model.experts, *call),
        run(Rank(size, r), gpt_oss(Rank(size, r), other).experts, *call),
    ]
    assert relative_l2(results[0], results[1].float()) > 0.1
    for weights, wanted in ((other, results[1]), (first, results[0]), (other, results[1])):
        if how == "after sleep":
            sleep_and_resume(model.experts)
        if how != "straight over":
            restore(rank, model)
        with torch.inference_mode():  # SGLang's scheduler runs in it
            model.load_weights(gpt_oss_tensors(weights))
            prepare(rank, model)
        assert addresses(model.experts) == where
        assert torch.equal(run(rank, model.experts, *call), wanted)


def test_an_update_of_some_tensors_keeps_the_others():
    rank, call = Rank(4, 3), calls(HIDDEN)
    w, other = gpt_oss_weights(), gpt_oss_weights(seed=1)
    mixed = ExpertWeights(**(w.tensors() | {"w2": other.w2, "w13_bias": other.w13_bias}))
    wanted = run(rank, gpt_oss(rank, mixed).experts, *call)
    model = gpt_oss(rank, w)
    for bucket in (("w2",), ("w13_bias",)):
        restore(rank, model)
        model.load_weights(gpt_oss_tensors(other, bucket))
        prepare(rank, model)
    assert torch.equal(run(rank, model.experts, *call), wanted)


def test_preparing_or_restoring_again_changes_nothing():
    """SGLang ends a weight update by preparing every layer, even where nothing was loaded."""
    rank, call = Rank(), calls(HIDDEN)
    model = gpt_oss(rank, gpt_oss_weights())
    wanted = run(rank, model.experts, *call)
    for step in (prepare, restore, restore, prepare, prepare):
        step(rank, model)
    assert torch.equal(run(rank, model.experts, *call), wanted)


def test_sglangs_own_update_session():
    """From 0.5.21: begin, tensors in buckets, end."""
    loader = pytest.importorskip("sglang.srt.model_loader.loader").DefaultModelLoader
    if not hasattr(loader, "restore_weights_before_loading"):
        pytest.skip("this SGLang has no such session")
    rank, call = Rank(), calls(HIDDEN)
    other = gpt_oss_weights(seed=1)
    wanted = run(rank, gpt_oss(rank, other).experts, *call)
    model = gpt_oss(rank, gpt_oss_weights())
    with rank:
        loader.restore_weights_before_loading(model, DEVICE)
        for field in CHECKPOINT_NAMES:
            model.load_weights(gpt_oss_tensors(other, (field,)))
        loader.postprocess_weights(model, DEVICE)
    assert torch.equal(run(rank, model.experts, *call), wanted)


def test_updates_without_a_session_are_prepared_too():
    """Up to 0.5.20 SGLang leaves a layer as loaded; there a hook prepares it after each update."""
    rank, call = Rank(), calls(HIDDEN)
    other = gpt_oss_weights(seed=1)
    wanted = run(rank, gpt_oss(rank, other).experts, *call)
    model = gpt_oss(rank, gpt_oss_weights())
    for field in CHECKPOINT_NAMES:
        model.load_weights(gpt_oss_tensors(other, (field,)))
        with pytest.raises(RuntimeError, match="loaded and not prepared"):
            run(rank, model.experts, *call)
        prepare_updated((True, "Success"), SimpleNamespace(get_model=lambda: model), [])
    assert torch.equal(run(rank, model.experts, *call), wanted)


def test_a_replaced_parameter_is_noticed():
    rank = Rank()
    experts = gpt_oss(rank, gpt_oss_weights()).experts
    experts.w13_weight.data = experts.w13_weight.data.clone()
    with pytest.raises(
        RuntimeError, match="w13_weight of gpt_oss's layer 0 was replaced after loading"
    ):
        run(rank, experts, *calls(HIDDEN))


def test_a_bad_scale_is_named_before_anything_changes():
    rank, w = Rank(), gpt_oss_weights()
    model = GptOss(rank, CONFIG)
    w.w2_scale[1, 2, 3] = 255
    model.load_weights(gpt_oss_tensors(w))
    with pytest.raises(ValueError, match=r"w2_scale\[1, 2, 3\] is 255"):
        prepare(rank, model)
    w.w2_scale[1, 2, 3] = 120
    model.load_weights(gpt_oss_tensors(w))
    prepare(rank, model)
    assert (
        relative_l2(run(rank, model.experts, *calls(HIDDEN)), gpt_oss_reference(w, calls(HIDDEN)))
        < 5e-3
    )


# --- DeepSeek-V4 -------------------------------------------------------------------------------

DEEPSEEK = {"hidden": 256, "intermediate": 384, "experts": 8, "top_k": 2}


def deepseek_tensors(seed=0, hidden=256, intermediate=384, experts=8, top_k=2):
    """Checkpoint tensors by expert and projection, as the files have them.

    Weights are pairs in int8, scales float8_e8m0fnu.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = {
        "w1": (intermediate, hidden),
        "w2": (hidden, intermediate),
        "w3": (intermediate, hidden),
    }

    def tensors(rows, k):
        scale = random_bytes(g, rows, k // 32, low=118, high=122).view(torch.float8_e8m0fnu)
        return random_bytes(g, rows, k // 2).view(torch.int8), scale

    return {(e, name): tensors(*size) for e in range(experts) for name, size in sizes.items()}


def deepseek_weights(tensors):
    def stack(which, *names):
        parts = [
            [tensors[e, name][which].view(torch.uint8) for name in names]
            for e in range(len(tensors) // 3)
        ]
        return torch.stack([torch.cat(part) for part in parts])

    return ExpertWeights(stack(0, "w1", "w3"), stack(0, "w2"), stack(1, "w1", "w3"), stack(1, "w2"))


def load_deepseek(rank, experts, tensors, scale_dtype=torch.float8_e8m0fnu):
    """Expert by expert through the parameters' loaders, in threads, as SGLang's model does."""
    jobs = []
    for (e, shard), (weight, scale) in tensors.items():
        scale = scale.float() if scale_dtype == torch.float32 else scale.view(scale_dtype)
        for name, tensor in (("weight", weight), ("weight_scale_inv", scale)):
            name = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
            param = getattr(experts, name)
            jobs.append((param, tensor.clone(), f"model.layers.0.mlp.experts.{name}", shard, e))
    with rank, ThreadPoolExecutor(4) as pool:
        for job in [
            pool.submit(param.weight_loader, param, *args[:2], shard_id=args[2], expert_id=args[3])
            for param, *args in jobs
        ]:
            job.result()


def deepseek(rank, tensors, scale_dtype=torch.float8_e8m0fnu, **sizes):
    experts = deepseek_experts(rank, **(DEEPSEEK | sizes))
    load_deepseek(rank, experts, tensors, scale_dtype)
    prepare(rank, experts)
    return experts


def deepseek_reference(tensors, call, factor=1.0, activations="bf16"):
    x, ids, weights = call
    return reference_moe(
        x,
        ids,
        weights * factor,
        deepseek_weights(tensors),
        family=DEEPSEEK_V4,
        swiglu=SwiGLU(1.0, 0.0, DEEPSEEK_LIMIT),
        activations=activations,
    )


def method_factor(experts):
    """What the method itself multiplies by: all of it where SGLang's top-k does not."""
    return 1.0 if experts.should_fuse_routed_scaling_factor_in_topk else DEEPSEEK_FACTOR


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32], ids=str)
def test_deepseek_v4_scales_of_every_dtype(scale_dtype):
    """SGLang copies by value: bytes in a uint8 tensor, or floats, must come to the same."""
    rank, tensors, call = Rank(), deepseek_tensors(), calls(256, experts=8)
    experts = deepseek(rank, tensors, scale_dtype)
    assert (
        relative_l2(
            run(rank, experts, *call), deepseek_reference(tensors, call, method_factor(experts))
        )
        < 5e-3
    )


def test_8_bit_activations_on_request(monkeypatch, caplog):
    monkeypatch.setenv("HOPPER_MXFP4_ACTIVATIONS", "fp8")
    rank, tensors, call = Rank(), deepseek_tensors(), calls(256, experts=8)
    with caplog.at_level(logging.INFO):
        experts = deepseek(rank, tensors)
    assert "activations are FP8 in groups of 128 columns" in caplog.text
    y, factor = run(rank, experts, *call), method_factor(experts)
    assert relative_l2(y, deepseek_reference(tensors, call, factor, "fp8")) < 5e-3
    assert relative_l2(y, deepseek_reference(tensors, call, factor)) > 1e-2


@pytest.mark.parametrize(("size", "expert_parallel"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_deepseek_v4_ranks_sum_to_the_reference(size, expert_parallel):
    tensors, call = deepseek_tensors(), calls(256, experts=8)
    total = torch.zeros(TOKENS, 256)
    for r in range(size):
        rank = Rank(size, r, expert_parallel)
        experts = deepseek(rank, tensors)
        assert type(experts.quant_method) is MoEMethod
        total += run(rank, experts, *call).float()
    assert relative_l2(total, deepseek_reference(tensors, call, method_factor(experts))) < 5e-3


@pytest.mark.parametrize("r", range(2))
def test_padded_shards_load(r, sm90_layout):
    """DeepSeek-V4-Pro over 16 ranks has shards of 192, which the kernel pads to 256.

    The halves of w13 are then apart.
    """
    rank, call = Rank(2, r), calls(192, experts=8)
    sizes = {"hidden": 192, "intermediate": 384}
    tensors = deepseek_tensors(**sizes)
    experts = deepseek(rank, tensors, **sizes)
    assert experts.w13_weight.shape == (8, 512, 128)
    cut = slice(r * 192, r * 192 + 192)
    w = deepseek_weights(tensors)
    rows = torch.cat((torch.arange(384)[cut], 384 + torch.arange(384)[cut]))
    shard = ExpertWeights(
        w.w13[:, rows],
        w.w2[:, :, cut.start // 2 : cut.stop // 2],
        w.w13_scale[:, rows],
        w.w2_scale[:, :, cut.start // 32 : cut.stop // 32],
    )
    x, ids, weights = call
    swiglu = SwiGLU(1.0, 0.0, DEEPSEEK_LIMIT)
    wanted = reference_moe(
        x, ids, weights * method_factor(experts), shard, family=DEEPSEEK_V4, swiglu=swiglu
    )
    for step in ((), (restore, prepare)):  # and the way back
        for function in step:
            function(rank, experts)
        assert relative_l2(run(rank, experts, *call), wanted) < 5e-3


def test_the_routed_scaling_factor_is_applied_once():
    """By SGLang's own top-k where the layer may ask for it (0.5.19), else by the method."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK

    rank, tensors = Rank(), deepseek_tensors()
    experts = deepseek(rank, tensors)
    fused = experts.should_fuse_routed_scaling_factor_in_topk
    x = calls(256, experts=8)[0]
    logits = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(2))
    with rank, torch.inference_mode():
        topk = TopK(
            top_k=2,
            layer_id=0,
            renormalize=True,
            scoring_func="sqrtsoftplus",
            correction_bias=torch.zeros(8, dtype=torch.float32),
            routed_scaling_factor=DEEPSEEK_FACTOR,
            apply_routed_scaling_factor_on_output=fused,
        )
        if hasattr(topk, "bind_runner_backend"):
            topk.bind_runner_backend(experts.runner_backend)
        scores, ids = torch.nn.functional.softplus(logits).sqrt().topk(2)
        call = x, ids, scores / scores.sum(-1, keepdim=True)
        try:
            routed = topk(x, logits)
        except (
            AssertionError,
            ValueError,
        ):  # on a CPU not from 0.5.19 to 0.5.22 with the factor, nor sqrtsoftplus at all in 0.5.12
            routed = StandardTopKOutput(
                topk_weights=call[2] * (DEEPSEEK_FACTOR if fused else 1),
                topk_ids=ids,
                router_logits=logits,
            )
        y = experts(x, routed)
    assert relative_l2(y, deepseek_reference(tensors, call, DEEPSEEK_FACTOR)) < 5e-3


@pytest.mark.parametrize("restored", [True, False], ids=["restored first", "straight over"])
def test_deepseek_v4_reloads_in_place(restored):
    rank, call = Rank(), calls(256, experts=8)
    experts = deepseek(rank, deepseek_tensors())
    where = addresses(experts)
    for seed in (1, 0):
        tensors = deepseek_tensors(seed)
        sleep_and_resume(experts)
        if restored:
            restore(rank, experts)
        load_deepseek(rank, experts, tensors)
        prepare(rank, experts)
        assert (
            relative_l2(
                run(rank, experts, *call), deepseek_reference(tensors, call, method_factor(experts))
            )
            < 5e-3
        )
        assert addresses(experts) == where


def test_an_update_of_one_projection_of_one_expert():
    rank, call = Rank(), calls(256, experts=8)
    tensors, other = deepseek_tensors(), deepseek_tensors(seed=1)
    experts = deepseek(rank, tensors)
    load_deepseek(rank, experts, {(5, "w3"): other[5, "w3"]})
    prepare(rank, experts)
    mixed = tensors | {(5, "w3"): other[5, "w3"]}
    assert (
        relative_l2(
            run(rank, experts, *call), deepseek_reference(mixed, call, method_factor(experts))
        )
        < 5e-3
    )


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_eplb_moves_whole_experts(family):
    """By SGLang's own mover, over all the tensors that it takes for experts.

    Ids exchanged likewise then give the same result.
    """
    from sglang.srt.eplb.expert_location_updater import (
        create_temp_buffers,
        update_expert_weights_single_layer,
    )
    from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert

    rank = Rank()
    experts = (
        gpt_oss(rank, gpt_oss_weights()).experts
        if family == "gpt_oss"
        else deepseek(rank, deepseek_tensors())
    )
    e = experts.num_local_experts
    x, ids, weights = calls(experts.hidden_size, experts=e)
    before = run(rank, experts, x, ids, weights)
    moved = [
        p.data
        for name, p in experts.named_parameters()
        if filter_moe_weight_param_global_expert(name, p, e)
    ]
    assert len(moved) == (6 if family == "gpt_oss" else 4)
    assert {t.dtype for t in moved} <= {
        torch.uint8,
        torch.int8,
        torch.bfloat16,
    }  # what NCCL can send
    order = torch.randperm(e, generator=torch.Generator().manual_seed(3)).tolist()
    update_expert_weights_single_layer(
        moved,
        create_temp_buffers(moved),
        old_physical_to_logical_map=list(range(e)),
        new_physical_to_logical_map=order,
        num_local_physical_experts=e,
        num_gpu_per_node=1,
        rank=0,
        world_size=1,
    )
    assert order != sorted(order)
    where = torch.where(ids < 0, ids, torch.tensor(order).argsort()[ids.clamp(min=0).long()].int())
    assert torch.equal(run(rank, experts, x, where, weights), before)


# --- deterministic inference ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_a_tokens_bytes_do_not_depend_on_its_batch(family):
    """With --enable-deterministic-inference.

    A token alone, or among others in another order, gives the same bytes.
    """
    rank = Rank(enable_deterministic_inference=True)
    experts = {
        "gpt_oss": lambda: gpt_oss(rank, gpt_oss_weights()).experts,
        "deepseek_v4": lambda: deepseek(rank, deepseek_tensors()),
    }[family]()
    assert experts.quant_method.prepared.batch_invariant
    assert experts.quant_method.prepared.deterministic
    tokens = 37
    call = calls(experts.hidden_size, experts=experts.num_local_experts, tokens=tokens)
    whole = run(rank, experts, *call)
    assert whole.any()
    alone = [torch.tensor([t]) for t in range(tokens)]
    for part in (*alone, torch.arange(11, 28).flip(0)):
        y = run(rank, experts, *(t[part] for t in call))
        assert torch.equal(y, whole[part]), part


@pytest.mark.parametrize("variable", [None, "HOPPER_MXFP4_BATCH_INVARIANT"])
def test_without_the_flag_the_variable_decides(monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    experts = gpt_oss(Rank(), gpt_oss_weights()).experts
    assert experts.quant_method.prepared.batch_invariant is (variable is not None)


def test_a_kernel_that_is_not_deterministic_is_declined_with_the_flag(monkeypatch, caplog):
    """With the kernel's own reason, and taken over without the flag."""
    from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel

    monkeypatch.setattr(
        ReferenceKernel,
        "unsupported_reason",
        lambda self, shape, device, deterministic=False: "sums vary" if deterministic else None,
    )
    with pytest.raises(SystemExit, match="kernel reference can't run: sums vary"):
        deepseek_experts(Rank(enable_deterministic_inference=True), **DEEPSEEK)
    assert type(deepseek_experts(Rank(), **DEEPSEEK).quant_method) is MoEMethod


# --- families from plugins -----------------------------------------------------------------------


class ThirdParty:
    """As a package offers it under the entry point group hopper_mxfp4; no adapter knows of it."""

    def __init__(self, family):
        self.family = family

    @hookimpl
    def register_families(self, register):
        register(self.family)


@pytest.fixture
def register():
    """Registers a family for one test."""
    registered = []

    def register(*arguments, **fields):
        registered.append(ThirdParty(CheckpointFamily(*arguments, **fields)))
        plugins.manager.register(registered[-1])
        return registered[-1].family

    yield register
    for plugin in registered:
        plugins.manager.unregister(plugin)


def test_a_third_partys_family_in_an_fp8_checkpoint(register):
    """fp8 linear layers, MXFP4 experts one by one, another model_type, which is its own then."""
    config = deepseek_quant_config(
        {"model_type": "mine_moe", "swiglu_limit": 0.1}, is_dsv4_fp4_experts=False
    )
    experts = deepseek_experts(Rank(), **DEEPSEEK, config=config, swiglu_limit=0.1)
    assert experts.quant_method.family is GENERIC
    mine = register("mine", ("mine_moe",), rows="gate_up", bias=False)
    rank, tensors, call = Rank(), deepseek_tensors(), calls(256, experts=8)
    experts = deepseek_experts(rank, **DEEPSEEK, config=config, swiglu_limit=0.1)
    assert experts.quant_method.family is mine
    load_deepseek(rank, experts, tensors)
    prepare(rank, experts)
    x, ids, weights = call
    factor = method_factor(experts)
    w, swiglu = deepseek_weights(tensors), SwiGLU(1.0, 0.0, 0.1)
    wanted = reference_moe(x, ids, weights * factor, w, family=mine, swiglu=swiglu)
    assert relative_l2(run(rank, experts, *call), wanted) < 5e-3
    assert relative_l2(wanted, deepseek_reference(tensors, call, factor)) > 0.05  # clamps at 10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ["gate_up", "interleaved"])
def test_a_third_partys_family_in_an_mxfp4_checkpoint(register, sm90_layout, rows, bias):
    """All experts at once, as GPT-OSS's come, with its own rows and activation; there and back."""
    mine = register("mine", ("mine_moe",), rows=rows, bias=bias, alpha=1.3, beta=1.0, limit=2.0)
    rank, w = Rank(), gpt_oss_weights()
    if not bias:
        w = replace(w, w13_bias=None, w2_bias=None)
    options = {"gemm1_alpha": 1.3, "gemm1_clamp_limit": 2.0, "with_bias": bias}
    if hasattr(MoeRunnerConfig(), "gate_up_interleaved"):
        options["gate_up_interleaved"] = rows == "interleaved"
    elif rows == "gate_up":
        pytest.skip("this SGLang knows only interleaved ones")
    hf_config = {"model_type": "mine_moe"}
    sizes = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    experts = gpt_oss_experts(rank, *sizes, hf_config=hf_config, **options)
    method = experts.quant_method
    assert method.family is mine
    assert experts.w13_weight.shape[1] > 2 * INTERMEDIATE  # padded, so that halves are apart
    for _ in range(2):
        with rank:
            for field, tensor in w.tensors().items():
                name = method.parameters[field]
                param = getattr(experts, name)
                param.weight_loader(param, tensor, name, shard_id=None, expert_id=None)
        prepare(rank, experts)
        call = calls(HIDDEN)
        wanted = reference_moe(*call, w, family=mine, swiglu=SwiGLU(1.3, 1.0, 2.0))
        assert relative_l2(run(rank, experts, *call), wanted) < 5e-3
        restore(rank, experts)


def test_interleaved_rows_can_not_come_expert_by_expert(register):
    """SGLang's loader would put gate above up.

    Nothing may be loaded so, and fp8 checkpoints come no other way.
    """
    register("mine", ("mine_moe",), rows="interleaved", bias=False)
    rank = Rank()
    config = deepseek_quant_config({"model_type": "mine_moe"})
    with pytest.raises(SystemExit, match="has other rows of gate and up than mine's interleaved"):
        deepseek_experts(rank, **DEEPSEEK, config=config, swiglu_limit=None)
    options = {"gemm1_alpha": None, "gemm1_clamp_limit": None, "with_bias": False}
    experts = gpt_oss_experts(
        rank, HIDDEN, 64, EXPERTS, TOP_K, hf_config={"model_type": "mine_moe"}, **options
    )
    param, half = experts.w13_weight, torch.zeros(64, HIDDEN // 2, dtype=torch.uint8)
    with rank, pytest.raises(ValueError, match="w13_weight came for expert 1 alone"):
        param.weight_loader(param, half, "w13_weight", shard_id="w1", expert_id=1)


def test_biases_that_the_family_does_not_have(register):
    if not hasattr(deepseek_experts(Rank(), **DEEPSEEK), "with_bias"):
        pytest.skip("this SGLang does not say")
    register("mine", ("mine_moe",), rows="interleaved", bias=False)
    with pytest.raises(SystemExit, match="SGLang's layer has biases, and mine none"):
        gpt_oss_experts(
            Rank(),
            *(HIDDEN, 64, EXPERTS, TOP_K),
            hf_config={"model_type": "mine_moe"},
            gemm1_alpha=None,
            gemm1_clamp_limit=None,
        )
