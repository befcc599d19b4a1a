"""The layer inside vLLM, rank by rank, against `reference_moe`.

Models, loaders and modular kernel are vLLM's own.
"""

import inspect

import pytest
import torch
from safetensors.torch import load_file
from vllm.config.quantization import QuantizationConfigArgs, QuantSpec
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config, Mxfp4MoEMethod
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    CheckpointFamily,
    ExpertWeights,
    SwiGLU,
    reference_moe,
)
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss
from hopper_mxfp4.plugin import hookimpl
from hopper_mxfp4_vllm import configs as configs_module
from hopper_mxfp4_vllm.layer import DeepseekV4Method, GptOssMethod
from hopper_mxfp4_vllm.loading import PARAMETERS
from models import (
    DEEPSEEK_V4_CONFIG,
    DEVICE,
    Rank,
    configure,
    deepseek_v4_moe,
    experts_of,
    gpt_oss,
    load,
    plain_moe,
    poisoned_memory,
    run,
    write_deepseek_v4_config,
)

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 2880, 4, 2, 9


@pytest.fixture(scope="module")
def gpt_oss_checkpoint(tmp_path_factory):
    """GPT-OSS's intermediate size, whose shards are uneven.

    736, 736, 736 and 672 over four ranks; seven of 384 and one of 192 over eight.
    """
    folder = tmp_path_factory.mktemp("uneven")
    write_gpt_oss(
        folder, layers=1, hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS, top_k=TOP_K
    )
    return configure(folder), load_file(folder / "model.safetensors")


def gpt_oss_weights(tensors):
    part = {name.partition("experts.")[2]: t for name, t in tensors.items()}
    return ExpertWeights(
        w13=part["gate_up_proj_blocks"].flatten(2),
        w2=part["down_proj_blocks"].flatten(2),
        w13_scale=part["gate_up_proj_scales"],
        w2_scale=part["down_proj_scales"],
        w13_bias=part["gate_up_proj_bias"],
        w2_bias=part["down_proj_bias"],
    )


def calls(hidden, experts=EXPERTS, tokens=TOKENS, top_k=TOP_K, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).int()
    ids[2, 1] = ids[5] = -1  # padding, as vLLM marks it
    weights = torch.rand(tokens, top_k, generator=g)
    return torch.randn(tokens, hidden, generator=g).bfloat16(), ids, weights


def relative_l2(y, reference):
    return ((y.float() - reference).norm() / reference.norm()).item()


def gpt_oss_reference(tensors, call):
    return reference_moe(
        *call, gpt_oss_weights(tensors), family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0)
    )


@pytest.mark.parametrize(
    ("size", "expert_parallel"), [(1, False), (2, False), (4, False), (8, False), (2, True)]
)
def test_gpt_oss_ranks_sum_to_the_reference(gpt_oss_checkpoint, size, expert_parallel):
    config, tensors = gpt_oss_checkpoint
    call = calls(HIDDEN)
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(size):
        rank = Rank(config, size, r, expert_parallel)
        experts = experts_of(gpt_oss(rank, tensors))
        assert type(experts.quant_method) is GptOssMethod
        assert experts.moe_config.hidden_dim == HIDDEN  # nothing for the model's graph to pad
        part = run(rank, experts, *call)
        assert not part[5].any()  # a row of padding
        assert part.abs().max() > 0
        total += part.float()
    assert relative_l2(total, gpt_oss_reference(tensors, call)) < 5e-3


