"""Checkpoints by whatever tool, through vLLM's own model, loaders and modular kernel.

Each is written in full as the tool writes it (tests/checkpoints/moe_checkpoints.py), and its
experts' outputs are compared with `reference_moe`.
"""

import pickle
import re

import pytest
import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.bailing_moe_v3 import (
    _configure_ling_fp8_quant_config as configure_ling,
)

from hopper_mxfp4 import GENERIC, SwiGLU
from hopper_mxfp4_vllm import configs as configs_module
from hopper_mxfp4_vllm import selection
from hopper_mxfp4_vllm.configs import CONFIGS
from hopper_mxfp4_vllm.selection import NAME
from models import (
    DEVICE,
    Rank,
    configure,
    experts_of,
    load,
    plain_moe,
    poisoned_memory,
    prepared,
    run,
)
from moe_checkpoints import (
    EXPERTS,
    FP4_INPUTS,
    FP8_INPUTS,
    HIDDEN,
    LING,
    MIMO,
    MXFP4_INPUTS,
    auto_round,
    calls,
    compressed_tensors,
    expert_tensors,
    quark,
    reference,
    relative_l2,
    write,
)

TOKENS = 9
HAS_W4A8 = hasattr(get_quantization_config("compressed-tensors"), "_is_mxfp4_w4a8_fp8")
NOT_4_BITS = (
    "; activations are BF16, not the 4-bit ones that the checkpoint declares; stock vLLM too runs "
    "BF16 on Hopper"
)
# Each with the end of the line that says what was taken over.
WHOLE = {
    "compressed-tensors W4A16": (compressed_tensors(), "; activations are BF16"),
    "compressed-tensors W4A4": (compressed_tensors(MXFP4_INPUTS), NOT_4_BITS),
    "quark W4A16": (quark(), "; activations are BF16"),
    "auto-round W4A16": (auto_round(16), "; activations are BF16"),
    "auto-round W4A4": (auto_round(4), NOT_4_BITS),
}
whole = pytest.mark.parametrize(("how", "said"), WHOLE.values(), ids=WHOLE)


@pytest.fixture
def lines(monkeypatch):
    """What the adapter logs, filled in."""
    found = []
    for module in (configs_module, selection):
        for name in ("info_once", "warning_once"):
            monkeypatch.setattr(
                module.logger, name, lambda line, *values: found.append(line % values)
            )
    return found


@pytest.fixture
def stock(monkeypatch):
    """Stock vLLM's answer for experts, without its search for a kernel that a CPU lacks."""
    asked = []

    def answer(self, layer, prefix):
        if not isinstance(layer, RoutedExperts):
            return original(self, layer, prefix)
        asked.append(prefix)
        return UnquantizedFusedMoEMethod(layer.moe_config)

    for name in ("compressed-tensors", "quark", "inc", "fp8"):
        config = get_quantization_config(name)
        original = config.get_quant_method
        monkeypatch.setattr(config, "get_quant_method", answer)
    return asked


@pytest.fixture
def padded(monkeypatch):
    """The reference kernel with the flashinfer kernel's padding: 192 columns a rank become 256."""
    from dataclasses import replace

    from hopper_mxfp4.contract import PLAIN
    from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel

    monkeypatch.setattr(
        ReferenceKernel, "layout", lambda self, device: replace(PLAIN, name="padded", multiple=128)
    )


def loaded(rank, tensors):
    """vLLM's own Qwen3MoeForCausalLM, and its layers' experts."""
    with rank as config:
        model = initialize_model(vllm_config=config)
    with rank as config:
        load(model, config, tensors)
    return model, [m for m in model.modules() if isinstance(m, RoutedExperts)]


