"""What of smallbatch and hybrid needs no GPU: how layers are cut, that every cut compiles, which
kernel and tiles are taken, and what is launched.
"""

import ctypes
import hashlib
import logging
import re
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cuda_text import essence
from hopper_mxfp4 import LayerShape, SwiGLU, env
from hopper_mxfp4.bench.workloads import WORKLOADS, parse_workload
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.cli.warmup import COMPILED
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels import crossover as crossovers
from hopper_mxfp4.kernels import gemms_and_sum
from hopper_mxfp4.kernels.gemms_and_sum import (
    RESERVED_BYTES,
    SHARED_BYTES,
    SM_SHARED_BYTES,
    STATIC_SHARED_BYTES,
    Compiled,
    fits,
)
from hopper_mxfp4.kernels.hybrid import HybridKernel, small_tokens
from hopper_mxfp4.kernels.jit import driver, nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.smallbatch import kernel as smallbatch
from hopper_mxfp4.kernels.smallbatch import launch, tiling
from hopper_mxfp4.kernels.smallbatch.kernel import (
    REVISION,
    SmallBatchKernel,
    crossover,
    tiles_runner,
)
from hopper_mxfp4.kernels.smallbatch.tiling import (
    MAX_PAIRS,
    tile_gemm,
    tile_layer,
    tiles,
)
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.registry import kernels
from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.cards import CARDS
from hopper_mxfp4.tuning.tables import Bucket, Build, SmallBatch, Table, TunedShape

sizes = st.integers(1, 240).map(lambda n: 32 * n)
needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))