@pytest.mark.parametrize(("size", "expert_parallel"), [(1, False), (4, False), (2, True)])
def test_gpt_oss_expert_by_expert(gpt_oss_checkpoint, size, expert_parallel):
    """vLLM's streamed loader cuts shards at the allocated size, not in blocks of 32.

    Here it loads into memory that is not clean.
    """
    config, tensors = gpt_oss_checkpoint
    w, call = gpt_oss_weights(tensors), calls(HIDDEN)
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(size):
        rank = Rank(config, size, r, expert_parallel)
        with rank as vllm_config:
            experts = experts_of(initialize_model(vllm_config=vllm_config))
            if type(experts).__name__ != "GptOssRoutedExperts":
                pytest.skip("this vLLM loads GPT-OSS's experts only all at once")
            for _, param in experts.named_parameters():
                param.data.view(torch.uint8).fill_(255)
            for name, loaded in w.tensors().items():
                param = getattr(experts, PARAMETERS[name])
                for e in range(EXPERTS):
                    shard = "gpt_oss_" + name.partition("_")[0]
                    param.weight_loader(
                        param, loaded[e].clone(), PARAMETERS[name], shard, e, return_success=True
                    )
            process_weights_after_loading(experts, vllm_config.model_config, DEVICE)
        total += run(rank, experts, *call).float()
    assert relative_l2(total, gpt_oss_reference(tensors, call)) < 5e-3


def test_every_row_padding(gpt_oss_checkpoint):
    """What vLLM captures its CUDA graphs with; the weights of such rows can be anything."""
    config, tensors = gpt_oss_checkpoint
    rank = Rank(config)
    experts = experts_of(gpt_oss(rank, tensors))
    x, ids, weights = calls(HIDDEN)
    assert not run(
        rank, experts, x, torch.full_like(ids, -1), torch.full_like(weights, float("nan"))
    ).any()


@pytest.mark.parametrize(("size", "r"), [(1, 0), (4, 3), (8, 7)])
def test_gpt_oss_reloads_in_place(gpt_oss_checkpoint, size, r):
    """Other weights through the same parameters, twice; addresses, which CUDA graphs hold, stay."""
    config, tensors = gpt_oss_checkpoint
    rank, call = Rank(config, size, r), calls(HIDDEN)
    model = gpt_oss(rank, tensors)
    experts = experts_of(model)
    addresses = {name: p.data_ptr() for name, p in experts.named_parameters()}
    first = run(rank, experts, *call)
    other = {name: t.flip(0) if "experts" in name else t for name, t in tensors.items()}
    fresh = Rank(config, size, r)
    wanted = run(fresh, experts_of(gpt_oss(fresh, other)), *call)
    assert relative_l2(first, wanted.float()) > 0.1
    for weights, result in ((other, wanted), (tensors, first), (other, wanted)):
        with rank as vllm_config:
            load(model, vllm_config, weights)
        assert torch.equal(run(rank, experts, *call), result)
        assert {name: p.data_ptr() for name, p in experts.named_parameters()} == addresses


@pytest.mark.parametrize("has", [False, True], ids=["no", "every"])
def test_loading_depends_on_no_instruction_set(gpt_oss_checkpoint, monkeypatch, has):
    """vLLM packs linear weights, and drops the parameters, where the CPU has AVX512-BF16 or AMX."""
    for query in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, query, lambda: has, raising=False)
    config, tensors = gpt_oss_checkpoint
    rank = Rank(config)
    model = gpt_oss(rank, tensors)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    first = run(rank, experts_of(model), *calls(HIDDEN))
    with rank as vllm_config:
        load(model, vllm_config, tensors)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.numel() for p in model.parameters())
    assert torch.equal(run(rank, experts_of(model), *calls(HIDDEN)), first)


@pytest.mark.parametrize(("size", "r"), [(1, 0), (8, 7)])
def test_vllms_layerwise_reload(gpt_oss_checkpoint, size, r):
    """vLLM's own reload.

    It loads into fresh memory that holds anything, repacks there and copies into the first
    parameters.
    """
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    config, tensors = gpt_oss_checkpoint
    rank, call = Rank(config, size, r), calls(HIDDEN)
    with rank as vllm_config:
        model = initialize_model(vllm_config=vllm_config)
        reload.record_metadata_for_reloading(model)
        load(model, vllm_config, tensors)
    experts = experts_of(model)
    addresses = {name: p.data_ptr() for name, p in experts.named_parameters()}
    other = {name: t.flip(0) if "experts" in name else t for name, t in tensors.items()}
    fresh = Rank(config, size, r)
    wanted = run(fresh, experts_of(gpt_oss(fresh, other)), *call)
    prepared = experts.quant_method.experts.prepared
    for constant in (prepared.alpha, prepared.beta, prepared.limit):
        constant.fill_(float("nan"))  # a deep sleep has dropped them
    with rank as vllm_config, poisoned_memory():
        reload.initialize_layerwise_reload(model)
        model.load_weights(iter({name: t.clone() for name, t in other.items()}.items()))
        reload.finalize_layerwise_reload(model, vllm_config.model_config)
    assert {name: p.data_ptr() for name, p in experts.named_parameters()} == addresses
    assert torch.equal(run(rank, experts, *call), wanted)