@whole
def test_ranks_sum_to_the_reference(tmp_path, monkeypatch, padded, lines, how, said):
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    tensors = write(tmp_path, how)
    config, call = pickle.loads(pickle.dumps(configure(tmp_path, None))), calls()
    for size, expert_parallel in ((1, False), (2, False), (2, True)):
        totals = [torch.zeros(TOKENS, HIDDEN) for _ in range(2)]
        for r in range(size):
            rank = Rank(config, size, r, expert_parallel)
            _, layers = loaded(rank, tensors)
            for total, experts in zip(totals, layers, strict=True):
                assert experts.quant_method.family is GENERIC
                assert experts.quant_method.supports_eplb
                part = run(rank, experts, *call)
                assert not part[5].any()  # a row of padding
                total += part.float()
        for layer, total in enumerate(totals):
            assert relative_l2(total, reference(how, tensors, call, layer)) < 5e-3
    assert lines
    assert all(
        line.startswith("hopper-mxfp4 takes over the MXFP4 MoE layers with kernel reference")
        and line.endswith(said)
        for line in lines
    )


@whole
@pytest.mark.parametrize(
    ("mode", "flag", "ours"),
    [("off", None, False), ("auto", None, True), ("on", "its own", True), ("off", NAME, True)],
)
def test_who_gets_it(tmp_path, monkeypatch, how, said, mode, flag, ours):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    write(tmp_path, how)
    method = how.quantization_config["quant_method"]
    name = {"auto-round": "inc"}.get(method, method)
    config = configure(tmp_path, name if flag == "its own" else flag)
    assert config.model_config.quantization == (NAME if ours else name)
    stock = get_quantization_config(name)
    assert isinstance(config.quant_config, stock)  # some of vLLM's code asks
    assert (type(config.quant_config) is stock) is not ours
    assert config.quant_config.get_name() == name


@pytest.mark.parametrize(
    ("how", "size", "r"),
    [(compressed_tensors(), 1, 0), (auto_round(), 2, 1)],
    ids=["compressed-tensors", "auto-round"],
)
def test_packed_weights_reload_in_place(tmp_path, monkeypatch, how, size, r):
    """Stock renames the parameters once they are loaded, and can't load them again."""
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    tensors = write(tmp_path / "one", how)
    other = write(tmp_path / "other", how, seed=7)
    config, call = configure(tmp_path / "one", None), calls()
    rank, fresh = Rank(config, size, r), Rank(config, size, r)
    model, (experts, _) = loaded(rank, tensors)
    where = {name: p.data_ptr() for name, p in experts.named_parameters()}
    first = run(rank, experts, *call)
    wanted = run(fresh, loaded(fresh, other)[1][0], *call)
    assert relative_l2(first, wanted.float()) > 0.1
    for weights, result in ((other, wanted), (tensors, first)):
        model.load_weights(iter({name: t.clone() for name, t in weights.items()}.items()))
        with rank as vllm_config:  # the experts alone: stock attention can't be prepared twice
            process_weights_after_loading(experts, vllm_config.model_config, DEVICE)
        assert torch.equal(run(rank, experts, *call), result)
        assert {name: p.data_ptr() for name, p in experts.named_parameters()} == where


