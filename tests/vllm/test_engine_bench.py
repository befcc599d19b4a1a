"""`hopper-mxfp4 bench --engine vllm` on a small model, in vLLM's own CPU engine."""

import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from hopper_mxfp4.bench.engine import ON_A_CPU, plot, show
from hopper_mxfp4.bench.jobs import run_job
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


def test_a_model_of_random_weights_needs_no_files(tmp_path):
    """Its activations stay finite and its tokens go to many experts."""
    (tmp_path / "model").mkdir()
    config = gpt_oss_config(**SIZES, heads=16, vocabulary=1024)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    job = {
        "model": str(tmp_path / "model"),
        "random_weights": True,
        "backend": "ours",
        "batches": [1],
        "prompts": 2,
        "prompt_tokens": 32,
        "decoded": (2, 6),
    }
    found = run_job("hopper_mxfp4_vllm.engine", job, tmp_path / "ours", Console(quiet=True))
    assert found["methods"] == {"GptOssMethod reference": 2}
    assert found["decode_ms"]["1"] > 0


def test_speeds_are_beside_the_default(capsys, tmp_path):
    def row(backend, ms, prefill):
        return {
            "model": "gpt-oss-20b", "backend": backend, "layers": None, "engine": "vLLM 1",
            "methods": {"A b": 24}, "import_s": 1.0, "ready_s": 20.4, "kv_cache_tokens": 123456,
            "decode_ms": {"1": ms, "8": 2 * ms}, "prefill_tokens_s": prefill,
        }  # fmt: skip

    rows = [row("default", 3.0, 50_000.0), row("ours", 2.0, 60_000.0)]
    result = {"about": {"device": "some GPU", "when": "now"}, "engines": rows}
    show(result, Console(width=160))
    told = capsys.readouterr().out
    assert "2.00 (1.50)" in told
    assert "60,000 (1.20)" in told
    plot(result, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().count("<use") > 4
    with pytest.raises(ValueError, match="nothing to plot"):
        plot({"about": {}, "engines": [{"model": "m", "failed": "so"}]}, tmp_path / "none.svg")
