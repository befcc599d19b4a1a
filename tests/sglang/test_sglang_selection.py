"""When the adapter takes over, when it leaves SGLang alone and when it ends the process."""

import inspect
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
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config, Mxfp4MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

import hopper_mxfp4_sglang
from hopper_mxfp4 import DEEPSEEK_V4, GENERIC, GPT_OSS, SwiGLU
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4_sglang import layer as layer_module
from hopper_mxfp4_sglang import reasons, selection
from hopper_mxfp4_sglang.hooks import choose_method, hooks, offer_backend
from hopper_mxfp4_sglang.layer import MoEMethod
from hopper_mxfp4_sglang.reasons import Declined, asked_activations, serving_kernel
from hopper_mxfp4_sglang.selection import FP8, MXFP4, NAME, Checkpoint
from sglang_ranks import (
    GptOss,
    Rank,
    deepseek_experts,
    deepseek_quant_config,
    gpt_oss_config,
    of_model,
    prepare,
)

CONFIG = gpt_oss_config(64, 64, 4, 2, layers=3)
DEEPSEEK = {"hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2}
FAMILIES = pytest.mark.parametrize("family", [GPT_OSS, DEEPSEEK_V4], ids=lambda f: f.name)
HAS_NAMES = offer_backend()  # 0.5.19 and later


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch):
    monkeypatch.setattr(layer_module, "taken", 0)
    monkeypatch.setattr(layer_module, "reported", 0)
    monkeypatch.setattr(reasons, "declined", set())


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
            match="serves MXFP4 experts, and this model has others; drop it",
        ),
    ):
        MoeRunner(get_moe_runner_backend(), MoeRunnerConfig())


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_experts_that_are_not_mxfp4_stay_stock(monkeypatch, mode, caplog):
    """fp8 and requantised experts, and experts SGLang was told to skip."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    with Rank():
        layer = bare_layer()
        for config, stock in (
            (deepseek_quant_config(is_fp4_experts=False), object()),
            (deepseek_quant_config(dequant_fp4_to_fp8=True), object()),
            (
                deepseek_quant_config(),
                UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod),
            ),
            (
                Mxfp4Config(is_checkpoint_mxfp4_serialized=False),
                Mxfp4MoEMethod.__new__(Mxfp4MoEMethod),
            ),
            (Mxfp4Config(is_checkpoint_mxfp4_serialized=True), object()),
        ):
            assert choose_method(stock, config, layer, "x") is None
        assert choose_method(object(), deepseek_quant_config(), torch.nn.Linear(2, 2), "x") is None
    assert not caplog.records


# --- declining ---------------------------------------------------------------------------------


def bare_layer(family=GPT_OSS, **changes):
    layer = FusedMoE.__new__(FusedMoE)
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


def a_stock_method(family):
    return Mxfp4MoEMethod.__new__(Mxfp4MoEMethod) if family is GPT_OSS else object()


def config_of(family):
    if family is DEEPSEEK_V4:
        return deepseek_quant_config()
    return of_model(Mxfp4Config(is_checkpoint_mxfp4_serialized=True), {"model_type": "gpt_oss"})


def of(family, is_draft=False):
    """The checkpoint that bare_layer's layer comes from."""
    return (
        Checkpoint(MXFP4, GPT_OSS, SwiGLU(1.702, 1.0, 7.0), is_draft, 16)
        if family is GPT_OSS
        else Checkpoint(FP8, DEEPSEEK_V4, SwiGLU(limit=10.0), is_draft, 8)
    )


def decline_reason(layer, checkpoint):
    """Why that layer stays stock here; None if it is taken over."""
    try:
        device, invariant = torch.get_default_device(), selection.batch_invariant()
        serving_kernel(layer, checkpoint, device, invariant)
    except Declined as declined:
        return str(declined)
    return None


