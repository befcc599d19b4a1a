"""When the adapter takes over and when it leaves vLLM alone, through vLLM's own configuration code."""

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config

import hopper_mxfp4_vllm
from hopper_mxfp4 import env
from hopper_mxfp4_vllm.moe import DeepseekV4Config, Experts, GptOssConfig, why_not
from hopper_mxfp4_vllm.selector import NAME, Selector
from models import configure, write_deepseek_v4_config


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def resolve(model, flag=None):
    """The name `vllm serve` resolves and the config object it makes."""
    config = configure(model, flag)
    return config.model_config.quantization, config.quant_config


FLAGS_AND_MODES = pytest.mark.parametrize(
    ("flag", "mode", "ours"),
    [
        (None, None, False),
        (None, "off", False),
        ("mxfp4", None, False),
        ("mxfp4", "on", False),
        (None, "auto", True),
        (None, "on", True),
        (NAME, None, True),
        (NAME, "off", True),
        (NAME, "auto", True),
    ],
)


@FLAGS_AND_MODES
def test_who_gets_a_deepseek_v4_checkpoint(tmp_path, monkeypatch, flag, mode, ours):
    if mode is not None:
        monkeypatch.setenv("HOPPER_MXFP4", mode)
    flag = "fp8" if flag == "mxfp4" else flag
    name, config = resolve(write_deepseek_v4_config(tmp_path), flag)
    stock = get_quantization_config("deepseek_v4_fp8")
    assert isinstance(config, stock)  # the models ask
    assert name == (NAME if ours else "deepseek_v4_fp8")
    assert type(config) is (DeepseekV4Config if ours else stock)


def test_draft_models_of_deepseek_v4():
    """vLLM gives a draft its target's quantisation by name, and another model_type."""
    draft = SimpleNamespace(model_type="deepseek_mtp")
    for method in ("fp8", "deepseek_v4_fp8"):
        assert Selector.override_quantization_method({"quant_method": method}, NAME, draft) == NAME


@FLAGS_AND_MODES
def test_who_gets_a_gpt_oss_checkpoint(checkpoint, monkeypatch, flag, mode, ours):
    if mode is not None:
        monkeypatch.setenv("HOPPER_MXFP4", mode)
    name, config = resolve(checkpoint, flag)
    if ours:
        assert name == NAME
        assert type(config) is GptOssConfig
        assert config.get_name() == "gpt_oss_mxfp4"  # vLLM's loader goes by it
    else:
        assert name == "gpt_oss_mxfp4"
        assert type(config) is GptOssMxfp4Config


