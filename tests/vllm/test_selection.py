"""When the adapter takes over and when it leaves vLLM alone.

All through vLLM's own configuration code.
"""

import json
import logging
import pickle
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from vllm.config.quantization import QuantizationConfigArgs, QuantSpec
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config

import hopper_mxfp4_vllm
from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, LayerShape, SwiGLU, env
from hopper_mxfp4_vllm import selection
from hopper_mxfp4_vllm.configs import DeepseekV4Config, GptOssConfig
from hopper_mxfp4_vllm.experts import Experts
from hopper_mxfp4_vllm.layer import GptOssMethod
from hopper_mxfp4_vllm.reasons import Declined, server_decline_reason, serving_kernel
from hopper_mxfp4_vllm.selection import NAME, Order, Selector
from models import DEVICE, Rank, configure, write_deepseek_v4_config


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def hf_config(model_type, quant_method, **more):
    said = {"quant_method": quant_method, "activation_scheme": "dynamic"} | more
    return SimpleNamespace(model_type=model_type, quantization_config=said)


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
        ("mxfp4", "off", False),
        ("mxfp4", "auto", True),  # says what the checkpoint is, and asks for nobody's kernel
        ("mxfp4", "on", True),
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
    for method in ("fp8", "deepseek_v4_fp8"):
        draft = hf_config("deepseek_mtp", method)
        assert Selector.override_quantization_method({"quant_method": method}, NAME, draft) == NAME
        made = Selector.from_config(draft.quantization_config)
        assert type(made) is DeepseekV4Config


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("flag", [None, "fp8"])
def test_draft_models_of_others(monkeypatch, mode, flag):
    """DeepSeek-V3's draft heads have the same model_type and the name of their target, fp8."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    draft = hf_config("deepseek_mtp", "fp8")
    assert Selector.override_quantization_method({"quant_method": "fp8"}, flag, draft) is None


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
        match="needs a checkpoint with MXFP4 experts, and this one is not quantised",
    ):
        configure(tmp_path / "plain", NAME)
    with pytest.raises(ValueError, match="this one is 'deepseek_v3' with quant_method 'fp8'"):
        Selector.override_quantization_method(
            {"quant_method": "fp8"}, NAME, hf_config("deepseek_v3", "fp8")
        )


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_other_checkpoints_stay_stock_without_the_flag(monkeypatch, mode):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    lines = []
    monkeypatch.setattr(selection.logger, "warning_once", lambda *line: lines.append(line))
    for method, model_type in (
        ("fp8", "deepseek_v3"),
        ("mxfp4", "kimi_k3"),
        ("awq", "llama"),
        ("quark", "deepseek_v4"),
        ("mxfp4", "deepseek_v4"),
    ):
        assert (
            Selector.override_quantization_method(
                {"quant_method": method}, None, hf_config(model_type, method)
            )
            is None
        )
    told = [model_type for _, model_type in lines]
    assert told == ["kimi_k3", "deepseek_v4"]  # MXFP4 experts that someone may think are served


def test_registering_again_changes_nothing():
    hopper_mxfp4_vllm.register()
    before = list(QUANTIZATION_METHODS)
    hopper_mxfp4_vllm.register()
    assert before == QUANTIZATION_METHODS
    assert QUANTIZATION_METHODS.count(NAME) == 1
    assert get_quantization_config(NAME) is Selector
    assert get_quantization_config("gpt_oss_mxfp4") is GptOssMxfp4Config


def test_registering_is_light():
    """Every vLLM process registers the plugin, also those that never see a model of ours."""
    code = """
        import sys
        import hopper_mxfp4_vllm
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        before = set(sys.modules)
        hopper_mxfp4_vllm.register()
        assert "hopper_mxfp4" in QUANTIZATION_METHODS
        print(*(m for m in set(sys.modules) - before if m.startswith(("vllm.", "hopper_mxfp4_"))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["hopper_mxfp4_vllm.selection"]


def test_the_config_reaches_workers(checkpoint):
    _, config = resolve(checkpoint, NAME)
    assert type(pickle.loads(pickle.dumps(config))) is GptOssConfig


def test_the_order_reaches_processes_without_our_variables(checkpoint, monkeypatch, stock):
    """Ray hands vLLM's own variables on to its actors, not ours."""
    for name, value in (
        ("HOPPER_MXFP4", "auto"),
        ("HOPPER_MXFP4_KERNEL", "flashinfer"),
        ("HOPPER_MXFP4_BATCH_INVARIANT", "1"),
    ):
        monkeypatch.setenv(name, value)
    sent = pickle.dumps(configure(checkpoint))
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    arrived = pickle.loads(sent)
    order = Order("gpt_oss_mxfp4", True, "flashinfer", batch_invariant=True)
    assert arrived.quant_config.order == order
    # `auto`, and the kernel that was asked for can't run here.
    assert gpt_oss_layer(arrived) is stock
    # A draft's config is made in the worker, from the Hugging Face config that was sent.
    again = Selector.from_config(arrived.model_config.hf_config.quantization_config)
    assert type(again) is GptOssConfig
    assert again.order == order


def moe_config(**changes):
    parallel = SimpleNamespace(**{"all2all_backend": "a2a"} | changes.pop("parallel", {}))
    fields = {
        "in_dtype": torch.bfloat16,
        "moe_backend": "auto",
        "has_bias": True,
        "activation": MoEActivation.SWIGLUOAI,
        "moe_parallel_config": parallel,
        "num_local_experts": 4,
        "hidden_dim": 192,
        "intermediate_size_per_partition": 192,
    }
    return SimpleNamespace(**fields | changes)


def decline_reason(moe, shape, family, swiglu):
    try:
        serving_kernel(moe, shape, family, swiglu, DEVICE)
    except Declined as declined:
        return str(declined)
    return None


def gpt_oss_decline_reason(moe):
    return decline_reason(moe, LayerShape(4, 192, 192), GPT_OSS, SwiGLU(1.702, 1.0, 7.0))


def test_a_layer_it_can_serve(monkeypatch):
    assert gpt_oss_decline_reason(moe_config()) is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert gpt_oss_decline_reason(moe_config()) is None


@pytest.mark.parametrize(
    ("changes", "variables", "reason"),
    [
        ({"in_dtype": torch.float16}, {}, "the model in torch.float16; pass --dtype bfloat16"),
        ({"moe_backend": "marlin"}, {}, "--moe-backend marlin asks for another kernel"),
        (
            {"activation": MoEActivation.RELU2_NO_MUL},
            {},
            "family gpt_oss has SwiGLU(alpha=1.702, beta=1.0, limit=7.0)",
        ),
        ({"has_bias": False}, {}, "the layer has no bias, and family gpt_oss has one"),
        (
            {"parallel": {"use_passthrough_all2all": True}},
            {},
            "--all2all-backend a2a wants experts",
        ),
        ({"parallel": {"use_moonep_kernels": True}}, {}, "--all2all-backend a2a wants experts"),
        ({}, {"HOPPER_MXFP4_KERNEL": "flashinfer"}, "kernel flashinfer can't run"),
    ],
)
def test_layers_it_declines(monkeypatch, changes, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reason in gpt_oss_decline_reason(moe_config(**changes))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (None, "name the modules that yours change with --lora-target-modules, without experts"),
        (["q_proj", "o_proj"], None),
        (["gate_up_proj", "router"], None),  # a dense layer's; GPT-OSS's experts are no such
        (["o_proj", "experts"], "--lora-target-modules experts lets adapters change the experts"),
        (["model.layers.0.mlp.experts"], "model.layers.0.mlp.experts lets adapters change"),
        (["experts.0.gate_proj", "experts.w1"], "--lora-target-modules experts.0.gate_proj expe"),
    ],
)
def test_adapters(checkpoint, targets, reason):
    """vLLM makes room for adapters in every module that is a target."""
    assert type(gpt_oss_layer(configure(checkpoint))) is GptOssMethod
    config = configure(checkpoint, enable_lora=True, lora_target_modules=targets)
    if reason is None:
        assert type(gpt_oss_layer(config)) is GptOssMethod
    else:
        with pytest.raises(ValueError, match=reason):
            gpt_oss_layer(config)


def test_shards_that_cut_a_scales_block():
    """V4.1's experts of 2304 over 16 ranks: 144 columns, four and a half blocks of 32."""
    reason = decline_reason(
        moe_config(activation=MoEActivation.SILU, has_bias=False),
        LayerShape(4, 192, 144),
        DEEPSEEK_V4,
        SwiGLU(),
    )
    assert "144 columns of an expert, no multiple of 32" in reason
    assert "smaller --tensor-parallel-size or --enable-expert-parallel" in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cpu_offload_gb": 1}, "drop --cpu-offload-gb and --offload-group-size"),
        ({"offload_group_size": 2}, "drop --cpu-offload-gb and --offload-group-size"),
    ],
)
def test_servers_it_declines(checkpoint, options, reason):
    assert server_decline_reason(configure(checkpoint)) is None
    assert reason in server_decline_reason(configure(checkpoint, **options))