@FAMILIES
def test_a_layer_it_can_serve(family):
    with Rank():
        assert decline_reason(bare_layer(family), of(family)) is None


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
            "clamps to 7.0 after the activation (a gemm1_clamp_limit without gemm1_alpha)",
        ),
        (
            DEEPSEEK_V4,
            {"swiglu_limit": None, "gemm1_clamp_limit": 10.0},  # Ling-3's
            "clamps to 10.0 after the activation (a gemm1_clamp_limit without gemm1_alpha)",
        ),
        (
            GPT_OSS,
            {"gemm1_clamp_limit": None},
            "SGLang's layer has SwiGLU(alpha=1.702, beta=1.0, limit=None), and gpt_oss SwiGLU(",
        ),
        (
            GPT_OSS,
            {"gate_up_interleaved": False},
            "has other rows of gate and up than gpt_oss's interleaved",
        ),
        (
            DEEPSEEK_V4,
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
            "and deepseek_v4 SwiGLU(alpha=1.0, beta=0.0, limit=10.0)",
        ),
        (
            DEEPSEEK_V4,
            {"swiglu_limit": None},
            "SGLang's layer has SwiGLU(alpha=1.0, beta=0.0, limit=None)",
        ),
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
        assert reason in decline_reason(layer, of(family))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kt_weight_path": "/x"}, "drop --kt-weight-path"),
        ({"enable_paged_experts": True}, "drop --enable-paged-experts"),
        ({"cpu_offload_gb": 4}, "drop --cpu-offload-gb"),
        ({"offload_group_size": 2}, "drop --offload-group-size"),
        ({"dwdp_size": 4}, "drop --dwdp-size"),
        ({"elastic_ep_backend": "mooncake"}, "drop --elastic-ep-backend"),
        ({"weight_cache_mode": "ipc"}, "pass --weight-cache-mode off"),
    ],
)
def test_servers_it_declines(options, reason):
    (name,) = options
    if name not in inspect.signature(ServerArgs).parameters:
        pytest.skip("this SGLang has no such option")
    with Rank(resolved=options):
        assert reason in decline_reason(bare_layer(), of(GPT_OSS))


@pytest.mark.parametrize(
    ("asked", "precision", "runs"),
    [
        ("auto", "default", "bf16"),
        ("auto", "bf16", "bf16"),
        ("auto", "fp8", "fp8"),
        ("fp8", "default", "fp8"),
        ("fp8", "fp8", "fp8"),
        ("fp8", "bf16", None),
        ("bf16", "fp8", None),
    ],
)
def test_sglangs_own_flag_for_activations_is_followed(monkeypatch, asked, precision, runs):
    """Where it contradicts our variable, nothing is taken over."""
    monkeypatch.setenv("HOPPER_MXFP4_ACTIVATIONS", asked)
    with Rank(resolved={"flashinfer_mxfp4_moe_precision": precision}):
        if runs is None:
            flag = f"--flashinfer-mxfp4-moe-precision {precision}"
            with pytest.raises(Declined, match=f"ACTIVATIONS={asked} and {flag} ask for different"):
                asked_activations()
        else:
            assert asked_activations() == runs


@pytest.mark.parametrize("option", [{"enable_lora": True}, {"lora_paths": ["a=b"]}], ids=str)
@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (None, "name the modules that yours change with --lora-target-modules"),
        ({"all"}, "--lora-target-modules all lets adapters change the experts"),
        (["gate_proj", "up_proj", "down_proj"], "down_proj gate_proj up_proj lets adapters change"),
        ({"q_proj", "o_proj"}, None),
        ({"q_proj", "down_proj"}, None),  # SGLang takes experts as a whole
    ],
    ids=str,
)
def test_adapters(option, targets, reason):
    """What is declined is what SGLang's own LoRA manager would replace."""
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.utils import get_normalized_target_modules

    resolved = option | {"lora_target_modules": targets}
    with Rank(resolved=resolved):
        layer = bare_layer()
        said = decline_reason(layer, of(GPT_OSS))
    assert said is None if reason is None else reason in said
    if targets is None or "all" in targets:  # known once the model is there, its experts included
        return
    replaced = []
    decoder = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": layer})])
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": decoder})})
    manager = SimpleNamespace(
        base_model=model,
        base_hf_config=SimpleNamespace(num_hidden_layers=1),
        target_modules=get_normalized_target_modules(targets),
        set_lora_module=lambda name, module, **_: replaced.append(module) or SimpleNamespace(),
        experts_shared_outer_loras=False,
        max_lora_rank=8,
        lora_use_virtual_experts=False,
    )
    LoRAManager.init_lora_modules(manager)
    assert replaced == ([] if reason is None else [layer])


