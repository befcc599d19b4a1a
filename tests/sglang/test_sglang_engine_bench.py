"""`hopper-mxfp4 bench --engine sglang`: what it asks of SGLang, what its schedulers do and tell."""

import json
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hopper_mxfp4 import env
from hopper_mxfp4.bench.jobs import JobFailed, run_job
from hopper_mxfp4.checkpoint.random_gpt_oss import gpt_oss_config
from hopper_mxfp4.registry import adapters
from hopper_mxfp4_sglang import bench_scheduler, engine
from sglang_ranks import Rank, gpt_oss_experts, prepare

HERE = Path(__file__).parent
MODULE = "hopper_mxfp4_sglang.engine"
# The engine's tests need the SGLang whose ways the stand-ins know.
NEWEST = find_spec("sglang.srt.arg_groups.fields") is not None


def job(model="model", **changes):
    return {
        "model": str(model),
        "random_weights": True,
        "backend": "ours",
        "batches": [1, 8, 256],
        "prompts": 16,
        "prompt_tokens": 2048,
        "decoded": (8, 72),
        "options": {},
        "moe_time": False,
        "began": time.time(),
    } | changes


def test_the_adapter_names_its_engine():
    assert adapters()["sglang"].engine == MODULE


def test_options_on_a_gpu():
    """Graphs of exactly the batches that are timed, and room for all requests of a prefill."""
    options = engine.engine_options(job(), on_gpu=True)
    assert options["cuda_graph_bs_decode"] == [1, 8, 256]
    assert options["max_running_requests"] == 256
    assert options["load_format"] == "dummy"
    assert "moe_runner_backend" not in options
    assert engine.engine_options(job(batches=[4]), on_gpu=True)["max_running_requests"] == 16


@pytest.mark.parametrize(
    ("backend", "asked"),
    [("ours", None), ("ours-fp8", None), ("default", None), ("marlin", "marlin")],
)
def test_the_backend_that_is_asked_for(backend, asked):
    options = engine.engine_options(job(backend=backend, random_weights=False), on_gpu=True)
    assert options.get("moe_runner_backend") == asked
    assert "load_format" not in options


def test_options_of_the_user_come_last():
    given = {"tp_size": 2, "mem_fraction_static": 0.7}
    options = engine.engine_options(job(options=given), on_gpu=True)
    assert options["tp_size"] == 2
    assert options["mem_fraction_static"] == 0.7
    assert options["attention_backend"] == "triton"


def test_ranks_with_requests_of_their_own_share_the_batches():
    given = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
    options = engine.engine_options(job(options=given), on_gpu=True)
    assert options["cuda_graph_bs_decode"] == [1, 4, 128]
    assert options["max_running_requests"] >= 256


def test_sglang_takes_every_option():
    """The names are ServerArgs' own, in every release that the adapter supports."""
    from sglang.srt.server_args import ServerArgs

    known = set(getattr(ServerArgs, "__struct_fields__", ())) | set(
        getattr(ServerArgs, "__dataclass_fields__", ())
    )
    for on_gpu in (True, False):
        asked = engine.engine_options(job(backend="marlin"), on_gpu)
        if NEWEST:
            assert asked.keys() <= known


@pytest.mark.parametrize(
    ("backend", "mode", "activations"),
    [("ours", "on", "auto"), ("ours-fp8", "on", "fp8"), ("default", "off", "auto")],
)
def test_the_environment_of_a_backend(backend, mode, activations, monkeypatch):
    monkeypatch.setenv(env.MODE.name, "auto")  # whatever the shell says
    monkeypatch.delenv(env.ACTIVATIONS.name, raising=False)
    monkeypatch.delenv("SGLANG_IS_FLASHINFER_AVAILABLE", raising=False)
    before = dict(os.environ)
    try:
        engine.set_environment(backend)
        assert env.MODE.read() == mode
        assert env.ACTIVATIONS.read() == activations
        assert os.environ["SGLANG_IS_FLASHINFER_AVAILABLE"] == "false"
    finally:
        os.environ.clear()
        os.environ |= before