def test_a_replaced_parameter_is_noticed(gpt_oss_checkpoint):
    config, tensors = gpt_oss_checkpoint
    rank = Rank(config)
    experts = experts_of(gpt_oss(rank, tensors))
    experts.w13_weight = torch.nn.Parameter(experts.w13_weight.clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="w13_weight was replaced after loading"):
        run(rank, experts, *calls(HIDDEN))


# --- DeepSeek-V4 -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return configure(write_deepseek_v4_config(tmp_path_factory.mktemp("deepseek")))


def deepseek_tensors(config, seed=0):
    """Checkpoint tensors by expert and projection, as the files have them.

    Weights are pairs in int8, scales float8_e8m0fnu.
    """
    hf, g = config.model_config.hf_config, torch.Generator().manual_seed(seed)
    h, i = hf.hidden_size, hf.moe_intermediate_size

    def weight(rows, k):
        return torch.randint(-128, 128, (rows, k // 2), generator=g, dtype=torch.int8)

    def scale(rows, k):
        return torch.randint(118, 122, (rows, k // 32), generator=g, dtype=torch.uint8).view(
            torch.float8_e8m0fnu
        )

    sizes = {"w1": (i, h), "w2": (h, i), "w3": (i, h)}
    return {
        (e, name): (weight(*size), scale(*size)) for e in range(8) for name, size in sizes.items()
    }


def deepseek_weights(tensors, experts):
    def stack(which, *names):
        parts = [
            [tensors[e, name][which].view(torch.uint8) for name in names] for e in range(experts)
        ]
        return torch.stack([torch.cat(part) for part in parts])

    return ExpertWeights(stack(0, "w1", "w3"), stack(0, "w2"), stack(1, "w1", "w3"), stack(1, "w2"))


def load_deepseek(experts, tensors, as_bytes):
    """Expert by expert through the parameters' own loaders.

    vLLM's model hands scales on as bytes; other callers may not.
    """
    for (e, name), (weight, scale) in tensors.items():
        where = "w2" if name == "w2" else "w13"
        scale = scale.view(torch.uint8) if as_bytes else scale
        for suffix, tensor in (("weight", weight), ("weight_scale", scale)):
            param = getattr(experts, f"{where}_{suffix}")
            full = f"layers.0.ffn.experts.{where}_{suffix}"
            param.weight_loader(
                param, tensor.clone(), full, shard_id=name, expert_id=e, return_success=True
            )


def deepseek_layer(rank, tensors, as_bytes=True, **options):
    layer = deepseek_v4_moe(rank, **options)
    experts = experts_of(layer)
    load_deepseek(experts, tensors, as_bytes)
    with rank as config:
        process_weights_after_loading(layer, config.model_config, DEVICE)
    return layer, experts


def deepseek_reference(tensors, call, factor=1.0, activations="bf16"):
    x, ids, weights = call
    return reference_moe(
        x,
        ids,
        weights * factor,
        deepseek_weights(tensors, 8),
        family=DEEPSEEK_V4,
        swiglu=SwiGLU(1.0, 0.0, 10.0),
        activations=activations,
    )


@pytest.mark.parametrize("as_bytes", [True, False], ids=["uint8", "e8m0"])
@pytest.mark.parametrize(
    ("size", "expert_parallel"), [(1, False), (2, False), (4, False), (2, True)]
)
def test_deepseek_v4_ranks_sum_to_the_reference(deepseek, size, expert_parallel, as_bytes):
    tensors, call = deepseek_tensors(deepseek), calls(256, experts=8)
    total = torch.zeros(TOKENS, 256)
    for r in range(size):
        rank = Rank(deepseek, size, r, expert_parallel)
        _, experts = deepseek_layer(rank, tensors, as_bytes)
        assert type(experts.quant_method) is DeepseekV4Method
        total += run(rank, experts, *call).float()
    assert relative_l2(total, deepseek_reference(tensors, call)) < 5e-3


def test_8_bit_activations_on_request(tmp_path, monkeypatch):
    """The order travels with the config: a worker need not see the variable."""
    monkeypatch.setenv("HOPPER_MXFP4_ACTIVATIONS", "fp8")
    config = configure(write_deepseek_v4_config(tmp_path))
    monkeypatch.delenv("HOPPER_MXFP4_ACTIVATIONS")
    said = []
    monkeypatch.setattr(
        configs_module.logger, "info_once", lambda line, *values: said.append(line % values)
    )
    tensors, call = deepseek_tensors(config), calls(256, experts=8)
    rank = Rank(config)
    _, experts = deepseek_layer(rank, tensors)
    assert said[0].endswith("FP8 in groups of 128 columns; the checkpoint declares 8-bit ones")
    y = run(rank, experts, *call)
    assert relative_l2(y, deepseek_reference(tensors, call, activations="fp8")) < 5e-3
    assert relative_l2(y, deepseek_reference(tensors, call)) > 1e-2


def test_the_routed_scaling_factor_is_applied_once(deepseek):
    """vLLM's router puts DeepSeek-V4's 1.5 into the weights.

    So neither the runner nor the experts may multiply by it again.
    """
    rank, tensors, call = Rank(deepseek), deepseek_tensors(deepseek), calls(256, experts=8)
    layer, experts = deepseek_layer(rank, tensors)
    assert deepseek.model_config.hf_config.routed_scaling_factor == 1.5
    assert layer.router.routed_scaling_factor == 1.5
    assert getattr(layer, "routed_scaling_factor", 1.0) == 1.0
    x, ids, weights = call
    y = run(rank, experts, x, ids, weights * 1.5)
    assert relative_l2(y, deepseek_reference(tensors, call, 1.5)) < 5e-3


def test_deepseek_v4_reloads_in_place(deepseek):
    rank, call = Rank(deepseek), calls(256, experts=8)
    tensors, other = deepseek_tensors(deepseek), deepseek_tensors(deepseek, seed=1)
    layer, experts = deepseek_layer(rank, tensors)
    addresses = {name: p.data_ptr() for name, p in experts.named_parameters()}
    for seed, weights in ((1, other), (0, tensors)):
        load_deepseek(experts, weights, as_bytes=True)
        with rank as config:
            process_weights_after_loading(layer, config.model_config, DEVICE)
        assert (
            relative_l2(
                run(rank, experts, *call),
                deepseek_reference(deepseek_tensors(deepseek, seed), call),
            )
            < 5e-3
        )
        assert {name: p.data_ptr() for name, p in experts.named_parameters()} == addresses


def test_eplb_moves_whole_experts(deepseek):
    """EPLB exchanges rows of every parameter, seen as [experts, bytes].

    Ids exchanged likewise then give the same result.
    """
    rank, tensors = Rank(deepseek), deepseek_tensors(deepseek)
    _, experts = deepseek_layer(rank, tensors)
    assert experts.quant_method.supports_eplb
    x, ids, weights = calls(256, experts=8)
    before = run(rank, experts, x, ids, weights)
    order = torch.tensor([3, 1, 2, 0, 7, 5, 6, 4])
    moved = list(experts.get_expert_weights())
    assert len(moved) == 4
    for rows in moved:
        rows.copy_(rows[order].clone())
    where = torch.where(ids < 0, ids, order.argsort()[ids.clamp(min=0).long()].int())
    assert torch.equal(run(rank, experts, x, where, weights), before)


def test_requantised_experts_stay_stock(deepseek, monkeypatch):
    """fp8 or NVFP4 experts of DeepSeek-V4 are vLLM's, as is all else but MXFP4 experts."""
    config = deepseek.quant_config
    stock = []
    monkeypatch.setattr(
        type(config).__mro__[2],
        "get_quant_method",
        lambda self, layer, prefix: stock.append(prefix),
    )
    with Rank(deepseek):
        assert config.activation_bits(None, "model.layers.0.ffn.experts") == 8
        config.get_quant_method(torch.nn.Linear(2, 2), "model.layers.0.attn.wq")
    assert stock == ["model.layers.0.attn.wq"]


def test_the_line_says_which_activations_run(deepseek, gpt_oss_checkpoint, monkeypatch):
    """DeepSeek-V4 declares 8-bit activations, and stock vLLM from 0.32 on runs them on Hopper."""
    said = []
    monkeypatch.setattr(
        configs_module.logger, "info_once", lambda line, *values: said.append(line % values)
    )
    deepseek_v4_moe(Rank(deepseek))
    declared = "activations are BF16, not the 8-bit ones that the checkpoint declares"
    assert declared in said[0]
    runs = "activation_key" in inspect.signature(Mxfp4MoEMethod.__init__).parameters
    assert ("stock vLLM runs on Hopper" in said[0]) is runs
    with Rank(gpt_oss_checkpoint[0]) as config:
        initialize_model(vllm_config=config)
    assert said[1].endswith("; activations are BF16")


@pytest.mark.parametrize(
    ("bits", "device", "activations"),
    [(8, "cuda", "fp8"), (8, "cpu", "bf16"), (16, "cuda", "bf16"), (4, "cuda", "bf16")],
)
def test_what_runs_unasked_is_what_stock_vllm_runs(bits, device, activations):
    """DeepSeek-V4's declared 8-bit activations on a GPU from 0.32 on, and BF16 for all else."""
    runs = "activation_key" in inspect.signature(Mxfp4MoEMethod.__init__).parameters
    for config in configs_module.CONFIGS.values():
        on_hopper = activations if runs and config is configs_module.DeepseekV4Config else "bf16"
        assert config.stock_activations(config, bits, torch.device(device)) == on_hopper


@pytest.mark.parametrize("asked", ["auto", "fp8", "bf16"])
def test_vllms_own_flag_for_activations_is_followed(tmp_path, monkeypatch, asked):
    """Where it contradicts our variable, nothing is taken over."""
    monkeypatch.setenv("HOPPER_MXFP4_ACTIVATIONS", asked)
    config = configure(write_deepseek_v4_config(tmp_path))
    flag = QuantizationConfigArgs(moe=QuantSpec(activation="fp8_per_block_dynamic"))
    config.model_config.quantization_config = flag  # vLLM 0.29 takes no such argument with ours
    if asked == "bf16":
        with pytest.raises(ValueError, match=r"ACTIVATIONS=bf16 and --quantization-config\.moe\."):
            deepseek_v4_moe(Rank(config))
        return
    moe = deepseek_v4_moe(Rank(config))
    assert experts_of(moe).quant_method.activations == "fp8"


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_shards_that_cut_a_block(tmp_path, monkeypatch, mode):
    """384 columns over eight ranks are 48, one and a half blocks of 32."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    rank = Rank(configure(write_deepseek_v4_config(tmp_path), None), 8, 3)
    stock = []
    monkeypatch.setattr(
        get_quantization_config("deepseek_v4_fp8"),
        "get_quant_method",
        lambda self, layer, prefix: stock.append(prefix) or Untouched(layer.moe_config),
    )
    if mode == "on":
        with pytest.raises(ValueError, match="48 columns of an expert, no multiple of 32"):
            deepseek_v4_moe(rank)
        assert not stock
    else:
        experts = experts_of(deepseek_v4_moe(rank))
        assert type(experts.quant_method) is Untouched
        assert stock == ["model.layers.0.ffn.experts"]


class Untouched(UnquantizedFusedMoEMethod):
    """A stock method that a CPU has."""


@pytest.mark.parametrize("variable", ["VLLM_BATCH_INVARIANT", "HOPPER_MXFP4_BATCH_INVARIANT"])
def test_a_tokens_bytes_do_not_depend_on_its_batch(deepseek, tmp_path, monkeypatch, variable):
    def linear(x, *rest):  # on any machine: bytes that depend on the number of rows
        return torch.nn.functional.linear(x, *rest) * (1 + len(x) / 64)

    monkeypatch.setattr("hopper_mxfp4.kernels.reference.moe._linear", linear)
    monkeypatch.setenv(variable, "1")
    config = configure(write_deepseek_v4_config(tmp_path))
    rank = Rank(config)
    _, experts = deepseek_layer(rank, deepseek_tensors(config))
    prepared = experts.quant_method.experts.prepared
    assert prepared.batch_invariant
    assert prepared.deterministic
    x, ids, weights = calls(256, experts=8, tokens=40)
    together = run(rank, experts, x, ids, weights)
    for batch in ([7], [7, 8], [39, 7, 0, 7], list(range(17)), list(reversed(range(40)))):
        batch = torch.tensor(batch)
        assert torch.equal(
            run(rank, experts, x[batch], ids[batch], weights[batch]), together[batch]
        )
    monkeypatch.delenv(variable)
    _, experts = deepseek_layer(Rank(deepseek), deepseek_tensors(deepseek))
    assert not experts.quant_method.experts.prepared.batch_invariant  # nobody asked


class ThrowAway:
    """A third party's plugin: another model's experts, in the order that vLLM's loaders know."""

    family = CheckpointFamily("throw_away", ("qwen3_moe",), rows="gate_up", bias=False, limit=2.0)

    @hookimpl
    def register_families(self, register):
        register(self.family)


@pytest.fixture
def throw_away():
    plugin = ThrowAway()
    plugins.manager.register(plugin)
    yield plugin.family
    plugins.manager.unregister(plugin)


QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "num_experts": 8,
    "decoder_sparse_step": 1,
    "head_dim": 32,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize(
    ("said", "stock"),
    [
        ({"quant_method": "mxfp4"}, Mxfp4Config),
        (DEEPSEEK_V4_CONFIG["quantization_config"] | {"store_dtype": "mxfp4"}, Fp8Config),
    ],
    ids=["mxfp4", "fp8 storing mxfp4"],
)
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_third_partys_family(tmp_path, monkeypatch, throw_away, said, stock, mode):
    """Registered with the core and nowhere else, served through vLLM's own layer and loaders."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    folder = write_deepseek_v4_config(tmp_path, **QWEN, quantization_config=said)
    config = configure(folder, None)
    assert isinstance(config.quant_config, stock)
    tensors, call = deepseek_tensors(config), calls(256, experts=8)
    total = torch.zeros(TOKENS, 256)
    for r in range(2):
        rank = Rank(config, 2, r)
        layer = plain_moe(rank)
        experts = experts_of(layer)
        assert experts.quant_method.family is throw_away
        load_deepseek(experts, tensors, as_bytes=True)
        with rank as vllm_config:
            process_weights_after_loading(layer, vllm_config.model_config, DEVICE)
        total += run(rank, experts, *call).float()
    wanted = reference_moe(
        *call, deepseek_weights(tensors, 8), family=throw_away, swiglu=SwiGLU(limit=2.0)
    )
    assert relative_l2(total, wanted) < 5e-3


def test_without_the_plugin_that_checkpoint_is_stock(tmp_path, monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    folder = write_deepseek_v4_config(
        tmp_path, **QWEN, quantization_config={"quant_method": "mxfp4"}
    )
    assert type(configure(folder, None).quant_config) is Mxfp4Config