def test_activations_it_declines(checkpoint):
    config = configure(checkpoint)
    asked = QuantizationConfigArgs(moe=QuantSpec(activation="mxfp8"))
    config.model_config.quantization_config = asked  # vLLM 0.29 takes no such argument with ours
    reason = server_decline_reason(config)
    assert "--quantization-config.moe.activation asks for mxfp8" in reason
    assert "BF16 activations and fp8_per_block_dynamic; drop it, or ask for that" in reason
    for spec in (None, QuantSpec(activation="fp8_per_block_dynamic")):
        config.model_config.quantization_config = QuantizationConfigArgs(moe=spec)
        assert server_decline_reason(config) is None


@pytest.mark.skipif(
    not hasattr(QuantizationConfig, "online_quantization_config"),
    reason="this vLLM lets nothing be composed with a quantised checkpoint",
)
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"moe": {"activation": "mxfp8"}}, "quantization-config.moe.activation asks for"),
        ({"moe": {"weight": "fp8_per_block_static"}}, "leave them out of its moe and targets"),
        ({"targets": {"re:.*experts": "mxfp8"}}, "leave them out of its moe and targets"),
        ({"targets": {"re:.*attn": "mxfp8"}}, None),
    ],
)
def test_experts_quantised_anew(checkpoint, monkeypatch, asked, reason):
    """vLLM composes `--quantization-config` with what a checkpoint is, from 0.33 on."""
    config = configure(checkpoint, quantization_config=asked)
    if reason is None:
        assert type(gpt_oss_layer(config)) is GptOssMethod
    else:
        with pytest.raises(ValueError, match=reason):
            gpt_oss_layer(config)