@pytest.mark.parametrize("precision", ["default", "bf16"])
@FAMILIES
def test_a_precision_of_16_bits_is_what_it_runs(family, precision):
    with Rank(flashinfer_mxfp4_moe_precision=precision):
        assert decline_reason(bare_layer(family), of(family)) is None


def test_every_option_it_looks_at_is_neutral_by_default():
    """And a newer SGLang that renamed one, or gave it another default, would be noticed here."""
    with Rank():
        args = selection.get_server_args()
        known = [name for name, neutral, _ in reasons.OPTIONS if hasattr(args, name)]
        # What 0.5.12 has; KTransformers, offload and elastic EP are called the same in all.
        assert set(known) >= {
            "kt_weight_path",
            "cpu_offload_gb",
            "offload_group_size",
            "elastic_ep_backend",
        }
        if HAS_NAMES:  # and 0.5.19
            assert set(known) >= {"dwdp_size", "weight_cache_mode"}
        for name, neutral, _ in reasons.OPTIONS:
            assert name not in known or selection.setting(name, "none") in neutral
        for name in ("flashinfer_mxfp4_moe_precision", "enable_deterministic_inference"):
            assert selection.setting(name, "none") in ("default", False)


# --- another kernel was asked for ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "on"])
@FAMILIES
def test_a_backend_that_the_user_named_is_followed(monkeypatch, caplog, family, mode):
    """As vLLM's adapter does it: on stops, auto stays stock, both with the reason."""
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    reason = "--moe-runner-backend triton asks for another kernel; drop it"
    rank = Rank(moe_runner_backend="triton")
    if mode == "on":
        with pytest.raises(SystemExit, match=f"{reason}, or set HOPPER_MXFP4=auto"):
            experts_of(family, rank)
    else:
        with rank:
            assert (
                choose_method(a_stock_method(family), config_of(family), bare_layer(family), "x")
                is None
            )
    assert reason in caplog.text


@pytest.mark.parametrize("backend", ["triton", "marlin"])
@FAMILIES
def test_a_backend_that_sglang_chose_is_not_the_users(family, backend):
    """Up to 0.5.18 SGLang writes its choice over what was given, from 0.5.19 on beside it."""
    with Rank(resolved={"moe_runner_backend": backend}):
        assert get_moe_runner_backend().value == backend
        assert decline_reason(bare_layer(family), of(family)) is None


@pytest.mark.parametrize(
    ("given", "target", "draft"),
    [
        ({}, None, None),
        ({"moe_runner_backend": "auto"}, None, None),
        (
            {"moe_runner_backend": "marlin"},
            "--moe-runner-backend marlin",
            "--moe-runner-backend marlin",
        ),
        (
            {"speculative_moe_runner_backend": "triton"},
            None,
            "--speculative-moe-runner-backend triton",
        ),
        (
            {"moe_runner_backend": "marlin", "speculative_moe_runner_backend": "auto"},
            "--moe-runner-backend marlin",
            None,
        ),
    ],
)
def test_a_draft_models_backend_is_its_own(given, target, draft):
    """SGLang fills in the draft's from the target's where the user gave none."""
    with Rank(**given):
        for is_draft, asked in ((False, target), (True, draft)):
            assert selection.asked_backend(is_draft) == asked
            reason = decline_reason(bare_layer(DEEPSEEK_V4), of(DEEPSEEK_V4, is_draft))
            assert reason == (asked and f"{asked} asks for another kernel; drop it")


# --- whose experts they are ----------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False, None])
def test_fp4_experts_of_a_model_that_nobody_registered(monkeypatch, caplog, marked):
    """Ling-3: fp8 with MXFP4 experts, which SGLang tells from DeepSeek-V4's from 0.5.20 on only."""
    config = deepseek_quant_config({"model_type": "bailing_hybrid"}, is_dsv4_fp4_experts=marked)
    if marked is None:
        del config.is_dsv4_fp4_experts
    reason = "the model clamps to 7.0 after the activation"
    with Rank():
        plain = bare_layer(DEEPSEEK_V4, swiglu_limit=None)
        assert choose_method(object(), config, plain, "x").family is GENERIC
        layer = bare_layer(DEEPSEEK_V4, swiglu_limit=None, gemm1_clamp_limit=7.0)
        with pytest.raises(SystemExit, match=reason):
            choose_method(object(), config, layer, "x")
        caplog.clear()
        monkeypatch.setenv("HOPPER_MXFP4", "auto")
        assert choose_method(object(), config, layer, "x") is None
    assert reason in caplog.text