@given(experts=st.integers(1, 512), hidden=sizes, intermediate=sizes)
def test_a_cut_covers_the_layer_and_fits_the_gpu(experts, hidden, intermediate):
    shape = LayerShape(experts, hidden, intermediate)
    for tile in (8, 16):
        for gemm, k in zip(tile_layer(shape, tile), (hidden, intermediate), strict=True):
            chunks = -(-k // 128)
            assert gemm.streamers * gemm.chunks_per_warp >= chunks
            assert gemm.streamers * (gemm.chunks_per_warp - 1) < chunks, (
                "some warp would have nothing to do"
            )
            assert 1 <= gemm.streamers <= 16
            assert gemm.blocks_per_sm * gemm.threads <= 20 * 32, "no 96 registers a thread"
            if tile in tiles(shape):
                block = gemm.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES
                assert block <= SHARED_BYTES
                assert gemm.blocks_per_sm * (block + RESERVED_BYTES) <= SM_SHARED_BYTES
    assert fits(tile_layer(shape, 8), MAX_PAIRS) == (8 in tiles(shape))


def test_tiles_of_the_bodies():
    for workload in WORKLOADS.values():
        # 4096 takes 16 warps, and tiles of 16 tokens 4 more.
        wanted = (8, 16) if workload.hidden == 2880 else (8,)
        assert tiles(workload.shape) == wanted, workload.name


def test_a_layer_of_many_small_experts_has_room_for_its_lists():
    assert tiles(LayerShape(600, 160, 96))


def test_a_layer_too_wide_is_declined(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    wide = LayerShape(8, 1 << 14, 2880)
    assert tiles(wide) == ()
    assert "too large for its shared memory" in SmallBatchKernel().beside_flashinfer(
        wide, torch.device("cuda")
    )


def test_without_nvrtc_both_decline_with_what_to_install(monkeypatch):
    monkeypatch.setattr(
        nvrtc, "problem", lambda: "NVRTC can't be used (ImportError: none); install it"
    )
    monkeypatch.setattr(
        "hopper_mxfp4.kernels.flashinfer.kernel.FlashInferKernel.unsupported_reason",
        lambda *args: None,
    )
    for kernel in (SmallBatchKernel(), HybridKernel()):
        assert "install" in kernel.unsupported_reason(
            LayerShape(32, 2880, 2880), torch.device("cuda")
        )


@needs_nvrtc
@pytest.mark.parametrize("tile", [8, 16])
@pytest.mark.parametrize(
    "workload", ["gpt-oss-20b", "gpt-oss-120b-tp8", "dsv4-flash", "dsv4-flash-tp8"]
)
def test_it_compiles(workload, tile, tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    for gemm in tile_layer(WORKLOADS[workload].shape, tile):
        cubin = nvrtc.compile_cubin(launch.source(), gemm.macros())
        assert cubin[:4] == b"\x7fELF"
        assert b"moe_gemm" in cubin
        assert (b"moe_sum" in cubin) != gemm.gated


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
    assert {"config.cuh", "streamer.cuh", "finisher.cuh"} < {*names}
    assert {"ptx.cuh", "convert.cuh", "routing.cuh", "types.cuh"} < {*names}
    assert '#include "streamer.cuh"' in source.text
    for n, (name, text) in enumerate(source.headers.items()):
        assert text.count("#pragma once\n") == 1, name
        for included in re.findall(r'#include "(.*)"', text):
            assert names.index(included) < n, f"{name} includes {included}"
    with pytest.raises(FileNotFoundError):
        sources.read("hopper_mxfp4.kernels.smallbatch", "none.cu")


@needs_nvrtc
def test_warmup_fills_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    ran = CliRunner().invoke(main, ["warmup", "--workloads", "8,160,96,2 8,160,64,2"])
    assert ran.exit_code == 0, ran.output
    kept = sorted(path.name for path in (tmp_path / "kernels").iterdir())
    # Two layers, two GEMMs, tiles of 8 and of 16.
    assert sum(name.startswith("smallbatch-") for name in kept) == 8
    assert CliRunner().invoke(main, ["warmup", "--workloads", "8,160,96,2"]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == kept
    narrow = CliRunner().invoke(main, ["warmup", "--workloads", "8,192,64,2", "--kernel", "narrow"])
    assert narrow.exit_code == 0, narrow.output
    assert {*COMPILED} < {*kernels()}, "names of HOPPER_MXFP4_KERNEL"
    new = {path.name for path in (tmp_path / "kernels").iterdir()} - {*kept}
    assert new
    assert all(name.startswith("narrow-") for name in new), "and nothing of smallbatch's"


BUILD = Build("Test GPU", "9.9", "0" * 16, (3, 3))
NAMES = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")


def tuned_shape(shape, top_k):
    return TunedShape(
        shape.num_experts,
        round_up(shape.hidden_size, 128),
        round_up(shape.intermediate_size, 128),
        top_k,
        True,
        "separate",
    )


@pytest.fixture
def tables(monkeypatch):
    """A list of the tables there are, of which shapes they were asked, and this GPU.

    What a table is looked up by must be known without FlashInfer: no call of it is recorded.
    """
    given = SimpleNamespace(found=[], asked=[], card=None)
    choose = crossovers.choose_smallbatch

    def asked(shape, *args):
        given.asked.append(shape)
        return choose(shape, *args)

    monkeypatch.setattr(tactics, "tables", lambda: tuple(given.found))
    monkeypatch.setattr(crossovers, "choose_smallbatch", asked)
    monkeypatch.setattr(crossovers, "build_of", lambda device: BUILD)
    monkeypatch.setattr(crossovers, "card_on", lambda device: given.card)
    monkeypatch.setattr(
        "hopper_mxfp4.kernels.flashinfer.kernel.make_plan", lambda *args: pytest.fail("a plan")
    )
    log_once.cache_clear()
    yield given
    log_once.cache_clear()


def layer(*shape, **changes):
    """A layer of that shape, whose tensors have its padded sizes and no memory to speak of."""
    sizes = LayerShape(*shape)
    hidden, intermediate = round_up(sizes.hidden_size, 128), round_up(sizes.intermediate_size, 128)
    tensors = {name: torch.zeros(8, dtype=torch.uint8) for name in NAMES}
    tensors["w13"] = torch.zeros(1, dtype=torch.uint8).expand(1, 2 * intermediate, 1)
    tensors["w2"] = torch.zeros(1, dtype=torch.uint8).expand(1, hidden, 1)
    given = (
        {"batch_invariant": False, "ep_size": 1, "swiglu": SwiGLU(1.5, 0.5, None)}
        | tensors
        | changes
    )
    return SimpleNamespace(shape=sizes, plans={}, **given)


def measured(shape, top_k, tokens, wide_from, last=8192):
    buckets = (Bucket(1, (0, 3), 1.0, 1.0), Bucket(last, (0, 3), 1.0, 1.0))
    return Table(
        BUILD,
        tuned_shape(shape, top_k),
        buckets,
        None,
        SmallBatch(tokens, wide_from, REVISION),
        "table.json",
    )


@pytest.mark.parametrize(
    ("shape", "top_k", "tokens"),
    [
        ((32, 2880, 2880), 4, 64),
        ((128, 2880, 736), 4, 256),
        ((256, 4096, 2048), 6, 213),
        ((8, 2880, 2880), 65, 0),
        ((3, 160, 96), 8, 3),
    ],
)
def test_where_hybrid_changes_over_by_a_guess(shape, top_k, tokens, tables):
    assert small_tokens(layer(*shape), top_k) == tokens
    most = small_tokens(layer(*shape, ep_size=8), top_k)  # most pairs are masked
    assert 8 * tokens <= most < 8 * (tokens + 1)
    assert small_tokens(layer(*shape, batch_invariant=True), top_k) == 0


def test_where_hybrid_changes_over_by_a_table(tables, caplog):
    """As measured, times the ranks; looked up once a layer and top-k, and said once."""
    shape = (32, 2880, 2880)
    tables.found.append(measured(LayerShape(*shape), 4, 77, 33))
    with caplog.at_level(logging.INFO, "hopper_mxfp4.kernels.hybrid"):
        for _ in range(2):
            p = layer(*shape)
            assert small_tokens(p, 4) == small_tokens(p, 4) == 77
    assert crossover(p, 4)[:2] == (77, 33)
    assert crossover(layer(*shape, ep_size=4), 4)[:2] == (4 * 77, 4 * 33)
    assert tables.asked == [tuned_shape(p.shape, 4)] * 3, "once a layer"
    tables.found.clear()
    assert small_tokens(p, 4) == 77
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "MoE 32 experts top-4 2880x2880 runs smallbatch up to 77 tokens, "
        "measured for this shape on this kind of GPU (table.json)"
    )
    assert small_tokens(p, 2) == 128, "another top-k is not measured"
    assert small_tokens(layer(*shape, batch_invariant=True), 4) == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: replace(t, shape=replace(t.shape, intermediate=1536)), "of its very shape"),
        (
            lambda t: replace(t, smallbatch=replace(t.smallbatch, revision=REVISION + 1)),
            "another version of smallbatch",
        ),
        (lambda t: replace(t, smallbatch=None), "does not compare"),
    ],
    ids=["another shape", "another version", "not compared"],
)
def test_hybrid_does_not_believe_what_was_measured_of_something_else(change, why, tables, caplog):
    tables.found.append(change(measured(LayerShape(32, 2880, 2880), 4, 7, 5)))
    with caplog.at_level(logging.INFO, "hopper_mxfp4.kernels.hybrid"):
        p = layer(32, 2880, 2880)
        assert (small_tokens(p, 4), crossover(p, 4).wide_from) == (64, 41)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "up to 64 tokens, a guess by the pairs an expert: " in line
    assert why in line
    assert "`hopper-mxfp4 tune` measures it" in line