@pytest.mark.parametrize(("size", "r"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("how", [compressed_tensors(), quark()], ids=["packed", "weight"])
def test_vllms_layerwise_reload(tmp_path, monkeypatch, padded, how, size, r):
    """Into fresh memory that holds anything, and from there into the first parameters."""
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    tensors = write(tmp_path / "one", how)
    other = write(tmp_path / "other", how, seed=7)
    config, call = configure(tmp_path / "one", None), calls()
    rank, fresh = Rank(config, size, r), Rank(config, size, r)
    wanted = run(fresh, loaded(fresh, other)[1][0], *call)
    with rank as vllm_config:
        model = initialize_model(vllm_config=vllm_config)
        reload.record_metadata_for_reloading(model)
    with rank as vllm_config:
        load(model, vllm_config, tensors)
        experts = experts_of(model)
    where = {name: p.data_ptr() for name, p in experts.named_parameters()}
    with rank as vllm_config, poisoned_memory():
        reload.initialize_layerwise_reload(model)
        model.load_weights(iter({name: t.clone() for name, t in other.items()}.items()))
        reload.finalize_layerwise_reload(model, vllm_config.model_config)
    assert {name: p.data_ptr() for name, p in experts.named_parameters()} == where
    assert torch.equal(run(rank, experts, *call), wanted)


DECLINED = {
    "quark W4A4": (quark(FP4_INPUTS), "fp4"),
    "quark W4A8": (
        quark(FP4_INPUTS | {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}),
        "fp8_e4m3",
    ),
}
if HAS_W4A8:
    DECLINED["compressed-tensors W4A8"] = (compressed_tensors(FP8_INPUTS), "fp8")


@pytest.mark.parametrize(("how", "dtype"), DECLINED.values(), ids=DECLINED)
@pytest.mark.parametrize(("mode", "flag"), [("on", None), ("off", NAME), ("auto", None)])
def test_quantised_activations(tmp_path, monkeypatch, lines, stock, how, dtype, mode, flag):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    write(tmp_path, how)
    config = configure(tmp_path, flag)
    reason = f"declares {dtype} activations for its experts in a form that it does not have"
    if mode == "auto":
        experts = experts_of(plain_moe(Rank(config)))
        assert type(experts.quant_method) is UnquantizedFusedMoEMethod
        assert stock == ["model.layers.0.mlp.experts"]
        assert "leaves the MXFP4 MoE layers to stock vLLM" in lines[0]
        assert reason in lines[0]
    else:
        with pytest.raises(ValueError, match=reason):
            plain_moe(Rank(config))
        assert not stock


@pytest.mark.skipif(HAS_W4A8, reason="this vLLM runs 8-bit activations where they are declared")
def test_8_bit_activations_that_an_older_vllm_ignores(tmp_path, monkeypatch, lines):
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    write(tmp_path, compressed_tensors(FP8_INPUTS))
    plain_moe(Rank(configure(tmp_path, None)))
    assert lines[0].endswith(NOT_4_BITS.replace("4-bit", "8-bit"))


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
OTHERS = {
    "compressed-tensors INT4": compressed_tensors().quantization_config
    | {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    },
    "quark FP8": quark().quantization_config
    | {
        "global_quant_config": {
            "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
            "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
        }
    },
    "auto-round INT4": auto_round().quantization_config
    | {"data_type": "int", "packing_format": "auto_round:auto_gptq", "extra_config": {}},
    "auto-round MXFP8": auto_round().quantization_config
    | {"bits": 8, "act_bits": 8, "extra_config": {}},
    "fp8": {k: v for k, v in MIMO.quantization_config.items() if k != "store_dtype"},
}


@pytest.mark.parametrize("said", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_other_weights_by_the_same_tools_stay_stock(tmp_path, monkeypatch, lines, said, mode):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    write(tmp_path, compressed_tensors(), quantization_config=said)
    config = configure(tmp_path, None)
    assert type(config.quant_config) not in CONFIGS.values()
    assert not lines
    with pytest.raises(ValueError, match="serves MXFP4 checkpoints of gpt_oss"):
        configure(tmp_path, NAME)


@pytest.mark.parametrize(
    "how",
    [
        compressed_tensors(),
        quark(),
        auto_round(),
        MIMO,
    ],
    ids=["compressed-tensors", "quark", "auto-round", "mimo"],
)
def test_experts_that_are_left_out_stay_stock(tmp_path, monkeypatch, stock, how):
    """A draft head's, for one: the tools leave it as it was."""
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    names = [
        f"model.layers.1.mlp.experts.{e}.{name}_proj"
        for e in range(EXPERTS)
        for name in ("gate", "up", "down")
    ]
    said, left_out = dict(how.quantization_config), "model.layers.1.mlp.experts"
    if "ignore" in said:
        said["ignore"] = [*said["ignore"], *names]
    elif "exclude" in said:
        said["exclude"] = [*said["exclude"], *names]
    elif "extra_config" in said:
        said["extra_config"] = said["extra_config"] | {left_out: {"bits": 16}}
    else:
        said["ignored_layers"] = names
    write(tmp_path, how, quantization_config=said)
    rank = Rank(configure(tmp_path, None))
    assert experts_of(plain_moe(rank)).quant_method.family is GENERIC
    assert not stock
    ours = experts_of(plain_moe(rank, prefix=left_out)).quant_method
    assert type(ours) is UnquantizedFusedMoEMethod
    assert stock == [left_out]


# --- MiMo and Ling: fp8 with MXFP4 experts ------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mimo_v2", "mimo_v2_flash"])
def test_mimo(tmp_path, monkeypatch, lines, model_type):
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    write(tmp_path, MIMO)
    tensors, call = expert_tensors(MIMO), calls()
    config = configure(tmp_path, None)
    config.model_config.hf_config.model_type = model_type
    total = torch.zeros(TOKENS, HIDDEN)
    for r in range(2):
        rank = Rank(config, 2, r)
        total += run(rank, prepared(rank, plain_moe(rank), tensors), *call).float()
    assert relative_l2(total, reference(MIMO, tensors, call)) < 5e-3
    assert lines[0].endswith(NOT_4_BITS.replace("4-bit", "8-bit"))


def ling(tmp_path, **changes):
    """What vLLM makes of such a checkpoint, and its model of the quantisation."""
    write(tmp_path, LING, **changes)
    config = configure(tmp_path, None)
    config.model_config.hf_config.model_type = "bailing_hybrid"
    configure_ling(config.quant_config, config.model_config.hf_config)
    return config


@pytest.mark.parametrize("limits", [None, [0.0, 0.0]])
def test_ling_without_a_clamp(tmp_path, monkeypatch, lines, limits):
    """As Ling-3.0-mini's config, and most layers of the others."""
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    config = ling(tmp_path, expert_swiglu_limit_list=limits)
    tensors, call, rank = expert_tensors(LING), calls(), Rank(config)
    experts = prepared(rank, plain_moe(rank), tensors)
    assert experts.quant_method.swiglu == SwiGLU()
    assert relative_l2(run(rank, experts, *call), reference(LING, tensors, call)) < 5e-3
    assert lines[0].endswith(NOT_4_BITS.replace("4-bit", "8-bit"))


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_lings_clamp_after_silu_is_declined(tmp_path, monkeypatch, lines, stock, mode):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    config = ling(tmp_path, expert_swiglu_limit_list=[0.0, 7.0])
    reason = r"the model clamps to 7.0 after SiLU (expert_swiglu_limit_list), and it clamps before"
    if mode == "on":
        with pytest.raises(ValueError, match=re.escape(reason)):
            plain_moe(Rank(config), swiglu_limit=7.0)
        assert not stock
    else:
        experts = experts_of(plain_moe(Rank(config), swiglu_limit=7.0))
        assert type(experts.quant_method) is UnquantizedFusedMoEMethod
        assert reason in lines[0]


# --- any other model: its layer says what it has ------------------------------------------------


def test_a_clamp_that_the_layer_names(tmp_path, monkeypatch):
    """Before SiLU, as vLLM's layers mean it."""
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    how = compressed_tensors()
    write(tmp_path, how)
    rank = Rank(configure(tmp_path, None))
    tensors, call = expert_tensors(how), calls()
    experts = prepared(rank, plain_moe(rank, swiglu_limit=0.5), tensors)
    wanted = reference(how, tensors, call, swiglu=SwiGLU(limit=0.5))
    assert relative_l2(run(rank, experts, *call), wanted) < 5e-3
    assert relative_l2(wanted, reference(how, tensors, call)) > 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "swiglustep"}, "activation is MoEActivation.SWIGLUSTEP, and family gen"),
        ({"activation": "situ"}, "activation is MoEActivation.SITU, and family generic has"),
        ({"activation": "gelu"}, "activation is MoEActivation.GELU, and family generic has"),
        ({"activation": "swigluoai"}, "activation is MoEActivation.SWIGLUOAI, and family generic"),
        ({"has_bias": True}, "the layer has a bias, and family generic has none"),
        ({"apply_router_weight_on_input": True}, "this model wants their input weighted"),
    ],
)
def test_layers_of_other_models_it_declines(tmp_path, monkeypatch, options, reason):
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    write(tmp_path, compressed_tensors())
    rank = Rank(configure(tmp_path, None))
    with pytest.raises(ValueError, match=re.escape(reason)):
        plain_moe(rank, **options)
