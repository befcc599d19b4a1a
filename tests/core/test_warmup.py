"""`hopper-mxfp4 warmup`: what it compiles into the cache."""

import pytest
from click.testing import CliRunner

from hopper_mxfp4 import LayerShape, env
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.cli.warmup import COMPILED
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.wide import launch as wide
from hopper_mxfp4.registry import kernels

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))


def warmup(*arguments):
    return CliRunner().invoke(main, ["warmup", *arguments])


@needs_nvrtc
def test_it_fills_the_cache(tmp_path, monkeypatch):
    """Of every part of a kernel once; what is there is not compiled again."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))

    def kept():
        return sorted(path.name for path in (tmp_path / "kernels").iterdir())

    ran = warmup("--workloads", "8,160,96,2 8,160,64,2", "--kernel", "narrow")
    assert ran.exit_code == 0, ran.output
    first = kept()
    # Two layers, two GEMMs, segments of 8 and of 16.
    assert [name.partition("-")[0] for name in first] == ["narrow"] * 8
    monkeypatch.setattr(nvrtc, "_compile", lambda *args: pytest.fail("it compiled again"))
    assert warmup("--workloads", "8,160,96,2", "--kernel", "narrow").exit_code == 0
    assert kept() == first
    monkeypatch.undo()
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    ran = warmup("--workloads", "8,160,96,2", "--kernel", "flashinfer")
    assert ran.exit_code == 0, ran.output
    (new,) = {*kept()} - {*first}
    assert new.startswith("staging-")


def test_what_each_choice_compiles(monkeypatch):
    """By default what `auto` runs: both of native's kernels, of every layer that is asked for."""
    made = []
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    for name in ("narrow", "wide", "narrow8", "wide8"):
        monkeypatch.setattr(
            f"hopper_mxfp4.kernels.{name}.launch.compile_all",
            lambda shape, name=name: made.append((name, shape.intermediate_size)),
        )
    assert {*COMPILED} < {*kernels()}, "names of HOPPER_MXFP4_KERNEL"
    assert warmup("--workloads", "8,160,96,2 8,160,64,2").exit_code == 0
    assert made == [("narrow", 96), ("wide", 96), ("narrow", 64), ("wide", 64)]
    made.clear()
    assert warmup("--workloads", "8,160,96,2", "--kernel", "wide").exit_code == 0
    assert made == [("wide", 96)]
    made.clear()
    assert warmup("--workloads", "8,160,96,2", "--kernel", "native8").exit_code == 0
    assert made == [("narrow8", 96), ("wide8", 96)]


def test_every_cut_of_wide_is_compiled(monkeypatch):
    made = []
    monkeypatch.setattr(wide, "compile_cubins", made.append)
    shape = LayerShape(8, 160, 96)
    wide.compile_all(shape)
    assert made == [*wide.cut_layer(shape)]
    assert len(made) == 2


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: "NVRTC can't be used (none); install it")
    ran = warmup("--workloads", "8,160,96,2")
    assert ran.exit_code == 1
    assert "install it" in ran.output