@pytest.mark.parametrize(
    ("change", "wanted", "why"),
    [
        ({"gpu": "Another"}, 77, "on another GPU, Another, which this one can't be compared with"),
        ({"gpu": "NVIDIA H800"}, 98, "scaled by bandwidth and rate from 77, "),
        ({"flashinfer": "8.8"}, 77, "with another FlashInfer, 8.8"),
    ],
    ids=["an unknown GPU", "another GPU", "another FlashInfer"],
)
def test_hybrid_takes_a_crossover_from_elsewhere_and_says_so(change, wanted, why, tables, caplog):
    """Better than a guess by the pairs an expert, which would be 64 here."""
    table = measured(LayerShape(32, 2880, 2880), 4, 77, 33)
    buckets = (Bucket(1, (0, 3), 50.0, 50.0), Bucket(8192, (0, 3), 200.0, 200.0))
    tables.found.append(replace(table, build=replace(BUILD, **change), buckets=buckets))
    tables.card = CARDS["H200"]
    with caplog.at_level(logging.INFO, "hopper_mxfp4.kernels.hybrid"):
        assert small_tokens(layer(32, 2880, 2880), 4) == wanted
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"runs smallbatch up to {wanted} tokens, " in line
    assert why in line
    assert "guess" not in line


@pytest.mark.parametrize(
    ("tokens", "wide_from", "last", "wanted"),
    [
        (0, 1, 8192, (0, 1)),
        (None, None, 8192, (8192, 8193)),  # the faster in every bucket
        (None, None, 16, (64, 41)),  # in every bucket, and those are few
        (None, 9, 48, (64, 9)),
    ],
)
def test_what_does_not_change_in_any_bucket(tokens, wide_from, last, wanted, tables):
    tables.found.append(measured(LayerShape(32, 2880, 2880), 4, tokens, wide_from, last))
    assert crossover(layer(32, 2880, 2880), 4)[:2] == wanted
    assert crossover(layer(32, 2880, 2880, ep_size=2), 4).tokens == 2 * wanted[0]


