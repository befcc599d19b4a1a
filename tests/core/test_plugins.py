"""Plugins: objects that are registered and taken away again, packages found by their entry point,
names taken twice.
"""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    CheckpointFamily,
    SwiGLU,
    family_for,
    fused_moe,
    prepare_experts,
)
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.plugin import hookimpl
from random_layers import random_weights
from sm90 import Plugin, Sm90Kernel

MINE = CheckpointFamily("mine", ("mine_moe",), rows="gate_up", bias=False)


class Everything(Plugin):
    """Uses all three hooks."""

    def __init__(self) -> None:
        super().__init__(Sm90Kernel("folded"))
        self.adapter = replace(plugins.adapters()["vllm"], framework="mine")

    @hookimpl
    def register_families(self, register) -> None:
        register(MINE)

    @hookimpl
    def register_adapters(self, register) -> None:
        register(self.adapter)


def registered_names() -> dict[str, set[str]]:
    return {
        "families": set(plugins.families()),
        "kernels": set(plugins.kernels()),
        "adapters": set(plugins.adapters()),
    }


def test_a_plugin_is_seen_and_gone_again() -> None:
    before = registered_names()
    assert before["families"] >= {"gpt_oss", "deepseek_v4"}
    assert before["kernels"] >= {"flashinfer", "reference"}
    assert "vllm" in before["adapters"]
    added = {"families": "mine", "kernels": "sm90-folded", "adapters": "mine"}
    assert not any(name in before[kind] for kind, name in added.items())
    w = random_weights(MINE, 2, 96, 32)
    plugin = Everything()
    plugins.manager.register(plugin)
    try:
        assert registered_names() == {kind: before[kind] | {name} for kind, name in added.items()}
        assert plugins.families()["mine"] is MINE
        assert plugins.adapters()["mine"] is plugin.adapter
        assert plugins.kernels()["sm90-folded"] is plugin.kernels[0]
        assert family_for({"model_type": "mine_moe"}) is MINE
        p = prepare_experts(w, family=MINE, swiglu=SwiGLU(), kernel="sm90-folded")
        assert p.kernel is plugin.kernels[0]
    finally:
        plugins.manager.unregister(plugin)
    assert registered_names() == before
    with pytest.raises(ValueError, match="no kernel is called 'sm90-folded'"):
        prepare_experts(w, family=MINE, swiglu=SwiGLU(), kernel="sm90-folded")
    # What is prepared stays usable: it holds its kernel.
    y = fused_moe(
        torch.ones(1, 96, dtype=torch.bfloat16),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        p,
    )
    assert y.any()


def test_built_in_kernels_are_asked_first(registered) -> None:
    """So that installing a plugin never changes what "auto" means where a built-in kernel can
    serve.
    """

    class Greedy(Sm90Kernel):
        auto_devices = frozenset({"cpu", "cuda"})

    with registered(Plugin(Greedy("by_k"))):
        assert list(plugins.kernels()) == [
            "native",
            "narrow",
            "wide",
            "native8",
            "narrow8",
            "wide8",
            "flashinfer",
            "reference",
            "sm90-by_k",
        ]
        p = prepare_experts(
            random_weights(DEEPSEEK_V4, 1, 32, 32), family=DEEPSEEK_V4, swiglu=SwiGLU()
        )
        assert p.kernel.name == "reference"


class Twice:
    @hookimpl
    def register_families(self, register) -> None:
        register(CheckpointFamily("gpt_oss", ("gpt_oss_2",), rows="gate_up", bias=True))

    @hookimpl
    def register_kernels(self, register) -> None:
        register(type("Mine", (), {"name": "reference"})())

    @hookimpl
    def register_adapters(self, register) -> None:
        register(type("Mine", (), {"framework": "vllm"})())


@pytest.mark.parametrize(
    ("collect", "name"),
    [(plugins.families, "gpt_oss"), (plugins.kernels, "reference"), (plugins.adapters, "vllm")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_name_taken_twice(collect, name, registered) -> None:
    """Neither may silently win; the message says which name, and gone is gone."""
    with (
        registered(Twice()),
        pytest.raises(ValueError, match=f"'{name}' is registered twice; uninstall or rename"),
    ):
        collect()
    assert name in collect()


# A package as a user would install it: a module and its metadata, nothing else.
MODULE = """
    from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
    from hopper_mxfp4.plugin import CheckpointFamily, hookimpl

    class Shiny(ReferenceKernel):
        name = "shiny"

    @hookimpl
    def register_kernels(register):
        register(Shiny())

    @hookimpl
    def register_families(register):
        family = CheckpointFamily("shiny", ("shiny_moe",), "interleaved", bias=False, limit=3.0)
        register(family)
"""
# What a user's process does; prints one line of JSON.
USER = """
    import json, torch
    from hopper_mxfp4 import DEEPSEEK_V4, ExpertWeights, SwiGLU
    from hopper_mxfp4 import fused_moe, prepare_experts, registry

    def u8(*shape):
        return torch.full(shape, 127, dtype=torch.uint8)

    w = ExpertWeights(u8(1, 64, 16), u8(1, 32, 16), u8(1, 64, 1), u8(1, 32, 1))
    seen = {"families": list(registry.families()), "kernels": list(registry.kernels())}
    try:
        p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="shiny")
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        y = fused_moe(x, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), p)
        seen["result"] = f"{p.kernel.name} gave {tuple(y.shape)}"
    except ValueError as error:
        seen["result"] = str(error)
    try:
        seen["swiglu"] = SwiGLU.from_config({"model_type": "shiny_moe"}).limit
    except ValueError as error:
        seen["swiglu"] = str(error)
    print(json.dumps(seen))
"""


def run_user(*folders: Path) -> dict:
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", textwrap.dedent(USER)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_an_installed_package(tmp_path) -> None:
    """Found by its entry point in a fresh process, and not there without it."""
    (tmp_path / "shiny_plugin.py").write_text(textwrap.dedent(MODULE))
    info = tmp_path / "shiny_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hopper_mxfp4]\nshiny = shiny_plugin\n")
    seen = run_user(tmp_path)
    assert "shiny" in seen["families"]
    assert seen["kernels"][:3] == ["native", "narrow", "wide"]
    assert "shiny" in seen["kernels"]
    assert seen["result"] == "shiny gave (1, 32)"
    assert seen["swiglu"] == 3.0
    gone = run_user()
    assert "shiny" not in gone["families"] + gone["kernels"]
    assert "no kernel is called 'shiny'" in gone["result"]
    assert "'shiny_moe'" in gone["swiglu"]
