"""When the adapter takes over, when it leaves SGLang alone and when it ends the process."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from sglang.srt.plugins.hook_registry import HookRegistry

import hopper_mxfp4_sglang
from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, compat
from hopper_mxfp4_sglang import moe
from hopper_mxfp4_sglang.moe import NAME, MoEMethod, hooks, offer_backend, why_not
from sglang_ranks import (
    GptOss,
    Rank,
    deepseek_experts,
    deepseek_quant_config,
    gpt_oss_config,
    prepare,
)

CONFIG = gpt_oss_config(64, 64, 4, 2, layers=3)
DEEPSEEK = {"hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2}
FAMILIES = pytest.mark.parametrize("family", [GPT_OSS, DEEPSEEK_V4], ids=lambda f: f.name)
HAS_NAMES = offer_backend()  # 0.5.19 and later


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch):
    for name, value in (("taken", 0), ("reported", 0), ("declined", set())):
        monkeypatch.setattr(moe, name, value)


def experts_of(family, rank, **options):
    return (
        GptOss(rank, CONFIG).experts
        if family is GPT_OSS
        else deepseek_experts(rank, **DEEPSEEK, **options)
    )


# --- mode --------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("mode", "ours"), [(None, False), ("off", False), ("auto", True), ("on", True)]
)
def test_the_mode(monkeypatch, family, mode, ours):
    monkeypatch.delenv("HOPPER_MXFP4") if mode is None else monkeypatch.setenv("HOPPER_MXFP4", mode)
    assert isinstance(experts_of(family, Rank()).quant_method, MoEMethod) is ours


@FAMILIES
@pytest.mark.parametrize("mode", [None, "off", "auto"])
@pytest.mark.skipif(not HAS_NAMES, reason="this SGLang has no names of backends from outside")
def test_the_flag_alone_is_enough(monkeypatch, family, mode):
    monkeypatch.delenv("HOPPER_MXFP4") if mode is None else monkeypatch.setenv("HOPPER_MXFP4", mode)
    experts = experts_of(family, Rank(moe_runner_backend=NAME))
    assert isinstance(experts.quant_method, MoEMethod)


@pytest.mark.skipif(not HAS_NAMES, reason="this SGLang has no names of backends from outside")
def test_the_flag_is_parsed():
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(
        ["--model-path", "dummy", "--device", "cpu", "--moe-runner-backend", NAME]
    )
    assert args.moe_runner_backend == NAME


@pytest.mark.skipif(not HAS_NAMES, reason="this SGLang has no names of backends from outside")
def test_the_flag_on_another_model_ends_the_process(caplog):
    """SGLang would go on with no kernel at all, or with another."""
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner

    rank = Rank(moe_runner_backend=NAME)
    with pytest.raises(
        SystemExit,
        match=r"can't take over model\.layers\.0\.mlp\.experts: its experts are not MXFP4 ones",
    ):
        deepseek_experts(rank, **DEEPSEEK, config=deepseek_quant_config(is_fp4_experts=False))
    assert "drop --moe-runner-backend hopper_mxfp4" in caplog.text
    with (
        rank,
        pytest.raises(
            SystemExit,
            match="serves MXFP4 experts of GPT-OSS and DeepSeek-V4, and this model has others",
        ),
    ):
        MoeRunner(moe.get_moe_runner_backend(), MoeRunnerConfig())


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_experts_that_are_not_mxfp4_stay_stock(monkeypatch, mode, caplog):
    """fp8 and requantised experts, experts SGLang was told to skip, and FP4 experts of other models."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    with Rank():
        layer = bare_layer()
        for config, stock in (
            (deepseek_quant_config(is_fp4_experts=False), object()),
            (deepseek_quant_config(dequant_fp4_to_fp8=True), object()),
            (deepseek_quant_config(is_dsv4_fp4_experts=False), object()),
            (
                deepseek_quant_config(),
                moe.UnquantizedFusedMoEMethod.__new__(moe.UnquantizedFusedMoEMethod),
            ),
            (
                Mxfp4Config(is_checkpoint_mxfp4_serialized=False),
                moe.Mxfp4MoEMethod.__new__(moe.Mxfp4MoEMethod),
            ),
            (Mxfp4Config(is_checkpoint_mxfp4_serialized=True), object()),
        ):
            assert moe.choose_method(stock, config, layer, "x") is None
        assert (
            moe.choose_method(object(), deepseek_quant_config(), torch.nn.Linear(2, 2), "x") is None
        )
    assert not caplog.records