# Of what revision which code is. Change both here when the revision changes.
MEASURED = (1, "e75f3fb4f0c6a0aa")


def text_of(source):
    """A source behind its headers, in the order in which the compiler reads their contents."""
    return "\n".join([*source.headers.values(), source.text])


def fingerprint(text, monkeypatch):
    """Of the CUDA text and of how the workloads and their shards are cut and launched, in
    numbers.
    """
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: [*args, *kwargs.values()])
    made = [" ".join(essence(text))]
    for name in ("gpt-oss-20b", "gpt-oss-120b", "dsv4-flash"):
        for shard in ("", "-tp2", "-tp4", "-tp8"):
            shape = parse_workload(name + shard).shape
            for tile in tiles(shape):
                gemms = tile_layer(shape, tile)
                configs = gemms_and_sum._make_launches(
                    Compiled(gemms, (None,) * 3, 0, 132, {}), shape, 0, 8, 4
                ).configs
                made += [str([*gemm.macros().values()]) for gemm in gemms]
                made += [str([int(n) for n in flat(config)]) for config in configs]
    return hashlib.sha256("\n".join(made).encode()).hexdigest()[:16]


def flat(values):
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def test_a_change_of_the_kernel_makes_a_revision(monkeypatch):
    """Measured crossovers are believed by it, so it must change when the kernel's times may."""
    found = (REVISION, fingerprint(text_of(launch.source()), monkeypatch))
    assert found == MEASURED, (
        f"The CUDA source, its cuts or its launches are {found}, and {MEASURED} was measured. "
        "If times may differ, add 1 to REVISION in smallbatch/kernel.py, which voids all measured "
        "crossovers, and measure the shipped tables again with `hopper-mxfp4 tune`. "
        "Then, or if no time can differ, update the fingerprint line MEASURED here."
    )


