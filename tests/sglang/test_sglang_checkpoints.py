"""Checkpoints by whatever tool, through SGLang's own layers and loaders.

Tensors and configs are as the tools write them (tests/checkpoints/moe_checkpoints.py); the experts'
outputs are compared with `reference_moe`.
"""

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

from hopper_mxfp4 import GENERIC, SwiGLU
from hopper_mxfp4_sglang import layer as layer_module
from hopper_mxfp4_sglang import reasons
from hopper_mxfp4_sglang.hooks import choose_method
from hopper_mxfp4_sglang.layer import MoEMethod
from moe_checkpoints import (
    EXPERTS,
    FP8_INPUTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    LING,
    MIMO,
    MXFP4_INPUTS,
    QWEN3_MOE,
    TOP_K,
    auto_round,
    calls,
    compressed_tensors,
    expert_tensors,
    quark,
    reference,
    relative_l2,
)
from sglang_ranks import (
    Rank,
    deepseek_quant_config,
    of_model,
    prepare,
    restore,
    run,
)

TOKENS = 9
# From 0.5.18 on.
READS_COMPRESSED = hasattr(CompressedTensorsConfig, "_is_mxfp4_moe")
reads_compressed = pytest.mark.skipif(
    not READS_COMPRESSED, reason="this SGLang has no MXFP4 experts of compressed-tensors"
)
BF16_TOO = (
    "; activations are BF16, not the {}-bit ones that the checkpoint declares; stock SGLang too "
    "runs BF16 on Hopper"
)


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch):
    monkeypatch.setattr(layer_module, "taken", 0)
    monkeypatch.setattr(layer_module, "reported", 0)
    monkeypatch.setattr(reasons, "declined", set())


def compressed_config(how, hf_config=QWEN3_MOE):
    config = CompressedTensorsConfig.from_config(dict(how.quantization_config))
    return of_model(config, hf_config)


class Model(torch.nn.Module):
    """As much of SGLang's Qwen3MoeForCausalLM as has experts, with its own loader."""

    def __init__(self, rank, quant_config, **options):
        super().__init__()
        self.config, self.rank = SimpleNamespace(num_experts=EXPERTS), rank
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()
        with rank:
            for i in range(LAYERS):
                layer = torch.nn.Module()
                layer.mlp = torch.nn.Module()
                layer.mlp.experts = FusedMoE(
                    num_experts=EXPERTS,
                    top_k=TOP_K,
                    hidden_size=HIDDEN,
                    intermediate_size=INTERMEDIATE,
                    layer_id=i,
                    quant_config=quant_config,
                    prefix=f"model.layers.{i}.mlp.experts",
                    **options,
                )
                self.model.layers.append(layer)

    @property
    def experts(self):
        return [layer.mlp.experts for layer in self.model.layers]

    def load_weights(self, tensors, rename=lambda name: name):
        with self.rank, torch.inference_mode():
            Qwen3MoeForCausalLM.load_weights(
                self, ((rename(name), t.clone()) for name, t in tensors.items())
            )


def tensors_of(how, seed=0):
    return {k: t for layer in range(LAYERS) for k, t in expert_tensors(how, layer, seed).items()}


def stripped(name):
    """As the models do that look for the name that stock SGLang registers."""
    return name.replace("weight_packed", "weight")


# --- compressed-tensors ------------------------------------------------------------------------


@reads_compressed
@pytest.mark.parametrize("rename", [str, stripped], ids=["as it is", "stripped"])
@pytest.mark.parametrize(("size", "expert_parallel"), [(1, 1), (2, 1), (2, 2)])
def test_ranks_sum_to_the_reference(sm90_layout, rename, size, expert_parallel):
    how = compressed_tensors()
    tensors, call = tensors_of(how), calls()
    totals = [torch.zeros(TOKENS, HIDDEN) for _ in range(LAYERS)]
    for r in range(size):
        rank = Rank(size, r, expert_parallel)
        model = Model(rank, compressed_config(how))
        model.load_weights(tensors, rename)
        prepare(rank, model)
        kept = {"w13_weight" if rename is stripped else "w13_weight_packed", "w13_weight_scale"}
        for total, experts in zip(totals, model.experts, strict=True):
            assert experts.quant_method.family is GENERIC
            names = {name for name, _ in experts.named_parameters()}
            assert {name for name in names if name.startswith("w13")} == kept
            assert len(names) == 4
            total += run(rank, experts, *call).float()
    for layer, total in enumerate(totals):
        assert relative_l2(total, reference(how, tensors, call, layer)) < 5e-3


