"""A real engine on a GPT-OSS checkpoint, from the command a newcomer types."""

import json

import pytest
import torch
from click.testing import CliRunner

from hopper_mxfp4.cli.demo import oracle
from hopper_mxfp4.cli.main import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(main, ["demo", "--dir", str(folder)], catch_exceptions=False)
    return folder, result


def test_greedy_tokens_are_those_of_transformers(demo):
    folder, result = demo
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report.json").read_text())
    assert len(report["rows"]) == 2
    for row in report["rows"]:
        assert len(row["engine"]) == 12
        assert row["engine"] == row["oracle"]
    assert report["layers"] == 2
    assert report["calls"] == 2 * 12  # each layer once a step, both prompts in one batch
    kernel = "native" if torch.cuda.is_available() else "reference"
    assert report["kernel"] == kernel
    assert "kernel " + kernel in result.output


def test_the_log_says_once_what_was_taken_over(demo):
    folder, _ = demo
    lines = [
        line
        for line in (folder / "engine.log").read_text().splitlines()
        if "hopper-mxfp4 takes over" in line
    ]
    assert len(lines) == 1
    assert "SwiGLU(alpha=1.702, beta=1.0, limit=7.0)" in lines[0]


def test_the_tokens_depend_on_the_experts(demo):
    """Else equal tokens would prove nothing.

    With the experts' scales a notch lower, transformers says something else.
    """
    from safetensors.torch import load_file, save_file

    folder, _ = demo
    job = json.loads((folder / "oracle.job.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    model = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(model)
    try:
        save_file(
            {k: t - 1 if k.endswith("_scales") else t for k, t in tensors.items()},
            model,
            metadata={"format": "pt"},
        )
        changed = oracle(job)["tokens"]
    finally:
        save_file(tensors, model, metadata={"format": "pt"})
    for row, tokens in zip(report["rows"], changed, strict=True):
        assert row["oracle"] != tokens