# --- declining ---------------------------------------------------------------------------------


def bare_layer(family=GPT_OSS, **changes):
    layer = moe.FusedMoE.__new__(moe.FusedMoE)
    torch.nn.Module.__init__(layer)
    of_gpt_oss = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
    fields = {
        "num_experts": 4,
        "num_local_experts": 4,
        "hidden_size": 192,
        "intermediate_size_per_partition": 192,
        "params_dtype": torch.bfloat16,
        "activation": "silu",
        "num_fused_shared_experts": 0,
    } | (of_gpt_oss if family is GPT_OSS else {"swiglu_limit": 10.0})
    layer.moe_runner_config = MoeRunnerConfig(**fields)
    for name, value in changes.items():
        setattr(layer.moe_runner_config, name, value)
    layer.num_local_experts = 4
    return layer


@FAMILIES
def test_a_layer_it_can_serve(family):
    with Rank():
        assert why_not(bare_layer(family), family) is None


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            GPT_OSS,
            {"params_dtype": torch.float16},
            "the model in torch.float16; pass --dtype bfloat16",
        ),
        (GPT_OSS, {"activation": "gelu"}, "the activation is gelu, and gpt_oss has a gated silu"),
        (DEEPSEEK_V4, {"is_gated": False}, "the activation is silu without a gate"),
        (
            DEEPSEEK_V4,
            {"apply_router_weight_on_input": True},
            "this model wants their inputs weighted",
        ),
        (DEEPSEEK_V4, {"no_combine": True}, "or the outputs apart"),
        (DEEPSEEK_V4, {"num_fused_shared_experts": 1}, "drop --enforce-shared-experts-fusion"),
        (
            GPT_OSS,
            {"gemm1_alpha": None},
            "alpha None and limit 7.0 of its SwiGLU are not gpt_oss's",
        ),
        (GPT_OSS, {"gemm1_clamp_limit": None}, "are not gpt_oss's"),
        (GPT_OSS, {"gate_up_interleaved": False}, "are not gpt_oss's"),
        (DEEPSEEK_V4, {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, "are not deepseek_v4's"),
        (
            DEEPSEEK_V4,
            {"intermediate_size_per_partition": 48},
            "its shard of 48 x 192 cuts blocks of 32; choose another --tp-size",
        ),
        (GPT_OSS, {"hidden_size": 200}, "its shard of 192 x 200 cuts blocks of 32"),
    ],
)
def test_layers_it_declines(family, changes, reason):
    with Rank():
        layer = bare_layer(family, **changes)
        if "gate_up_interleaved" in changes and not hasattr(
            MoeRunnerConfig(), "gate_up_interleaved"
        ):
            pytest.skip("this SGLang knows only interleaved ones")
        assert reason in why_not(layer, family)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_lora": True}, "no LoRA; drop --enable-lora"),
        ({"lora_paths": ["a=b"]}, "no LoRA; drop --lora-paths"),
        ({"kt_weight_path": "/x"}, "drop --kt-weight-path"),
        ({"enable_paged_experts": True}, "drop --enable-paged-experts"),
        ({"cpu_offload_gb": 4}, "drop --cpu-offload-gb"),
        ({"offload_group_size": 2}, "drop --offload-group-size"),
        ({"dwdp_size": 4}, "drop --dwdp-size"),
        ({"elastic_ep_backend": "mooncake"}, "drop --elastic-ep-backend"),
        ({"weight_cache_mode": "ipc"}, "pass --weight-cache-mode off"),
        (
            {"enable_deterministic_inference": True},
            "set HOPPER_MXFP4_BATCH_INVARIANT=1 or drop --enable-deterministic-inference",
        ),
    ],
)
def test_servers_it_declines(monkeypatch, options, reason):
    with Rank():
        given = SimpleNamespace(
            **dict.fromkeys(vars(moe.get_server_args()), None)
            | vars(moe.get_server_args())
            | options
        )
        monkeypatch.setattr(moe, "get_server_args", lambda: given)
        assert reason in why_not(bare_layer(), GPT_OSS)


def test_every_option_it_looks_at_is_neutral_by_default():
    """And a newer SGLang that renamed one, or gave it another default, would be noticed here."""
    with Rank():
        args = moe.get_server_args()
        known = [name for name, neutral, _ in moe.OPTIONS if hasattr(args, name)]
        assert len(known) >= 6
        assert all(
            getattr(args, name) in neutral for name, neutral, _ in moe.OPTIONS if name in known
        )


