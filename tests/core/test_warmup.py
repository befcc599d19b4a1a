"""`hopper-mxfp4 warmup`: what it compiles into the cache."""

import os
import threading
import time

import pytest
from click.testing import CliRunner

from hopper_mxfp4 import LayerShape, env
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.native import NativeKernel
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.plugin import Compilation
from hopper_mxfp4.registry import kernels
from sm90 import Plugin

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


class Compiles(ReferenceKernel):
    """Another package's kernel, given functions from a shape to what it compiles for it."""

    name = "theirs"

    def __init__(self, *compilations):
        self.given = compilations

    def compilations(self, shape):
        return [each(shape) for each in self.given]


def test_by_default_it_compiles_what_auto_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(
        NativeKernel, "compilations", lambda self, shape: [Compilation(ran.append, (shape,))]
    )
    assert warmup("--workloads", "8,160,96,2 8,160,64,2").exit_code == 0
    assert sorted(ran, key=str) == [LayerShape(8, 160, 64), LayerShape(8, 160, 96)]


def test_another_packages_kernel_is_compiled(registered):
    """What is the same for several layers, once."""
    ran = []
    kernel = Compiles(
        lambda shape: Compilation(ran.append, (str(shape.intermediate_size),)),
        lambda shape: Compilation(ran.append, ("of every layer",)),
    )
    with registered(Plugin(kernel)):
        done = warmup("--kernel", "theirs", "--workloads", "8,160,96,2 8,160,64,2 8,160,96,4")
    assert done.exit_code == 0, done.output
    assert sorted(ran) == ["64", "96", "of every layer"]


def test_as_many_are_compiled_at_once_as_there_are_cores(registered, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3})
    three = threading.Barrier(3)

    def meet(shape):
        three.wait(60)

    with registered(Plugin(Compiles(lambda shape: Compilation(meet, (shape,))))):
        ran = warmup("--kernel", "theirs", "--workloads", "8,64,64,2 8,64,96,2 8,64,128,2")
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("name", ["reference", "nobodys"])
def test_a_kernel_that_compiles_nothing_is_refused(name, registered):
    with registered(Plugin(Compiles())):
        ran = warmup("--kernel", name, "--workloads", "8,160,96,2")
    assert ran.exit_code == 2
    told = " ".join(ran.output.split())
    choices = [known for known in kernels() if known != "reference"] + ["theirs"]
    assert f"'{name}' is no kernel that compiles; give {', '.join(choices)}" in told


def test_the_first_that_fails_is_the_last(registered, monkeypatch):
    """Its message is shown, and what has not begun never begins."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    ran = []

    def compiled(name):
        ran.append(name)
        if name == "broken":
            raise RuntimeError("broken.cu does not compile")
        if name == "begun":
            time.sleep(1)  # meanwhile the command hears of the one before

    kernel = Compiles(
        *(
            lambda shape, name=name: Compilation(compiled, (name,))
            for name in ("good", "broken", "begun", "never")
        )
    )
    with registered(Plugin(kernel)):
        failed = warmup("--kernel", "theirs", "--workloads", "8,160,96,2")
    assert failed.exit_code == 1
    assert "Error: broken.cu does not compile" in failed.output
    assert "Traceback" not in failed.output
    assert ran[:2] == ["good", "broken"]
    assert "never" not in ran


def test_without_nvrtc_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: "NVRTC can't be used (none); install it")
    ran = warmup("--workloads", "8,160,96,2")
    assert ran.exit_code == 1
    assert "install it" in ran.output