def test_an_answer_that_is_too_short_is_an_error():
    def answers(input_ids, sampling_params):
        return [{"output_ids": [1]} for _ in input_ids]

    short = SimpleNamespace(generate=answers)
    engine._generate(short, [[5], [7]], 1)
    with pytest.raises(RuntimeError, match="4 tokens were asked for"):
        engine._generate(short, [[5], [7]], 4)


def empty(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.full(shape, math.nan).to(dtype), requires_grad=False)


def test_random_weights_of_every_kind():
    """Finite, and the same on every rank where ranks hold the same."""

    def model(shard):
        made = torch.nn.Module()
        made.split = empty(shard, 64)
        made.router = empty(8, 64)
        made.norm = empty(64)
        made.embed_tokens = empty(32, 64, dtype=torch.bfloat16)
        made.weight = empty(16, 64, dtype=torch.float8_e4m3fn)
        made.weight_scale_inv = empty(1, 2)
        made.w13_weight_scale_inv = empty(4, 16, 2, dtype=torch.float8_e8m0fnu)
        made.w13_weight = torch.nn.Parameter(
            torch.zeros(4, 16, 32, dtype=torch.int8), requires_grad=False
        )
        made.k_scale = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)
        bench_scheduler.fill(made)
        return made

    whole, shard = model(16), model(8)
    for name, parameter in whole.named_parameters():
        assert parameter.float().isfinite().all(), name
    assert whole.k_scale == -1
    assert (whole.norm == 1).all()
    assert whole.router.std() == pytest.approx(0.02, rel=0.2)
    assert whole.w13_weight_scale_inv.float().min() >= 2**-9
    assert whole.w13_weight_scale_inv.float().max() <= 2**-6
    assert len(whole.w13_weight.unique()) > 200
    assert torch.equal(whole.router, shard.router)


def test_what_serves_a_layer_is_told_by_kernel(monkeypatch):
    rank = Rank()
    model = torch.nn.ModuleList(gpt_oss_experts(rank, 64, 64, 4, 2) for _ in range(2))
    bench_scheduler.fill(model)
    prepare(rank, model)
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)),
        max_total_num_tokens=4096,
    )
    assert bench_scheduler.report_of(scheduler) == {
        "methods": {"MoEMethod reference": 2},
        "kv_cache_tokens": 4096,
    }


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A job for a small model in SGLang's own engine, and the plugin by which a CPU runs it."""
    (tmp_path / "model").mkdir()
    config = gpt_oss_config(
        layers=2, hidden=128, intermediate=128, experts=4, top_k=2, heads=16, vocabulary=512
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    paths = [HERE / "cpu_engine", HERE / "stand_ins", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, filter(None, paths))))
    return job(tmp_path / "model", batches=[2], prompts=2, prompt_tokens=32, decoded=(2, 6))


@pytest.mark.skipif(not NEWEST, reason="the stand-ins for kernels are written for 0.5.23")
def test_a_model_of_random_weights_in_sglangs_own_engine(small, tmp_path):
    found = run_job(MODULE, small, tmp_path / "ours", Console(quiet=True))
    assert found["methods"] == {"MoEMethod reference": 2}
    assert found["gpus"] == 1
    assert found["decode_ms"]["2"] > 0
    assert found["prefill_tokens_s"] > 0
    assert found["kv_cache_tokens"] == 4096
    assert found["engine"].startswith("SGLang ")
    assert 0 < found["import_s"] < found["import_s"] + found["ready_s"] < 600


@pytest.mark.skipif(not NEWEST, reason="the stand-ins for kernels are written for 0.5.23")
def test_an_engine_that_does_not_start_says_why(small, tmp_path):
    wrong = small | {"options": {"tp_size": 3}}
    with pytest.raises(JobFailed, match="process ended with status"):
        run_job(MODULE, wrong, tmp_path / "ours", Console(quiet=True))
