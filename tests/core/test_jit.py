"""How our kernels are compiled where they run, and kept: any of them, on a machine without a
GPU.
"""

import re

import pytest

from hopper_mxfp4 import env
from hopper_mxfp4.kernels.jit import nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.narrow import launch

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
    monkeypatch.setenv(env.CACHE_DIR.name, "/dev/null/nowhere")
    caplog.clear()
    assert nvrtc.compile_cubin(source, {"N": 1}) == first
    assert "not used" in caplog.text
    with pytest.raises(RuntimeError, match=r"small\.cu does not compile with"):
        nvrtc.compile_cubin(Source("small.cu", "not C++", {}), {})


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