def changed(source, old, new):
    assert old in source, "or it tests nothing"
    return source.replace(old, new)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: re.sub(r"//.*", "", s),
        lambda s: changed(s, "u32 total = 0;", "u32 total = 0; /* so far */"),
        lambda s: re.sub(r"(?m)^ +", " ", s),
        lambda s: changed(s, "if (more) load(i);", "if (more)\n  load( i ) ;"),
        lambda s: re.sub(r"\bchoice\b", "nth", s),  # declared after a comma
        lambda s: re.sub(r"\bup_to_lane\b", "scan", s),
        lambda s: re.sub(r"\btoken_of\b", "token_of_pair", s),  # a function
        lambda s: re.sub(r"\bChunk\b", "Part", s),  # a type
        lambda s: re.sub(r"\bUNITS_PER_SEGMENT\b", "UNITS_OF_ALL", s),  # a constant
        lambda s: re.sub(r"\bE2M1_BITS_IN_BF16X2\b", "BITS", s),  # a macro of its own
        lambda s: changed(s, "u16* const row = args.x", "u16* const of_x = args.x").replace(
            "row + 8 * i)", "of_x + 8 * i)"
        ),  # in one of the places that have a row
    ],
    ids=range(11),
)
def test_a_comment_a_name_and_formatting_are_no_change(change):
    text = text_of(launch.source())
    assert change(text) != text
    assert essence(change(text)) == essence(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("BLOCK_K = 128", "BLOCK_K = 64"),
        ("L2::256B", "L2::128B"),
        ("scale) + 126)", "scale) + 127)"),
        ("first * of.weights[j]", "second * of.weights[j]"),
        ("__expf(", "expf("),
        ("#pragma unroll 4", "#pragma unroll 2"),
        ("        sync_streamers();\n        const u32 stage", "        const u32 stage"),
        ("    const u8* weights;          // in the kernel's layout\n", ""),
        ("u32 scales[2][2];", "u8 scales[2][2];"),
        ("i < warp ?", "i <= warp ?"),
        # Python's packing follows the members.
        ("const float* topk_weights;", "const float* weights_of_topk;"),
        ("make_uint4(0, 0, 0, 0)", "make_uint4(0, 0, 0, 1)"),
        ("row = lane >> 2, quarter = lane & 3", "row = lane & 3, quarter = lane >> 2"),
        ("NUM_STREAMERS + N_TILES * NUM_STAGES", "NUM_STREAMERS + N_TILES * NUM_STAGES + 1"),
        ("return threadIdx.x;", "return threadIdx.y;"),
    ],
)
def test_any_other_change_is_one(old, new):
    text = text_of(launch.source())
    assert essence(changed(text, old, new)) != essence(text)


def test_what_it_does_not_call_is_no_change():
    """Other kernels' pieces of shared headers; what those call alone is not called either."""
    text = text_of(launch.source())
    spare = "DEVICE u32 spare(u32 a) { return a; }\ntemplate <int N>\nDEVICE u32 two(u32 a) "
    spare += "{ if (a) { return N; } return spare(a); }\n#pragma unroll\n"
    before = "DEVICE float bf16_to_float"
    assert essence(text.replace(before, spare + before)) != essence(text), "a directive is one"
    spare = spare.replace("#pragma unroll\n", "")
    assert essence(changed(text, before, spare + before)) == essence(text)
    called = changed(text, before, spare.replace("two", "load_byte") + before)
    assert essence(called) != essence(text)


def test_what_the_source_does_not_declare_keeps_its_name():
    """Two builtins in each other's place are a change; so is a member of a builtin type."""
    one = essence("__device__ float f(float4 v) { return rsqrtf(v.x) + sqrtf(v.y); }")
    assert one == essence("__device__ float g(float4 u) { return rsqrtf(u.x) + sqrtf(u.y); }")
    assert one != essence("__device__ float f(float4 v) { return sqrtf(v.x) + rsqrtf(v.y); }")
    assert one != essence("__device__ float f(float4 v) { return rsqrtf(v.y) + sqrtf(v.x); }")


def test_a_name_is_its_own_in_every_scope():
    two = "void f(int p) { g(p); } void h(int p, int q) { { int p = q; g(p); } g(p); }"
    assert essence(two) == essence(
        "void f(int a) { g(a); } void h(int b, int c) { { int d = c; g(d); } g(b); }"
    )
    assert essence(two) != essence(two.replace("} g(p); }", "} g(q); }"))
    assert essence("struct A { int a; int b; };") != essence("struct A { int b; int a; };")


@pytest.mark.parametrize(
    "change",
    [
        {"MAX_STREAMERS": 8},
        {"tile_gemm": lambda *args: replace(tile_gemm(*args), stages=3)},
        {"tile_gemm": lambda *args: replace(tile_gemm(*args), blocks_per_sm=1)},
    ],
    ids=["warps", "stages", "blocks"],
)
def test_another_cut_is_a_change(change, monkeypatch):
    tiles.cache_clear()
    for name, value in change.items():
        monkeypatch.setattr(tiling, name, value)
    assert fingerprint(text_of(launch.source()), monkeypatch) != MEASURED[1]
    tiles.cache_clear()