def test_a_model_that_makes_its_experts_quantisation_itself(monkeypatch):
    """As Kimi-K3's does in SGLang: the model loaded last counts, and without one it declines."""
    config = deepseek_quant_config()
    del config.hopper_mxfp4_model
    with Rank():
        assert choose_method(object(), config, bare_layer(DEEPSEEK_V4), "x").family is DEEPSEEK_V4
        of_model(None, {"model_type": "kimi_k3"})
        situ = bare_layer(GPT_OSS, activation="situ", gemm1_alpha=4.0, gemm1_clamp_limit=25.0)
        with pytest.raises(SystemExit, match="the activation is situ, and generic has a gated"):
            choose_method(object(), config, situ, "x")
        mxfp4 = Mxfp4Config(is_checkpoint_mxfp4_serialized=True)
        with pytest.raises(SystemExit, match="no checkpoint family for model_type 'kimi_k3'"):
            choose_method(a_stock_method(GPT_OSS), mxfp4, situ, "x")
        monkeypatch.setattr(selection, "latest_model", None)
        with pytest.raises(SystemExit, match="SGLang's loader did not say which model this is"):
            choose_method(object(), config, bare_layer(DEEPSEEK_V4), "x")


def loaded(monkeypatch, quant_config, **model):
    """What SGLang's loader makes of a model's quantisation, but for reading the checkpoint."""
    from sglang.srt.model_loader import loader

    model = {
        "quantization": "fp8",
        "is_fp4_experts": True,
        "nvfp4_moe_meta": None,
        "dtype": torch.bfloat16,
        "is_draft_model": False,
    } | model
    monkeypatch.setattr(loader, "get_quant_config", lambda *args, **kwargs: quant_config)
    monkeypatch.setattr(loader, "get_model_architecture", lambda *args: (object, "A"))
    monkeypatch.setattr(loader, "get_device_capability", lambda *args: (9, 0))
    with Rank():
        return loader._get_quantization_config(SimpleNamespace(**model), SimpleNamespace())


@pytest.mark.parametrize(("outer", "known"), [("deepseek_v4", True), ("a_wrapper", False)])
def test_sglangs_loader_says_which_model_it_is(monkeypatch, outer, known):
    """The hook on the loader: a multimodal model's own type comes first, then its text model's."""
    hf_config = SimpleNamespace(model_type=outer, architectures=["A"], swiglu_limit=10.0)
    text = SimpleNamespace(model_type="deepseek_v41_text", swiglu_limit=9.0)
    config = loaded(
        monkeypatch,
        Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]),
        hf_config=hf_config,
        hf_text_config=text,
        is_draft_model=True,
    )
    found = selection.checkpoint_of(FP8, config, bare_layer(DEEPSEEK_V4))
    assert found.family is DEEPSEEK_V4
    assert found.swiglu.limit == (10.0 if known else 9.0)
    assert found.is_draft
    assert found.activation_bits == 8


class OtherConfig:
    """As --quantization humming gives it, which has kernels of its own."""

    def get_name(self):
        return "humming"

    get_min_capability = staticmethod(lambda: 80)
    get_supported_act_dtypes = staticmethod(lambda: [torch.bfloat16])


def test_another_quantization_stops_or_is_said(monkeypatch, caplog):
    hf_config = SimpleNamespace(
        model_type="gpt_oss", architectures=["A"], quantization_config={"quant_method": "mxfp4"}
    )
    model = {"quantization": "humming", "is_fp4_experts": False, "hf_config": hf_config}
    reason = "--quantization humming gives its MXFP4 experts to another kernel; drop it"
    with pytest.raises(SystemExit, match=reason):
        loaded(monkeypatch, OtherConfig(), **model)
    for mode, lines in (("auto", 1), ("off", 0)):
        caplog.clear()
        monkeypatch.setenv("HOPPER_MXFP4", mode)
        assert type(loaded(monkeypatch, OtherConfig(), **model)) is OtherConfig
        assert caplog.text.count(reason) == lines
    monkeypatch.setenv("HOPPER_MXFP4", "on")
    hf_config.quantization_config = {"quant_method": "awq"}  # nothing to take over there
    assert type(loaded(monkeypatch, OtherConfig(), **model)) is OtherConfig


