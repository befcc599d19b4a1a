"""`hopper-mxfp4 bench --engine vllm` on a small model, in vLLM's own CPU engine."""

import json
import math
import os
import time

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from hopper_mxfp4.bench.engine import MODELS, ON_A_CPU, bench_engine, plot, show
from hopper_mxfp4.bench.jobs import run_job
from hopper_mxfp4.bench.run import FORMAT
from hopper_mxfp4.checkpoint.random_gpt_oss import gpt_oss_config, write_gpt_oss
from hopper_mxfp4.cli.main import main

SIZES = {"layers": 2, "hidden": 192, "intermediate": 192, "experts": 8, "top_k": 4}


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_gpt_oss(folder / "model", **SIZES)
    options = ["--workloads", str(folder / "model"), "--kernels", "ours nonsense"]
    options += ["--json", str(folder / "result.json"), "--plot", str(folder / "result.png")]
    result = CliRunner().invoke(main, ["bench", "--engine", "vllm", *options])
    return folder, result


def test_a_checkpoint_is_timed_and_a_backend_that_fails_says_why(timed):
    folder, result = timed
    assert result.exit_code == 1, "one of the two failed"
    ours, other = json.loads((folder / "result.json").read_text())["engines"]
    assert ours["methods"] == {"GptOssMethod reference": 2}
    assert ours["engine"].startswith("vLLM ")
    assert [*ours["decode_ms"]] == [str(batch) for batch in ON_A_CPU.batches]
    assert all(0 < ms < 10_000 for ms in ours["decode_ms"].values())
    assert ours["prefill_tokens_s"] > 0
    assert ours["kv_cache_tokens"] > 1024
    assert ours["ready_s"] > 0
    assert "nonsense" in other["failed"]
    assert "process ended with status 1" in other["failed"]
    assert "failed: " in result.output
    assert "2 x GptOssMethod reference" in result.output
    assert (folder / "result.png").stat().st_size > 10_000


@pytest.fixture
def random_model(tmp_path):
    """A job for a model of random weights."""
    (tmp_path / "model").mkdir()
    config = gpt_oss_config(**SIZES, heads=16, vocabulary=1024)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return {
        "model": str(tmp_path / "model"),
        "random_weights": True,
        "backend": "ours",
        "batches": [1],
        "prompts": 2,
        "prompt_tokens": 32,
        "decoded": (2, 6),
        "options": {},
        "moe_time": False,
        "began": time.time(),
    }


