"""How our kernels are compiled where they run, and kept: any of them, on a machine without a
GPU.
"""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hopper_mxfp4 import LayerShape, env
from hopper_mxfp4.kernels.jit import ahead, nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.narrow import launch
from hopper_mxfp4.kernels.native import Native8Kernel, NativeKernel
from hopper_mxfp4.kernels.wide import launch as wide_launch

needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))


@needs_nvrtc
def test_the_cache_of_compiled_kernels(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    source = Source("small.cu", 'extern "C" __global__ void f(int* p) { *p = N; }', {})
    first = nvrtc.compile_cubin(source, {"N": 1})
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(
        "cuda.bindings.nvrtc.nvrtcCompileProgram", lambda *args: pytest.fail("it compiled again")
    )
    assert nvrtc.compile_cubin(source, {"N": 1}) == first
    monkeypatch.undo()
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    for damage in (b"", kept.read_bytes()[:-1], b"x" + kept.read_bytes()[1:]):
        kept.write_bytes(damage)
        caplog.clear()
        assert nvrtc.compile_cubin(source, {"N": 1}) == first
        assert "damaged" in caplog.text
    assert nvrtc.compile_cubin(source, {"N": 2}) != first
    with pytest.raises(RuntimeError, match=r"small\.cu does not compile with"):
        nvrtc.compile_cubin(Source("small.cu", "not C++", {}), {})


@needs_nvrtc
@pytest.mark.parametrize(
    ("takes", "said"),
    [("files", ""), ("no file", "can't be kept in the cache"), ("no folder", "is not used")],
)
def test_what_the_cache_does_not_take_the_process_keeps(takes, said, tmp_path, monkeypatch, caplog):
    """So that what a thread compiled ahead is not compiled again by who needs it."""

    def full(path, content):
        raise OSError("no space left on device")

    folder = "/dev/null/nowhere" if takes == "no folder" else str(tmp_path)
    monkeypatch.setenv(env.CACHE_DIR.name, folder)
    if takes == "no file":
        monkeypatch.setattr(nvrtc, "write_bytes", full)
    compiled = []
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: compiled.append(1) or b"a cubin")
    monkeypatch.setattr(nvrtc, "_unwritten", {})
    source = Source("small.cu", "// of which there is one", {})
    assert [nvrtc.compile_cubin(source, {}) for _ in range(3)] == [b"a cubin"] * 3
    assert len(compiled) == 1
    assert len(nvrtc._unwritten) == len(caplog.records) == bool(said)
    assert said in caplog.text
    nvrtc.compile_cubin(source, {"N": 2})
    assert len(compiled) == 2


@needs_nvrtc
def test_a_changed_header_is_another_kernel(tmp_path, monkeypatch):
    """What lies in the cache is of every header, also of those that headers include."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    text = '#include "outer.cuh"\nextern "C" __global__ void f(int* p) { *p = N; }'
    headers = {"inner.cuh": "#define N 1", "outer.cuh": '#include "inner.cuh"'}
    first = nvrtc.compile_cubin(Source("small.cu", text, headers), {})
    assert nvrtc.compile_cubin(Source("small.cu", text, dict(headers)), {}) == first
    (kept,) = (tmp_path / "kernels").iterdir()
    changed = Source("small.cu", text, headers | {"inner.cuh": "#define N 2"})
    assert nvrtc.compile_cubin(changed, {}) != first
    assert len([*(tmp_path / "kernels").iterdir()]) == 2
    assert kept.exists()
    with pytest.raises(RuntimeError, match=r"outer\.cuh"):
        nvrtc.compile_cubin(Source("small.cu", text, {}), {})


@pytest.mark.parametrize("fails", [False, True], ids=["compiles", "fails"])
def test_threads_that_want_the_same_kernel_wait_for_one_that_compiles_it(
    fails, tmp_path, monkeypatch
):
    if reason := nvrtc.problem():
        pytest.skip(reason)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    compiling, go_on, calls = threading.Event(), threading.Event(), []

    def compiled(source, options):
        calls.append(source.name)
        compiling.set()
        assert go_on.wait(60)
        if fails:
            raise RuntimeError("not C++")
        return b"a cubin"

    monkeypatch.setattr(nvrtc, "_compile", compiled)
    source = Source("small.cu", "// of which there is one", {})
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(nvrtc.compile_cubin, source, {})]
        assert compiling.wait(60)
        asked += [pool.submit(nvrtc.compile_cubin, source, {}) for _ in range(2)]
        assert nvrtc._under_way
        go_on.set()
    if fails:
        assert [str(each.exception()) for each in asked] == ["not C++"] * 3
        with pytest.raises(RuntimeError, match=r"not C\+\+"):
            nvrtc.compile_cubin(source, {})
    else:
        assert [each.result() for each in asked] == [b"a cubin"] * 3
        assert calls == ["small.cu"]
    assert not nvrtc._under_way


@pytest.fixture
def begun(monkeypatch):
    """The threads that `ahead` starts in the test."""
    threads = []

    def started(**options):
        threads.append(threading.Thread(**options))
        return threads[-1]

    monkeypatch.setattr(ahead, "threading", type("", (), {"Thread": staticmethod(started)}))
    ahead.begin.cache_clear()
    yield threads
    ahead.begin.cache_clear()


def test_what_is_begun_runs_once_beside_its_caller(begun, caplog):
    go_on, done = threading.Event(), []

    def work(name):
        assert go_on.wait(60)
        done.append(name)
        if name == "broken":
            raise RuntimeError("of no interest here")

    for name in ("first", "broken", "first"):
        ahead.begin(work, name)
    assert len(begun) == 2
    assert not done
    go_on.set()
    for thread in begun:
        thread.join()
    assert sorted(done) == ["broken", "first"]
    assert not caplog.records


@needs_nvrtc
@pytest.mark.parametrize("kernel", [NativeKernel(), Native8Kernel()], ids=lambda k: k.name)
def test_all_that_a_layer_needs_is_compiled_ahead(kernel, begun, tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    shape = LayerShape(4, 64, 64)
    kernel.compile_ahead(shape)
    for thread in begun:
        thread.join()
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("it was not compiled ahead"))
    launch.compile_all(shape, kernel._narrow.gemm)
    for tiling in kernel._wide.cut_layer(shape):
        wide_launch.compile_cubins(tiling)


def test_a_source_is_read_with_all_of_its_headers():
    """Each once, behind those that it includes itself; the shared ones from kernels/cuda."""
    source = launch.source()
    names = [*source.headers]
    assert {"config.cuh", "arguments.cuh", "streamer.cuh", "finisher.cuh"} < {*names}
    assert {"ptx.cuh", "convert.cuh", "routing.cuh", "types.cuh"} < {*names}
    assert '#include "streamer.cuh"' in source.text
    for n, (name, text) in enumerate(source.headers.items()):
        assert text.count("#pragma once\n") == 1, name
        for included in re.findall(r'#include "(.*)"', text):
            assert names.index(included) < n, f"{name} includes {included}"
    with pytest.raises(FileNotFoundError):
        sources.read("hopper_mxfp4.kernels.narrow", "none.cu")