def test_deterministic_inference_with_a_batch_invariant_kernel(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4_BATCH_INVARIANT", "1")
    with Rank():
        given = SimpleNamespace(
            **vars(moe.get_server_args()) | {"enable_deterministic_inference": True}
        )
        monkeypatch.setattr(moe, "get_server_args", lambda: given)
        assert "batch invariant" not in (why_not(bare_layer(), GPT_OSS) or "")


def test_surroundings_it_declines(monkeypatch):
    with Rank():
        monkeypatch.setattr(
            moe,
            "get_moe_a2a_backend",
            lambda: SimpleNamespace(is_none=lambda: False, value="deepep"),
        )
        assert "--moe-a2a-backend is deepep; pass none" in why_not(bare_layer(), GPT_OSS)
        monkeypatch.undo()
        for name in ("is_tbo_enabled", "is_sbo_enabled"):
            with monkeypatch.context() as patch:
                patch.setattr(moe, name, lambda: True)
                assert (
                    "drop --enable-two-batch-overlap or --enable-single-batch-overlap"
                    in why_not(bare_layer(), GPT_OSS)
                )
        with torch.device("meta"):
            assert "this --load-format makes a model without memory first" in why_not(
                bare_layer(), GPT_OSS
            )


def test_backends_that_change_what_is_loaded(monkeypatch):
    """Up to 0.5.18 a padded hidden size, up to 0.5.22 transposed weights."""
    with Rank():
        layer = bare_layer()
        monkeypatch.setattr(
            moe, "get_moe_runner_backend", lambda: SimpleNamespace(value="flashinfer_mxfp4")
        )
        assert (
            "pads the hidden size for --moe-runner-backend flashinfer_mxfp4; pass triton"
            in why_not(layer, GPT_OSS)
        )
        layer.hidden_size_unpadded = 192
        assert why_not(layer, GPT_OSS) is None
        monkeypatch.setattr(
            moe, "get_moe_runner_backend", lambda: SimpleNamespace(value="triton_kernel")
        )
        monkeypatch.delattr(moe.TopK, "bind_runner_backend", raising=False)
        assert (
            "transposes the weights for --moe-runner-backend triton_kernel; pass auto"
            in why_not(bare_layer(DEEPSEEK_V4), DEEPSEEK_V4)
        )


@pytest.mark.parametrize("version", ["0.6.11.post1", "0.6.15.post1", "0.6.17"])
def test_the_unsafe_flashinfers_that_older_sglangs_pin(monkeypatch, version):
    """Their reason reaches the user: SGLang 0.5.12 to 0.5.18 bring such a FlashInfer."""
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "flashinfer")
    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(moe.torch, "get_default_device", lambda: torch.device("cuda", 0))
    with Rank():
        reason = why_not(bare_layer(), GPT_OSS)
    assert f"FlashInfer {version}" in reason
    assert "install flashinfer-python>=0.6.18" in reason


@FAMILIES
def test_declining_ends_the_process_or_stays_stock(monkeypatch, caplog, family):
    """With `on` a layer that can't be taken over must not quietly run on something else; with `auto` one line says why."""
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "flashinfer")
    stock, config = (
        object(),
        Mxfp4Config(is_checkpoint_mxfp4_serialized=True)
        if family is GPT_OSS
        else deepseek_quant_config(),
    )
    if family is GPT_OSS:
        stock = moe.Mxfp4MoEMethod.__new__(moe.Mxfp4MoEMethod)
    with Rank():
        with pytest.raises(
            SystemExit,
            match=r"can't take over a\.b: kernel flashinfer can't run: .*, or set HOPPER_MXFP4=auto",
        ) as ended:
            moe.choose_method(stock, config, bare_layer(family), "a.b")
        assert str(ended.value) in caplog.text
        caplog.clear()
        monkeypatch.setenv("HOPPER_MXFP4", "auto")
        for _ in range(3):
            assert moe.choose_method(stock, config, bare_layer(family), "a.b") is None
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(
        "hopper-mxfp4 leaves the MXFP4 MoE layers to stock SGLang: kernel flashinfer can't run"
    )


def test_an_unknown_kernel_is_a_reason(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "fast")
    with Rank():
        assert "no kernel is called 'fast' (HOPPER_MXFP4_KERNEL)" in why_not(bare_layer(), GPT_OSS)


# --- what the log says -------------------------------------------------------------------------


