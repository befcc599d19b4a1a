"""How our kernels are compiled where they run, and kept: any of them, on a machine without a
GPU.
"""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from hopper_mxfp4 import env
from hopper_mxfp4.kernels.jit import ahead, driver, nvrtc, sources
from hopper_mxfp4.kernels.jit.ahead import begin
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.narrow import kernel as narrow
from hopper_mxfp4.kernels.narrow import launch
from hopper_mxfp4.kernels.wide import kernel as wide
from hopper_mxfp4.plugin import Compilation
from hopper_mxfp4.registry import kernels
from test_native import layer

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


@needs_nvrtc
@pytest.mark.parametrize("fails", [False, True], ids=["compiles", "fails"])
def test_threads_that_want_the_same_kernel_wait_for_one_that_compiles_it(
    fails, tmp_path, monkeypatch
):
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


def test_what_is_begun_runs_once_beside_its_caller(monkeypatch, caplog):
    go_on, done, threads = threading.Event(), [], []

    def thread(**options):
        threads.append(threading.Thread(**options))
        return threads[-1]

    monkeypatch.setattr(ahead, "threading", SimpleNamespace(Thread=thread))

    def work(name):
        assert go_on.wait(60)
        done.append(name)
        if name == "broken":
            raise RuntimeError("of no interest here")

    for name in ("first", "broken", "first"):
        begin(Compilation(work, (name,)))
    assert len(threads) == 2
    assert not done
    go_on.set()
    for started in threads:
        started.join()
    assert sorted(done) == ["broken", "first"]
    assert not caplog.records


@pytest.mark.parametrize(
    "sizes",
    [(4, 64, 64), (256, 4096, 2048), (8, 8192, 2048)],
    ids=["small", "no segments of 16", "narrow8 can't"],
)
@pytest.mark.parametrize("name", ["native", "narrow", "wide", "native8", "narrow8", "wide8"])
def test_all_that_a_layer_needs_is_compiled_ahead(name, sizes, monkeypatch):
    """And nothing else, from its shape alone."""
    asked = set()

    def compiled(source, macros):
        asked.add((source.text, *source.headers.values(), *macros.items()))
        return b""

    monkeypatch.setattr(nvrtc, "compile_cubin", compiled)
    monkeypatch.setattr(driver, "load", lambda cubin, names, *_: [0] * len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    for module in (narrow, wide):
        monkeypatch.setattr(module, "compiled", module.compiled.__wrapped__)  # nothing stays cached
    kernel, p = kernels()[name], layer(*sizes)
    for compilation in kernel.compilations(p.shape):
        compilation.run()
    ahead_of_it = asked.copy()
    asked.clear()
    kernel.warm_up(p)
    if asked:
        for tokens in (1, 10, 100, 1000, 10_000):
            kernel.make_runner(p, tokens, 4)
    assert asked == ahead_of_it
    assert bool(asked) == ((name, sizes[1]) != ("narrow8", 8192))


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