def test_shipped_crossovers_are_of_this_smallbatch():
    """Else every layer falls back to a guess: tune again on each card after a new revision."""
    shipped = [t for file in tactics._shipped_files() for t in tactics.read(file) if t.smallbatch]
    assert shipped
    for t in shipped:
        assert t.smallbatch.revision == REVISION, (t.source, t.shape)


def test_hybrid_asks_for_what_the_kernel_it_takes_needs(tables):
    hybrid = HybridKernel()
    p = layer(32, 2880, 2880)
    hybrid._large = SimpleNamespace(
        name="large",
        workspace_bytes=lambda p, tokens, top_k: 7 * tokens,
        make_runner=lambda *args: "large",
    )
    small = SmallBatchKernel()
    assert hybrid.workspace_bytes(p, 64, 4) == small.workspace_bytes(p, 64, 4)
    assert hybrid.workspace_bytes(p, 65, 4) == small.workspace_bytes(p, 64, 4), (
        "calls of fewer tokens get the same buffer"
    )
    assert hybrid.workspace_bytes(p, 1 << 20, 4) == 7 << 20
    hybrid._small = SimpleNamespace(make_runner=lambda *args: "small")
    assert [hybrid.make_runner(p, tokens, 4) for tokens in (1, 64, 65, 4096)] == [
        "small",
        "small",
        "large",
        "large",
    ]


class GemmArgs(ctypes.Structure):
    """The CUDA source's, by name."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weights", "scales", "bias", "x", "topk_ids", "topk_weights", "out")
        ),
        *((name, ctypes.c_int) for name in ("num_pairs", "top_k", "x_stride", "ids_are_int64")),
        *((name, ctypes.c_int) for name in ("ids_token_stride", "ids_choice_stride")),
        *((name, ctypes.c_int) for name in ("weights_token_stride", "weights_choice_stride")),
        ("top_k_reciprocal", ctypes.c_uint),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit")),
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "topk_ids", "out")),
        *((name, ctypes.c_int) for name in ("top_k", "ids_are_int64")),
        *((name, ctypes.c_int) for name in ("ids_token_stride", "ids_choice_stride")),
    ]


@pytest.mark.parametrize("kind", [GemmArgs, SumArgs])
def test_arguments_are_as_the_source_declares_them(kind):
    """Names, order and types of its struct; what a call is given is read by these below."""
    (text,) = re.findall(
        rf"^struct {kind.__name__} {{$(.*?)^}};$",
        text_of(launch.source()),
        re.MULTILINE | re.DOTALL,
    )
    types = {"int": ctypes.c_int, "u32": ctypes.c_uint, "float": ctypes.c_float}
    declared = []
    for line in re.sub("//.*", "", text).split(";")[:-1]:
        first, *others = line.replace("const ", "").split(",")
        of, name = first.rsplit(maxsplit=1)
        declared += [
            (one.strip(), types.get(of.strip(), ctypes.c_void_p)) for one in (name, *others)
        ]
    assert declared == kind._fields_


@pytest.fixture
def launched(tables, monkeypatch):
    """What the GPU would be handed: (tiles, kernel's arguments) of every launch, by thread."""
    by_thread, kinds = {}, {"fc1": GemmArgs, "fc2": GemmArgs, "sum": SumArgs}
    made = {}

    def compiled(shape, tile, device_index):
        functions = tuple((tile, name) for name in kinds)
        return made.setdefault(
            (shape, tile), Compiled(tile_layer(shape, tile), functions, 0, 132, {})
        )

    def launched_by_driver(config, function, parameters):
        tile, name = function
        time.sleep(0)  # lets other threads run, as the driver's does
        arguments = kinds[name].from_buffer_copy(
            kinds[name].from_address(ctypes.c_void_p.from_address(parameters).value)
        )
        by_thread.setdefault(threading.get_ident(), []).append((tile, config, arguments))

    monkeypatch.setattr(smallbatch, "compiled", compiled)
    monkeypatch.setattr(gemms_and_sum, "raw_stream", lambda index: 0)
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: args)
    monkeypatch.setattr(driver, "launch", launched_by_driver)
    return by_thread