def test_a_bad_mode_stops_the_start(checkpoint, monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4", "yes")
    with pytest.raises(ValueError, match="HOPPER_MXFP4='yes' is not one of off, auto, on"):
        resolve(checkpoint)


def test_the_flag_on_another_checkpoint_stops_the_start(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match="needs an MXFP4 checkpoint of GPT-OSS or DeepSeek-V4, and this one is not quantised",
    ):
        configure(tmp_path / "plain", NAME)
    with pytest.raises(ValueError, match="this one is 'deepseek_v3' with quant_method 'fp8'"):
        Selector.override_quantization_method(
            {"quant_method": "fp8"}, NAME, SimpleNamespace(model_type="deepseek_v3")
        )


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_other_checkpoints_stay_stock_without_the_flag(monkeypatch, mode):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    for method, model_type in (
        ("fp8", "deepseek_v3"),
        ("mxfp4", "kimi_k3"),
        ("awq", "llama"),
        ("quark", "deepseek_v4"),
        ("mxfp4", "deepseek_v4"),
    ):
        assert (
            Selector.override_quantization_method(
                {"quant_method": method}, None, SimpleNamespace(model_type=model_type)
            )
            is None
        )


def test_registering_again_changes_nothing():
    hopper_mxfp4_vllm.register()
    before = list(QUANTIZATION_METHODS)
    hopper_mxfp4_vllm.register()
    assert before == QUANTIZATION_METHODS
    assert QUANTIZATION_METHODS.count(NAME) == 1
    assert get_quantization_config(NAME) is Selector
    assert get_quantization_config("gpt_oss_mxfp4") is GptOssMxfp4Config


def test_the_config_reaches_workers(checkpoint):
    _, config = resolve(checkpoint, NAME)
    assert type(pickle.loads(pickle.dumps(config))) is GptOssConfig


def moe_config(**changes):
    parallel = {"use_batched_activation_format": False, "use_passthrough_all2all": False}
    parallel = SimpleNamespace(**parallel | changes.pop("parallel", {}))
    fields = {
        "in_dtype": torch.bfloat16,
        "moe_backend": "auto",
        "is_lora_enabled": False,
        "activation": MoEActivation.SWIGLUOAI,
        "moe_parallel_config": parallel,
        "num_local_experts": 4,
        "hidden_dim": 192,
        "intermediate_size_per_partition": 192,
    }
    return SimpleNamespace(**fields | changes)


def test_a_layer_it_can_serve():
    assert why_not(moe_config(), MoEActivation.SWIGLUOAI) is None


@pytest.mark.parametrize(
    ("changes", "variables", "reason"),
    [
        ({"in_dtype": torch.float16}, {}, "the model in torch.float16; pass --dtype bfloat16"),
        ({"moe_backend": "marlin"}, {}, "--moe-backend marlin asks for another kernel"),
        ({"is_lora_enabled": True}, {}, "no LoRA; drop --enable-lora"),
        (
            {"activation": MoEActivation.RELU2_NO_MUL},
            {},
            "this checkpoint family has MoEActivation.SWIGLUOAI",
        ),
        (
            {"parallel": {"use_batched_activation_format": True}},
            {},
            "choose another --all2all-backend",
        ),
        ({"parallel": {"use_passthrough_all2all": True}}, {}, "choose another --all2all-backend"),
        ({}, {"VLLM_BATCH_INVARIANT": "1"}, "unset VLLM_BATCH_INVARIANT"),
        ({}, {"HOPPER_MXFP4_KERNEL": "flashinfer"}, "kernel flashinfer can't run"),
    ],
)
def test_layers_it_declines(monkeypatch, changes, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reason in why_not(moe_config(**changes), MoEActivation.SWIGLUOAI)


def test_declining_stops_the_start_or_stays_stock(monkeypatch):
    """Unless told `auto`, a layer that can't be taken over must not quietly run on something else."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = moe_config(moe_backend="marlin")
    config, stock = GptOssConfig(), object()
    monkeypatch.setattr(GptOssMxfp4Config, "get_quant_method", lambda *args: stock)
    with pytest.raises(
        ValueError,
        match=r"can't take over model\.layers\.0\.mlp\.experts: --moe-backend marlin .* HOPPER_MXFP4=auto",
    ):
        config.get_quant_method(layer, "model.layers.0.mlp.experts")
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    assert config.get_quant_method(layer, "model.layers.0.mlp.experts") is stock


def test_layers_other_than_experts_are_stock(monkeypatch):
    monkeypatch.setattr(
        GptOssMxfp4Config, "get_quant_method", lambda self, layer, prefix: ("stock", layer, prefix)
    )
    layer = torch.nn.Linear(2, 2)
    assert GptOssConfig().get_quant_method(layer, "x") == ("stock", layer, "x")


def test_expert_map_sends_other_ranks_and_padding_nowhere(monkeypatch):
    """Global ids become local ones; -1, which vLLM gives padding rows, must not wrap round to the map's last entry."""
    seen = {}
    monkeypatch.setattr(
        "hopper_mxfp4_vllm.moe.fused_moe", lambda x, ids, *args, **kwargs: seen.update(ids=ids)
    )
    experts = Experts.__new__(Experts)
    experts.prepared = SimpleNamespace(w13=torch.empty(0))
    empty = torch.empty(0, dtype=torch.bfloat16)
    experts.apply(
        output=empty,
        hidden_states=empty,
        w1=empty,
        w2=empty,
        topk_weights=torch.ones(3, 2),
        topk_ids=torch.tensor([[0, 3], [-1, 2], [1, -1]], dtype=torch.int32),
        activation=MoEActivation.SWIGLUOAI,
        global_num_experts=4,
        expert_map=torch.tensor([-1, -1, 0, 1], dtype=torch.int32),
        a1q_scale=None,
        a2_scale=None,
        workspace13=empty,
        workspace2=empty,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    assert seen["ids"].tolist() == [[-1, 1], [-1, 0], [-1, -1]]
    assert seen["ids"].dtype == torch.int32