def test_one_line_says_how_many_layers(caplog):
    caplog.set_level(logging.INFO, "hopper_mxfp4_sglang")
    rank = Rank()
    model = GptOss(rank, CONFIG)
    prepare(rank, model)
    prepare(rank, model)
    draft = deepseek_experts(rank, **DEEPSEEK)
    prepare(rank, draft)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("hopper_mxfp4_sglang")]
    assert lines == [
        "hopper-mxfp4 takes over 3 MXFP4 MoE layers with kernel reference and SwiGLU(alpha=1.702, beta=1.0, limit=7.0)",
        "hopper-mxfp4 takes over 1 MXFP4 MoE layers with kernel reference and SwiGLU(alpha=1.0, beta=0.0, limit=10.0)",
    ]


# --- registering -------------------------------------------------------------------------------


def test_hooks_are_in_place_once():
    before = {target: len(found) for target, found in HookRegistry._hooks.items()}
    hopper_mxfp4_sglang.install()
    hopper_mxfp4_sglang.register()
    assert {target: len(found) for target, found in HookRegistry._hooks.items()} == before
    assert all(before[target] == 1 for target in hooks())
    assert Fp8Config.get_quant_method.__wrapped__.__qualname__ == "Fp8Config.get_quant_method"


def process(code, **variables):
    """A process as SGLang starts one: the plugins first, then whatever the code does."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(
        [str(root / "tests" / "sglang" / "stand_ins"), os.environ.get("PYTHONPATH", "")]
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HOPPER_MXFP4", "SGLANG_PLUGINS"))
    }
    code = textwrap.dedent(code) + "\nprint('went on')"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


BROKEN = """
    import sys
    sys.modules["sglang.srt.layers.quantization.fp8"] = None  # whatever stops the plugin
    from sglang.srt.plugins import load_plugins
    load_plugins()
"""


@pytest.mark.parametrize(
    ("mode", "status", "said"),
    [
        ("on", 1, "or unset HOPPER_MXFP4 to serve with stock SGLang"),
        ("auto", 0, "SGLang stays stock"),
    ],
)
def test_a_plugin_that_fails(mode, status, said):
    """SGLang swallows it and serves with its stock kernels, one rank perhaps, unless the process ends here."""
    done = process(BROKEN, HOPPER_MXFP4=mode)
    assert done.returncode == status, done.stderr
    assert ("went on" in done.stdout) is (status == 0)
    assert said in done.stderr
    assert "the plugin hopper-mxfp4 failed (ModuleNotFoundError" in done.stderr


def test_a_bad_mode_ends_the_process(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4", "yes")
    with pytest.raises(SystemExit, match="HOPPER_MXFP4='yes' is not one of off, auto, on"):
        hopper_mxfp4_sglang.register()


def test_a_hook_that_was_not_applied_ends_the_process(monkeypatch):
    """As when another plugin has hooked the same function before: SGLang applies the hooks of a function only once."""
    monkeypatch.setattr(hopper_mxfp4_sglang, "holds", lambda function, hook: False)
    monkeypatch.setattr(HookRegistry, "register", lambda *args: None)
    with pytest.raises(
        SystemExit, match=r"SGLang did not apply the hooks on .*Mxfp4Config\.get_quant_method"
    ):
        hopper_mxfp4_sglang.register()


def test_install_serves_where_plugins_are_never_loaded():
    done = process(
        """
        import torch
        import hopper_mxfp4_sglang
        hopper_mxfp4_sglang.install()
        assert not torch.cuda.is_initialized()
        from hopper_mxfp4_sglang import moe
        from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
        assert hopper_mxfp4_sglang.holds(Mxfp4Config.get_quant_method, moe.choose_method)
        from sglang.srt.plugins import load_plugins
        load_plugins()  # once more, as an engine in the same process would
        assert not hopper_mxfp4_sglang.holds(Mxfp4Config.get_quant_method.__wrapped__, moe.choose_method)
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, "ok", "plugin loads; switch it on with HOPPER_MXFP4=on"),
        ({"SGLANG_PLUGINS": ""}, "ok", "plugin loads"),
        ({"SGLANG_PLUGINS": "other"}, "problem", "SGLANG_PLUGINS='other' leaves this plugin out"),
    ],
)
def test_check_loads_the_plugin_as_sglang_does(variables, status, said):
    done = process(
        "import sys; sys.argv[1:] = ['check', '--json']; from hopper_mxfp4.cli import main; main()",
        **variables,
    )
    line = next(line for line in json.loads(done.stdout) if line["topic"] == "sglang plugin")
    assert line["status"] == status
    assert said in line["seen"]
    if status == "ok":
        assert ("--moe-runner-backend hopper_mxfp4" in line["seen"]) is HAS_NAMES