def test_elastic_ep_is_declined_at_the_start(checkpoint):
    config = configure(checkpoint)
    config.parallel_config.enable_elastic_ep = True  # vLLM wants EPLB and GPUs for it
    assert "drop --enable-elastic-ep" in server_decline_reason(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_HUMMING_INPUT_QUANT_CONFIG", '{"dtype": "float8e4m3"}'),
        ("VLLM_MARLIN_INPUT_DTYPE", "fp8"),
    ],
)
def test_precisions_asked_of_other_kernels(checkpoint, monkeypatch, name, value):
    config = configure(checkpoint)
    monkeypatch.setenv(name, value)
    reason = server_decline_reason(config)
    assert f"{name}=" in reason
    assert "which is for vLLM's own kernels; unset it, and set HOPPER_MXFP4_ACTIVATIONS" in reason


STOCK = object()


@pytest.fixture
def stock(monkeypatch):
    """What vLLM's own configs give, without its search for a kernel of its own."""
    for config in (GptOssMxfp4Config, get_quantization_config("deepseek_v4_fp8")):
        monkeypatch.setattr(config, "get_quant_method", lambda *args: STOCK)
    return STOCK


def gpt_oss_layer(config, **changes):
    """What the config of that server gives for a layer."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = moe_config(**changes)
    with Rank(config) as vllm_config:
        return vllm_config.quant_config.get_quant_method(layer, "model.layers.0.mlp.experts")


@pytest.mark.parametrize("flag", [None, NAME])
def test_declining_stops_the_start_or_stays_stock(checkpoint, monkeypatch, stock, flag):
    """Without `auto`, a layer that can't be taken over must not quietly run on something else."""
    monkeypatch.setenv("HOPPER_MXFP4", "on" if flag is None else "off")
    config = configure(checkpoint, flag)
    with pytest.raises(
        ValueError,
        match=r"can't take over model\.layers\.0\.mlp\.experts: --moe-backend marlin .* "
        r"HOPPER_MXFP4=auto",
    ):
        gpt_oss_layer(config, moe_backend="marlin")
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    assert gpt_oss_layer(configure(checkpoint, flag), moe_backend="marlin") is stock


@pytest.mark.parametrize("offload", [{"cpu_offload_gb": 1}, {"offload_group_size": 2}])
def test_offloading_stops_the_start_or_stays_stock(checkpoint, monkeypatch, stock, offload):
    with pytest.raises(ValueError, match="experts: offloading exchanges the experts' weights"):
        gpt_oss_layer(configure(checkpoint, **offload))
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    assert gpt_oss_layer(configure(checkpoint, **offload)) is stock