def test_a_model_of_random_weights_needs_no_files(random_model, tmp_path):
    """Its activations stay finite and its tokens go to many experts."""
    found = run_job("hopper_mxfp4_vllm.engine", random_model, tmp_path / "ours", Console())
    assert found["methods"] == {"GptOssMethod reference": 2}
    assert found["gpus"] == 1
    assert found["decode_ms"]["1"] > 0
    assert found["import_s"] > 0.5, "vLLM was imported before the clock ran"
    assert "moe_ms" not in found


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank wants a core of its own")
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU engine")
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_in_processes_of_their_own(random_model, tmp_path, monkeypatch, expert_parallel):
    """They know the format of random weights, and both are asked what serves their layers."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    job = random_model | {"options": options, "moe_time": True}
    found = run_job("hopper_mxfp4_vllm.engine", job, tmp_path / "ours", Console())
    assert found["methods"] == {"GptOssMethod reference": 4}
    assert found["gpus"] == 2
    assert 0 < found["moe_ms"]["1"] < 1000


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_a_config(name):
    model = MODELS[name]
    for layers in (1, model.layers):
        assert model.config(layers)["num_hidden_layers"] == layers


def test_every_run_is_a_row_in_the_order_given(tmp_path, monkeypatch):
    """With what was asked of the engine, also where it failed."""
    write_gpt_oss(tmp_path / "model", **SIZES)
    told = []

    def answers(module, job, stem, console):
        told.append((job["backend"], job["options"]))
        return {"decode_ms": {"1": 1.0}}

    monkeypatch.setattr("hopper_mxfp4.bench.engine.run_job", answers)
    options, kept = {"tensor_parallel_size": 2}, []
    order = ["default", "ours", "default", "ours"]
    result = bench_engine(
        "vllm",
        [str(tmp_path / "model")],
        order,
        [1],
        None,
        Console(quiet=True),
        options,
        keep=lambda result: kept.append(len(result["engines"])),
    )
    assert told == [(backend, options) for backend in order]
    assert [row["backend"] for row in result["engines"]] == order
    assert all(row["options"] == options for row in result["engines"])
    assert kept == [1, 2, 3, 4]


def test_options_of_the_engine_are_json_or_text(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hopper_mxfp4.bench.engine.bench_engine",
        lambda *args: seen.append(args) or {"engines": []},
    )
    given = ["tensor_parallel_size=2", "enable_expert_parallel=true", "kv_cache_dtype=fp8"]
    words = [word for option in given for word in ("--engine-option", option)]
    result = CliRunner().invoke(main, ["bench", "--engine", "vllm", *words])
    assert result.exit_code == 0, result.output
    assert seen[0][6] == {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "kv_cache_dtype": "fp8",
    }
    result = CliRunner().invoke(main, ["bench", "--engine", "vllm", "--engine-option", "tp 2"])
    assert result.exit_code == 2
    assert "is not NAME=VALUE" in result.output


def test_random_weights_of_every_kind():
    """Finite, of order one after a layer, and the same on ranks with other parameters."""
    from hopper_mxfp4_vllm.bench_worker import fill

    def empty(*shape, dtype=torch.float32):
        return torch.nn.Parameter(torch.full(shape, math.nan).to(dtype), requires_grad=False)

    def model(shard):
        made = torch.nn.Module()
        made.split = empty(shard, 64)
        made.weight = empty(128, 4096, dtype=torch.float8_e4m3fn)
        made.weight_scale_inv = empty(1, 32, dtype=torch.float8_e8m0fnu)
        made.k_scale = torch.nn.Parameter(torch.tensor(-1.0))
        made.norm = empty(64, dtype=torch.bfloat16)
        made.gate = torch.nn.Module()
        made.gate.weight = empty(8, 64)
        made.gate.tid2eid = torch.nn.Parameter(
            torch.zeros(100, 6, dtype=torch.int32), requires_grad=False
        )
        fill(made)
        return made

    one, other = model(3), model(5)
    assert all(t.float().isfinite().all() for t in one.parameters())
    assert one.k_scale == -1
    product = one.weight.float() * one.weight_scale_inv.float().repeat_interleave(128, 1)
    assert (product @ torch.ones(4096)).std() == pytest.approx(1, rel=0.2)
    assert torch.equal(one.gate.weight, other.gate.weight)
    assert torch.equal(one.gate.tid2eid, other.gate.tid2eid)
    experts = one.gate.tid2eid
    assert all(len(set(row)) == 6 for row in experts.tolist())
    assert experts.unique().tolist() == [*range(8)]


@pytest.mark.parametrize(
    ("given", "flashinfer"),
    [({}, None), ({"FLASHINFER_DISABLE_JIT": "1"}, "0"),
     ({"FLASHINFER_DISABLE_JIT": "1", "VLLM_ALLREDUCE_USE_FLASHINFER": "1"}, "1")],
)  # fmt: skip
def test_what_cannot_be_compiled_does_not_sum_over_ranks(
    random_model, monkeypatch, given, flashinfer
):
    from hopper_mxfp4_vllm import engine

    monkeypatch.setattr(os, "environ", dict(given))
    engine.set_environment_of(random_model)
    assert os.environ.get("VLLM_ALLREDUCE_USE_FLASHINFER") == flashinfer
    assert os.environ["HOPPER_MXFP4_ACTIVATIONS"] == "auto"


def test_speeds_are_beside_the_default(capsys, tmp_path):
    def row(backend, ms, prefill):
        return {
            "model": "gpt-oss-20b", "backend": backend, "layers": None, "engine": "vLLM 1",
            "options": {"tensor_parallel_size": 2}, "gpus": 2,
            "methods": {"A b": 24}, "import_s": 1.0, "ready_s": 20.4, "kv_cache_tokens": 123456,
            "decode_ms": {"1": ms, "8": 2 * ms}, "moe_ms": {"1": ms / 4},
            "prefill_tokens_s": prefill,
        }  # fmt: skip

    rows = [row("default", 3.0, 50_000.0), row("ours", 2.0, 60_000.0)]
    result = {"about": {"device": "some GPU", "when": "now"}, "engines": rows}
    show(result, Console(width=200))
    told = capsys.readouterr().out
    assert "gpt-oss-20b with tensor_parallel_size=2: decode step" in told
    assert "2.00 (1.50)" in told
    assert "0.50 (1.50)" in told
    assert "60,000 (1.20)" in told
    plot(result, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().count("<use") > 4
    with pytest.raises(ValueError, match="nothing to plot"):
        plot({"about": {}, "engines": [{"model": "m", "failed": "so"}]}, tmp_path / "none.svg")
    # Two that ran side by side, and one with other options, which has a table of its own.
    told_by = result | {"format": FORMAT}
    other = rows[1] | {"options": {"tensor_parallel_size": 4}}
    for name, some in (("a", rows[:1]), ("b", [rows[1], other])):
        (tmp_path / name).write_text(json.dumps(told_by | {"engines": some}))
    words = ["--from", str(tmp_path / "a"), "--from", str(tmp_path / "b")]
    words += ["--json", str(tmp_path / "all")]
    wide = CliRunner(env={"COLUMNS": "200"})
    ran = wide.invoke(main, ["bench", "--engine", "vllm", *words])
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "all").read_text())["engines"] == [*rows, other]
    assert "2.00 (1.50)" in ran.output
    assert "tensor_parallel_size=4" in ran.output
    (tmp_path / "a").write_text("{}")
    ran = wide.invoke(main, ["bench", "--engine", "vllm", *words])
    assert ran.exit_code == 1
    assert "is not a result of" in ran.output