ALL_TO_ALL = {
    "none": {"is_none": lambda: True, "is_deepep": lambda: False},
    "deepep": {"is_none": lambda: False, "is_deepep": lambda: True},
    "megamoe": {"is_none": lambda: False, "is_deepep": lambda: False},
}


@pytest.mark.parametrize(
    ("backend", "overlap", "reason"),
    [
        ("none", None, None),
        ("deepep", None, None),
        ("deepep", "is_tbo_enabled", None),
        ("megamoe", None, "and --moe-a2a-backend is megamoe; pass deepep or none"),
        ("none", "is_tbo_enabled", "drop --enable-two-batch-overlap, or pass --moe-a2a-backend"),
        ("none", "is_sbo_enabled", "drop --enable-single-batch-overlap"),
        ("deepep", "is_sbo_enabled", "drop --enable-single-batch-overlap"),
    ],
)
def test_all_to_alls_and_overlaps(monkeypatch, backend, overlap, reason):
    backend = SimpleNamespace(value=backend, **ALL_TO_ALL[backend])
    with Rank():
        monkeypatch.setattr(reasons, "get_moe_a2a_backend", lambda: backend)
        monkeypatch.setattr(
            reasons.utils, "get_deepep_output_dtype", lambda dispatcher: None, raising=False
        )
        if overlap:
            monkeypatch.setattr(reasons, overlap, lambda: True)
        said = decline_reason(bare_layer(), of(GPT_OSS))
        assert said is None if reason is None else reason in said
        monkeypatch.delattr(reasons.utils, "get_deepep_output_dtype")
        said = decline_reason(bare_layer(), of(GPT_OSS))
        if backend.value == "deepep":
            assert "this SGLang's DeepEP sends experts 8-bit tokens" in said


def test_surroundings_it_declines():
    with Rank(), torch.device("meta"):
        assert "this --load-format makes a model without memory first" in decline_reason(
            bare_layer(), of(GPT_OSS)
        )


def test_backends_that_change_what_is_loaded(monkeypatch):
    """Up to 0.5.18 a padded hidden size, up to 0.5.22 transposed weights."""
    with Rank():
        layer = bare_layer()
        monkeypatch.setattr(
            reasons, "get_moe_runner_backend", lambda: SimpleNamespace(value="flashinfer_mxfp4")
        )
        assert "pads the hidden size for --moe-runner-backend flashinfer_mxfp4" in decline_reason(
            layer, of(GPT_OSS)
        )
        layer.hidden_size_unpadded = 192
        assert decline_reason(layer, of(GPT_OSS)) is None
        monkeypatch.setattr(
            reasons, "get_moe_runner_backend", lambda: SimpleNamespace(value="triton_kernel")
        )
        monkeypatch.delattr(TopK, "bind_runner_backend", raising=False)
        assert "transposes the weights for --moe-runner-backend triton_kernel" in decline_reason(
            bare_layer(DEEPSEEK_V4), of(DEEPSEEK_V4)
        )


@pytest.mark.parametrize("version", ["0.6.11.post1", "0.6.15.post1", "0.6.17"])
def test_the_unsafe_flashinfers_that_older_sglangs_pin(monkeypatch, version):
    """Their reason reaches the user: SGLang 0.5.12 to 0.5.18 bring such a FlashInfer."""
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "flashinfer")
    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda", 0))
    with Rank():
        reason = decline_reason(bare_layer(), of(GPT_OSS))
    assert f"FlashInfer {version}" in reason
    assert "install flashinfer-python>=0.6.18" in reason