def test_a_vllm_that_lacks_what_a_layer_needs(checkpoint, monkeypatch, stock):
    """A later vLLM may rename anything: `auto` says so and stays stock, `on` stops."""
    monkeypatch.setattr(
        "hopper_mxfp4_vllm.configs.serving_kernel",
        lambda *args, **kwargs: SimpleNamespace().renamed,
    )
    with pytest.raises(ValueError, match=r"can't take over .*AttributeError.*renamed"):
        gpt_oss_layer(configure(checkpoint))
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    assert gpt_oss_layer(configure(checkpoint)) is stock


@pytest.fixture
def a_later_vllm(monkeypatch):
    """One that no longer has a name which layer.py imports."""
    monkeypatch.setitem(sys.modules, "hopper_mxfp4_vllm.configs", None)


@pytest.mark.parametrize("flag", [None, "mxfp4"])
def test_auto_survives_a_vllm_that_lacks_an_import(checkpoint, monkeypatch, a_later_vllm, flag):
    lines = []
    monkeypatch.setattr(selection.logger, "warning_once", lambda *line: lines.append(line))
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    name, config = resolve(checkpoint, flag)
    assert name == "gpt_oss_mxfp4"
    assert type(config) is GptOssMxfp4Config
    said, reason = lines[0]
    assert said == "hopper-mxfp4 leaves this checkpoint to stock vLLM: %s"
    assert "hopper_mxfp4_vllm.configs" in reason


@pytest.mark.parametrize(("flag", "mode"), [(None, "on"), ("mxfp4", "on"), (NAME, "off")])
def test_on_stops_with_a_vllm_that_lacks_an_import(
    checkpoint, monkeypatch, a_later_vllm, flag, mode
):
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    with pytest.raises(ValueError, match="can't take over this checkpoint: ModuleNotFoundError"):
        resolve(checkpoint, flag)


def test_registering_with_a_vllm_that_lacks_an_import(monkeypatch, caplog_vllm):
    """vLLM guards no plugin's entry point.

    Raising there would stop a server that never asked for us.
    """
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    for mode in ("off", "auto"):
        monkeypatch.setenv("HOPPER_MXFP4", mode)
        hopper_mxfp4_vllm.register()
    assert "can't register with this vLLM" in caplog_vllm.text
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    with pytest.raises(RuntimeError, match=r"can't register .* or unset HOPPER_MXFP4"):
        hopper_mxfp4_vllm.register()


def test_on_with_a_flag_for_another_kernel(checkpoint, monkeypatch):
    said = {"quant_method": "mxfp4"}
    gpt_oss = hf_config("gpt_oss", "mxfp4")
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    with pytest.raises(ValueError, match="--quantization humming asks for another way to run it"):
        Selector.override_quantization_method(said, "humming", gpt_oss)
    monkeypatch.setenv("HOPPER_MXFP4", "auto")
    assert Selector.override_quantization_method(said, "humming", gpt_oss) is None


@pytest.fixture
def caplog_vllm(caplog):
    """vLLM's loggers hand nothing on to the root's handlers."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_layers_other_than_experts_are_stock(monkeypatch):
    monkeypatch.setattr(
        GptOssMxfp4Config, "get_quant_method", lambda self, layer, prefix: ("stock", layer, prefix)
    )
    layer = torch.nn.Linear(2, 2)
    assert GptOssConfig().get_quant_method(layer, "x") == ("stock", layer, "x")


def test_ids_and_the_expert_map_go_to_the_kernel_as_they_are(monkeypatch):
    """No operator of torch's is launched for them: the kernel maps, and masks the -1 of padding."""
    seen = {}
    monkeypatch.setattr(
        "hopper_mxfp4_vllm.experts.fused_moe",
        lambda x, ids, *args, **kwargs: seen.update(kwargs, ids=ids),
    )
    experts = Experts.__new__(Experts)
    experts.prepared = SimpleNamespace(w13=torch.empty(0))
    empty = torch.empty(0, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 3], [-1, 2], [1, -1]], dtype=torch.int32)
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    experts.apply(
        output=empty,
        hidden_states=empty,
        w1=empty,
        w2=empty,
        topk_weights=torch.ones(3, 2),
        topk_ids=ids,
        activation=MoEActivation.SWIGLUOAI,
        global_num_experts=4,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=empty,
        workspace2=empty,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    assert seen["ids"] is ids
    assert seen["expert_map"] is expert_map