@reads_compressed
@pytest.mark.parametrize("restored", [True, False], ids=["restored first", "straight over"])
@pytest.mark.parametrize("rename", [str, stripped], ids=["as it is", "stripped"])
def test_it_reloads_in_place(rename, restored):
    how, rank, call = compressed_tensors(), Rank(), calls()
    model = Model(rank, compressed_config(how))
    model.load_weights(tensors_of(how), rename)
    prepare(rank, model)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    for seed in (1, 0):
        tensors = tensors_of(how, seed)
        if restored:
            restore(rank, model)
        model.load_weights(tensors, rename)
        prepare(rank, model)
        for layer, experts in enumerate(model.experts):
            y = run(rank, experts, *call)
            assert relative_l2(y, reference(how, tensors, call, layer)) < 5e-3
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == where


@reads_compressed
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (None, "; activations are BF16"),
        (MXFP4_INPUTS, BF16_TOO.format(4)),
        (FP8_INPUTS, BF16_TOO.format(8)),
    ],
    ids=["W4A16", "W4A4", "W4A8"],
)
def test_the_line_says_which_activations_run(caplog, inputs, said):
    caplog.set_level(logging.INFO, "hopper_mxfp4_sglang")
    how, rank = compressed_tensors(inputs), Rank()
    model = Model(rank, compressed_config(how))
    model.load_weights(tensors_of(how))
    prepare(rank, model)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hopper_mxfp4_sglang")]
    assert len(lines) == 1
    assert lines[0].startswith("hopper-mxfp4 takes over 2 MXFP4 MoE layers")
    assert lines[0].endswith(said)


@reads_compressed
def test_a_model_that_looks_for_neither_name():
    """SGLang's models skip what they don't know, and would serve zeros."""
    how, rank = compressed_tensors(), Rank()
    model = Model(rank, compressed_config(how))
    model.load_weights(tensors_of(how), lambda name: name.replace("weight_packed", "qweight"))
    with pytest.raises(ValueError, match="looks for neither w13_weight nor w13_weight_packed"):
        prepare(rank, model)


@reads_compressed
@pytest.mark.parametrize("rename", [str, stripped], ids=["as it is", "stripped"])
def test_dummy_weights_first(rename):
    """--load-format dummy fills parameters without their loaders, and RL brings weights later."""
    how, rank, call = compressed_tensors(), Rank(), calls()
    model = Model(rank, compressed_config(how))
    prepare(rank, model)
    assert not run(rank, model.experts[0], *call).any()
    tensors = tensors_of(how)
    restore(rank, model)
    model.load_weights(tensors, rename)
    prepare(rank, model)
    experts = model.experts[1]
    assert relative_l2(run(rank, experts, *call), reference(how, tensors, call, 1)) < 5e-3
    assert len(list(experts.named_parameters())) == 4