@pytest.mark.parametrize("mode", ["auto", "on"])
@FAMILIES
def test_a_shard_that_cuts_blocks(monkeypatch, caplog, family, mode):
    """DeepSeek-V4.1's 2304 over 16 ranks is 144: auto stays stock and says so.

    GPT-OSS's loader cuts whole blocks.
    """
    monkeypatch.setenv("HOPPER_MXFP4", mode)
    layer = bare_layer(family, intermediate_size_per_partition=144)
    with Rank():
        if family is GPT_OSS or mode == "auto":
            method = choose_method(a_stock_method(family), config_of(family), layer, "x")
            assert isinstance(method, MoEMethod) is (family is GPT_OSS)
        else:
            with pytest.raises(SystemExit, match="choose another --tp-size, or set"):
                choose_method(a_stock_method(family), config_of(family), layer, "x")
    reason = "its shard of 144 x 192 cuts blocks of 32; choose another --tp-size"
    assert (reason in caplog.text) is (family is DEEPSEEK_V4)


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (reasons, "get_moe_a2a_backend"),
        (selection, "family_for"),
        (reasons, "choose_kernel"),
    ],
)
@FAMILIES
def test_whatever_fails_auto_goes_on(monkeypatch, caplog, family, module, broken):
    """A function of SGLang's that was renamed, a plugin's family or kernel that raises."""

    def fail(*args, **kwargs):
        raise AttributeError("gone")

    monkeypatch.setattr(module, broken, fail)
    reason = "deciding failed with AttributeError: gone; please report it"
    given = a_stock_method(family), config_of(family), bare_layer(family), "x"
    with Rank():
        with pytest.raises(SystemExit, match=f"can't take over x: {reason}, or set"):
            choose_method(*given)
        caplog.clear()
        monkeypatch.setenv("HOPPER_MXFP4", "auto")
        assert choose_method(*given) is None
    assert f"leaves the MXFP4 MoE layers to stock SGLang: {reason}" in caplog.text


@FAMILIES
def test_declining_ends_the_process_or_stays_stock(monkeypatch, caplog, family):
    """With `on`, a layer that can't be taken over must not quietly run on something else.

    With `auto` one line says why.
    """
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "flashinfer")
    stock, config = a_stock_method(family), config_of(family)
    with Rank():
        with pytest.raises(
            SystemExit,
            match=r"can't take over a\.b: kernel flashinfer can't run: .*, or set "
            r"HOPPER_MXFP4=auto",
        ) as ended:
            choose_method(stock, config, bare_layer(family), "a.b")
        assert str(ended.value) in caplog.text
        caplog.clear()
        monkeypatch.setenv("HOPPER_MXFP4", "auto")
        for _ in range(3):
            assert choose_method(stock, config, bare_layer(family), "a.b") is None
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(
        "hopper-mxfp4 leaves the MXFP4 MoE layers to stock SGLang: kernel flashinfer can't run"
    )


def test_an_unknown_kernel_is_a_reason(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "fast")
    with Rank():
        assert "no kernel is called 'fast' (HOPPER_MXFP4_KERNEL)" in decline_reason(
            bare_layer(), of(GPT_OSS)
        )


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
        "hopper-mxfp4 takes over 3 MXFP4 MoE layers with kernel reference and "
        "SwiGLU(alpha=1.702, beta=1.0, limit=7.0); activations are BF16",
        # DeepSeek-V4 declares fp8 activations for all its layers
        "hopper-mxfp4 takes over 1 MXFP4 MoE layers with kernel reference and "
        "SwiGLU(alpha=1.0, beta=0.0, limit=10.0); activations are BF16, not the 8-bit ones that "
        "the checkpoint declares; stock SGLang too runs BF16 on Hopper",
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
    """SGLang swallows what a plugin raises and serves with its stock kernels.

    On one rank perhaps, unless the process ends here.
    """
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
    """As when another plugin has hooked the same function before.

    SGLang applies the hooks of a function only once.
    """
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
        from hopper_mxfp4_sglang import hooks
        from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
        assert hopper_mxfp4_sglang.holds(Mxfp4Config.get_quant_method, hooks.choose_method)
        from sglang.srt.plugins import load_plugins
        load_plugins()  # once more, as an engine in the same process would
        again = Mxfp4Config.get_quant_method.__wrapped__
        assert not hopper_mxfp4_sglang.holds(again, hooks.choose_method)
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
        "import sys; sys.argv[1:] = ['check', '--json']\n"
        "from hopper_mxfp4.cli.main import main; main()",
        **variables,
    )
    found = json.loads(done.stdout)["findings"]
    line = next(line for line in found if line["topic"] == "sglang plugin")
    assert line["status"] == status
    assert said in line["seen"]
    if status == "ok":
        assert ("--moe-runner-backend hopper_mxfp4" in line["seen"]) is HAS_NAMES