def call_of(tokens, top_k, hidden=160):
    return (
        torch.randn(tokens, hidden).bfloat16(),
        torch.zeros(tokens, top_k, dtype=torch.int64),
        torch.rand(tokens, top_k),
        torch.empty(tokens, hidden).bfloat16(),
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_what_a_call_is_given(aligned, launched):
    """x is copied only where the kernel can't read it; the parts of the workspace lie inside of it
    and apart from each other.
    """
    tokens, top_k = 5, 3
    p = layer(8, 160, 96)
    wide = torch.randn(tokens, 168).bfloat16()
    _, ids, weights, out = call_of(tokens, top_k)
    x = wide[:, :160] if aligned else wide[:, 1:161]
    kernel = SmallBatchKernel()
    workspace = torch.empty(kernel.workspace_bytes(p, tokens, top_k), dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    ((_, _, fc1), (_, _, fc2), (_, _, total)) = launched[threading.get_ident()]
    begin, end, pairs = (
        workspace.data_ptr(),
        workspace.data_ptr() + workspace.numel(),
        tokens * top_k,
    )
    if aligned:
        assert (fc1.x, fc1.x_stride) == (x.data_ptr(), 168)
    else:
        assert (fc1.x, fc1.x_stride) == (begin, 160)
        assert torch.equal(workspace[: 2 * x.numel()].view(torch.bfloat16).view(x.shape), x)
        assert begin + 2 * x.numel() <= fc1.out
    assert fc2.x == fc1.out >= begin
    assert total.partial == fc2.out >= fc1.out + 2 * pairs * 96
    assert fc2.out + 4 * pairs * 160 <= end
    assert (fc1.out - begin) % 256 == (fc2.out - begin) % 256 == 0
    assert (fc1.weights, fc1.scales, fc1.bias) == (
        p.w13.data_ptr(),
        p.w13_scale.data_ptr(),
        p.w13_bias.data_ptr(),
    )
    assert (fc2.weights, fc2.scales, fc2.bias) == (
        p.w2.data_ptr(),
        p.w2_scale.data_ptr(),
        p.w2_bias.data_ptr(),
    )
    assert (fc1.topk_weights, fc2.topk_weights) == (None, weights.data_ptr())
    for one in (fc1, fc2):
        assert (one.num_pairs, one.top_k) == (pairs, top_k)
        assert (one.topk_ids, one.ids_are_int64) == (ids.data_ptr(), 1)
        assert (one.ids_token_stride, one.ids_choice_stride) == (top_k, 1)
        assert (one.weights_token_stride, one.weights_choice_stride) == (top_k, 1)
        assert (one.alpha, one.beta, one.limit) == (1.5, 0.5, float("inf"))
        assert all(p * one.top_k_reciprocal >> 31 == p // top_k for p in range(MAX_PAIRS))
    assert fc2.x_stride == 96
    assert (total.topk_ids, total.out, total.top_k) == (ids.data_ptr(), out.data_ptr(), top_k)
    assert (total.ids_are_int64, total.ids_token_stride, total.ids_choice_stride) == (1, top_k, 1)


def test_what_a_call_is_given_follows_the_layer(launched):
    """No biases; a clamp; ids and weights of any strides; and tensors that were given other memory
    since the last call.
    """
    p = layer(8, 160, 96, w13_bias=None, w2_bias=None, swiglu=SwiGLU(1.0, 0.0, 7.0))
    x, _, _, out = call_of(4, 3)
    ids, weights = torch.zeros(3, 8, dtype=torch.int32).t()[::2], torch.rand(4, 9)[:, ::3]
    kernel = SmallBatchKernel()
    workspace = torch.empty(kernel.workspace_bytes(p, 4, 3), dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    p.w13.data, p.w2_scale.data = torch.ones_like(p.w13), torch.ones(8, dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    fc1, fc2, total = (arguments for _, _, arguments in launched[threading.get_ident()][3:])
    assert (fc1.weights, fc2.scales) == (p.w13.data_ptr(), p.w2_scale.data_ptr())
    assert (fc1.bias, fc2.bias, fc1.limit) == (None, None, 7.0)
    assert (fc1.ids_are_int64, fc2.ids_token_stride, fc2.ids_choice_stride) == (0, 2, 8)
    assert (fc2.weights_token_stride, fc2.weights_choice_stride) == (9, 3)
    assert (total.ids_are_int64, total.ids_token_stride, total.ids_choice_stride) == (0, 2, 8)


def test_the_tiles_of_a_call(launched, tables):
    """By the table, by a guess, and as `tiles_runner` is told; a layer's look-ups happen once."""
    shape = (32, 2880, 736)
    tables.found.append(measured(LayerShape(*shape), 4, 64, 9))
    p, kernel = layer(*shape), SmallBatchKernel()
    x, ids, weights, out = call_of(60, 4, 2880)
    workspace = torch.empty(kernel.workspace_bytes(p, 60, 4), dtype=torch.uint8)

    def tiles_of(runner, *tokens):
        launched.clear()
        for m in tokens:
            runner(p, m, 4)(Call(x[:m], ids[:m], weights[:m], out[:m], workspace), p)
        return [
            tile
            for tile, _, arguments in launched[threading.get_ident()]
            if isinstance(arguments, SumArgs)
        ]

    assert tiles_of(kernel.make_runner, 1, 8, 9, 60) == [8, 8, 16, 16]
    tables.found.clear()
    assert tiles_of(kernel.make_runner, 8, 9) == [8, 16]
    assert tables.asked == [tuned_shape(p.shape, 4)]
    p.plans.clear()
    assert tiles_of(kernel.make_runner, 9, 40, 41) == [8, 8, 16]
    p.plans.clear()
    for tile in (8, 16):
        assert tiles_of(partial(tiles_runner, tile), 1, 60) == [tile, tile]
    assert p.plans == {}, "decided nothing"


def test_a_call_too_large_for_one_goes_in_parts(launched, tables):
    tables.found.append(measured(LayerShape(8, 160, 96), 8, 100, 600))
    p, kernel = layer(8, 160, 96), SmallBatchKernel()
    x, ids, weights, out = call_of(1100, 8)
    workspace = torch.empty(kernel.workspace_bytes(p, 1100, 8), dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    seen = launched[threading.get_ident()]
    assert [(tile, arguments.num_pairs) for tile, _, arguments in seen[::3]] == [
        (8, MAX_PAIRS),
        (8, MAX_PAIRS),
        (8, 8 * (1100 - 2 * MAX_PAIRS // 8)),
    ]
    assert [arguments.out for _, _, arguments in seen[2::3]] == [
        out[m:].data_ptr() for m in (0, 512, 1024)
    ]


def test_threads_do_not_see_each_others_calls(launched):
    """Every launch is handed its own call's addresses, with one layer and one number of tokens."""
    p, kernel = layer(8, 160, 96), SmallBatchKernel()
    workspace = torch.empty(kernel.workspace_bytes(p, 5, 3), dtype=torch.uint8)
    calls = [call_of(5, 3) for _ in range(4)]
    idents = {}

    def work(n):
        idents[n] = threading.get_ident()
        x, ids, weights, out = calls[n]
        for _ in range(300):
            kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
        done.wait()  # else its ident may be given to the next

    done = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (x, ids, weights, out) in enumerate(calls):
        seen = launched[idents[n]]
        assert len(seen) == 900
        assert {arguments.x for _, _, arguments in seen[::3]} == {x.data_ptr()}
        assert {(arguments.topk_ids, arguments.topk_weights) for _, _, arguments in seen[1::3]} == {
            (ids.data_ptr(), weights.data_ptr())
        }
        assert {arguments.out for _, _, arguments in seen[2::3]} == {out.data_ptr()}


def test_hybrid_loads_both(monkeypatch):
    loaded = []
    hybrid = HybridKernel()
    hybrid._small, hybrid._large = (
        SimpleNamespace(warm_up=lambda p, n=n: loaded.append(n)) for n in ("small", "large")
    )
    hybrid.warm_up(None)
    assert loaded == ["small", "large"]