@reads_compressed
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_experts_that_are_left_out_stay_stock(monkeypatch, caplog, mode):
    """A draft head's, for one. Other weights by the same tool, too."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    how = compressed_tensors()
    said = dict(how.quantization_config)
    said["ignore"] = [*said["ignore"], "re:model.layers.1.mlp.experts.*"]
    config = of_model(CompressedTensorsConfig.from_config(said), QWEN3_MOE)
    rank = Rank()
    layer = Model(rank, compressed_config(how)).experts[0]
    stock = layer_module.FusedMoEMethodBase
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod

    with rank:
        stock = Mxfp4MoEMethod.__new__(Mxfp4MoEMethod)
        ours = choose_method(stock, config, layer, "model.layers.0.mlp.experts")
        assert type(ours) is MoEMethod
        assert choose_method(stock, config, layer, "model.layers.1.mlp.experts") is None
        other = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
        assert choose_method(other, config, layer, "model.layers.0.mlp.experts") is None
    assert not caplog.records


@reads_compressed
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "situ", "gemm1_alpha": 4.0}, "the activation is situ, and generic has"),
        ({"activation": "gelu"}, "the activation is gelu, and generic has a gated silu"),
        ({"gemm1_clamp_limit": 7.0}, "clamps to 7.0 after the activation"),  # Ling-3's
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": True},
            "has other rows of gate and up than generic's gate_up",
        ),
        ({"with_bias": True}, "SGLang's layer has biases, and generic none"),
        ({"apply_router_weight_on_input": True}, "this model wants their inputs weighted"),
    ],
)
def test_layers_it_declines(options, reason):
    known = inspect.signature(FusedMoE.__init__).parameters
    if not set(options) <= set(known):
        pytest.skip("this SGLang has no such layer")
    with pytest.raises(SystemExit, match=reason):
        Model(Rank(), compressed_config(compressed_tensors()), **options)


@pytest.mark.skipif(READS_COMPRESSED, reason="this SGLang has them")
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_sglang_that_has_none_gets_no_word(monkeypatch, caplog, mode):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    layer = FusedMoE.__new__(FusedMoE)
    torch.nn.Module.__init__(layer)
    config = compressed_config(compressed_tensors())
    with Rank():
        assert choose_method(object(), config, layer, "model.layers.0.mlp.experts") is None
    assert not caplog.records


def test_what_sglang_does_not_read():
    """Nor therefore the adapter: its methods for them would be hooked here once it does."""
    from sglang.srt.layers.quantization.auto_round import AutoRoundConfig
    from sglang.srt.layers.quantization.quark.quark import QuarkConfig

    with pytest.raises(ValueError, match="mx_fp"):
        AutoRoundConfig.from_config(dict(auto_round(16).quantization_config))
    config = QuarkConfig.from_config(quark().quantization_config | {"packed_modules_mapping": {}})
    name = "model.layers.0.mlp.experts"
    with Rank(), pytest.raises(RuntimeError, match="Unsupported FusedMoe scheme"):
        config.get_moe_scheme(FusedMoE.__new__(FusedMoE), name)


# --- fp8 with MXFP4 experts: MiMo and Ling -------------------------------------------------------


def fp8_layer(rank, hf_config, **options):
    config = deepseek_quant_config(hf_config, is_dsv4_fp4_experts=False)
    return Model(rank, config, **options)


def as_mimos_model_does(how, tensors):
    """SGLang's converts scales to floats and views weights as int8."""
    return {
        f"{k}_inv" if k.endswith(how.scale) else k: torch.exp2(t.float() - 127)
        if k.endswith(how.scale)
        else t.view(torch.int8)
        for k, t in tensors.items()
    }


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model_type", ["mimo_v2", "mimo_v2_flash"])
def test_mimo(caplog, sm90_layout, model_type, size):
    caplog.set_level(logging.INFO, "hopper_mxfp4_sglang")
    tensors, call = tensors_of(MIMO), calls()
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(size):
        rank = Rank(size, r)
        model = fp8_layer(rank, {"model_type": model_type})
        model.load_weights(as_mimos_model_does(MIMO, tensors))
        prepare(rank, model)
        assert model.experts[0].quant_method.family is GENERIC
        total += run(rank, model.experts[0], *call).float()
    assert relative_l2(total, reference(MIMO, tensors, call)) < 5e-3
    assert BF16_TOO.format(8) in caplog.text


def test_mimos_smallest_and_greatest_scales_survive_the_conversion():
    """Bytes 0 and 254; a subnormal float and one near the greatest."""
    tensors = tensors_of(MIMO)
    name = "model.layers.0.mlp.experts.0.gate_proj"
    tensors[f"{name}.weight_scale"][0, 0] = 0
    tensors[f"{name}.weight_scale"][1, 0] = 254
    rank = Rank()
    model = fp8_layer(rank, {"model_type": "mimo_v2"})
    model.load_weights(as_mimos_model_does(MIMO, tensors))
    scales = model.experts[0].w13_weight_scale_inv.data.view(torch.uint8)
    assert torch.equal(scales[0, :INTERMEDIATE], tensors[f"{name}.weight_scale"])


def test_ling_without_a_clamp():
    """As Ling-3.0-mini's, and most layers of the others; a clamped layer is declined above."""
    rank, tensors, call = Rank(), tensors_of(LING), calls()
    model = fp8_layer(rank, {"model_type": "bailing_hybrid"})
    model.load_weights(tensors)
    prepare(rank, model)
    experts = model.experts[0]
    assert experts.quant_method.swiglu == SwiGLU()
    assert relative_l2(run(rank, experts, *call), reference(LING, tensors, call)) < 5e-3


def test_lings_clamp_after_silu_is_declined():
    with pytest.raises(SystemExit, match=r"clamps to 7\.0 after the activation"):
        fp8_layer(Rank(), {"model_type": "bailing_hybrid"}, gemm1_clamp_limit=7.0)
