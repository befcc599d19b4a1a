"""What of the smallbatch and hybrid kernels needs no GPU: how layers are cut, and that every cut compiles."""

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
from hopper_mxfp4.bench.bodies import BODIES, parse_body
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels.hybrid import HybridKernel, small_tokens
from hopper_mxfp4.kernels.jit import driver, nvrtc
from hopper_mxfp4.kernels.smallbatch import kernel as smallbatch
from hopper_mxfp4.kernels.smallbatch.kernel import (
    MAX_PAIRS,
    RESERVED_BYTES,
    REVISION,
    SHARED_BYTES,
    SM_SHARED_BYTES,
    STATIC_SHARED_BYTES,
    Compiled,
    SmallBatchKernel,
    cut,
    cuts,
    fits,
    switches,
    tiles,
    tiles_runner,
)
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.cards import CARDS
from hopper_mxfp4.tuning.tables import Bucket, Build, SmallBatch, Table, TunedShape

sizes = st.integers(1, 240).map(lambda n: 32 * n)
needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))


@given(experts=st.integers(1, 512), hidden=sizes, intermediate=sizes)
def test_a_cut_covers_the_layer_and_fits_the_gpu(experts, hidden, intermediate):
    shape = LayerShape(experts, hidden, intermediate)
    for nt in (1, 2):
        for gemm, k in zip(cuts(shape, nt), (hidden, intermediate), strict=True):
            chunks = -(-k // 128)
            assert gemm.warps * gemm.chunks_a_warp >= chunks
            assert gemm.warps * (gemm.chunks_a_warp - 1) < chunks, (
                "some warp would have nothing to do"
            )
            assert 1 <= gemm.warps <= 16
            assert gemm.blocks * gemm.threads <= 20 * 32, "no 96 registers a thread"
            if nt in tiles(shape):
                block = gemm.shared_bytes(MAX_PAIRS) + STATIC_SHARED_BYTES
                assert block <= SHARED_BYTES
                assert gemm.blocks * (block + RESERVED_BYTES) <= SM_SHARED_BYTES
    assert fits(cuts(shape, 1)) == (1 in tiles(shape))


def test_tiles_of_the_bodies():
    for body in BODIES.values():
        wanted = (
            (1, 2) if body.hidden == 2880 else (1,)
        )  # 4096 takes 16 warps, and tiles of 16 tokens 4 more
        assert tiles(body.shape) == wanted, body.name


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
@pytest.mark.parametrize("nt", [1, 2])
@pytest.mark.parametrize(
    "body", ["gpt-oss-20b", "gpt-oss-120b-tp8", "dsv4-flash", "dsv4-flash-tp8"]
)
def test_it_compiles_without_spilling_much(body, nt, tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    for gemm in cuts(BODIES[body].shape, nt):
        cubin = nvrtc.compile_cubin(smallbatch.source(), "smallbatch.cu", gemm.macros())
        assert cubin[:4] == b"\x7fELF"
        assert b"moe_gemm" in cubin
        assert (b"moe_sum" in cubin) != gemm.gated


@needs_nvrtc
def test_the_cache_of_compiled_kernels(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    source = 'extern "C" __global__ void f(int* p) { *p = N; }'
    first = nvrtc.compile_cubin(source, "small.cu", {"N": 1})
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(
        "cuda.bindings.nvrtc.nvrtcCompileProgram", lambda *args: pytest.fail("it compiled again")
    )
    assert nvrtc.compile_cubin(source, "small.cu", {"N": 1}) == first
    monkeypatch.undo()
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    for damage in (b"", kept.read_bytes()[:-1], b"x" + kept.read_bytes()[1:]):
        kept.write_bytes(damage)
        caplog.clear()
        assert nvrtc.compile_cubin(source, "small.cu", {"N": 1}) == first
        assert "damaged" in caplog.text
    assert nvrtc.compile_cubin(source, "small.cu", {"N": 2}) != first
    monkeypatch.setenv(env.CACHE_DIR.name, "/dev/null/nowhere")
    caplog.clear()
    assert nvrtc.compile_cubin(source, "small.cu", {"N": 1}) == first
    assert "not used" in caplog.text
    with pytest.raises(RuntimeError, match=r"small\.cu does not compile with"):
        nvrtc.compile_cubin("not C++", "small.cu", {})


@needs_nvrtc
def test_warmup_fills_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    ran = CliRunner().invoke(main, ["warmup", "--bodies", "8,160,96,2 8,160,64,2"])
    assert ran.exit_code == 0, ran.output
    kept = sorted(path.name for path in (tmp_path / "kernels").iterdir())
    assert (
        sum(name.startswith("smallbatch-") for name in kept) == 8
    )  # two layers, two GEMMs, tiles of 8 and of 16
    assert CliRunner().invoke(main, ["warmup", "--bodies", "8,160,96,2"]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == kept


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
    """A list of the tables there are, and how FlashInfer is asked without one."""
    found, asked = [], []

    def plan(p, top_k):
        asked.append(top_k)
        return SimpleNamespace(shape=tuned_shape(p.shape, top_k), build=BUILD, card=None)

    monkeypatch.setattr(tactics, "tables", lambda: tuple(found))
    monkeypatch.setattr(smallbatch, "flashinfer_plan", plan)
    log_once.cache_clear()
    yield SimpleNamespace(found=found, asked=asked)
    log_once.cache_clear()


def layer(*shape, **changes):
    tensors = {name: torch.zeros(8, dtype=torch.uint8) for name in NAMES}
    given = (
        {"batch_invariant": False, "ep_size": 1, "swiglu": SwiGLU(1.5, 0.5, None)}
        | tensors
        | changes
    )
    return SimpleNamespace(shape=LayerShape(*shape), plans={}, **given)


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
    most = small_tokens(layer(*shape, ep_size=8), top_k)  # most pairs are holes
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
    assert switches(p, 4)[:2] == (77, 33)
    assert switches(layer(*shape, ep_size=4), 4)[:2] == (4 * 77, 4 * 33)
    assert tables.asked == [4, 4, 4], "once a layer"
    tables.found.clear()
    assert small_tokens(p, 4) == 77
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        line
        == "MoE 32 experts top-4 2880x2880 runs smallbatch up to 77 tokens, measured for this shape on this kind of GPU (table.json)"
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
        assert (small_tokens(p, 4), switches(p, 4).wide_from) == (64, 41)
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
def test_hybrid_takes_a_crossover_from_elsewhere_and_says_so(
    change, wanted, why, tables, caplog, monkeypatch
):
    """Better than a guess by the pairs an expert, which would be 64 here."""
    table = measured(LayerShape(32, 2880, 2880), 4, 77, 33)
    buckets = (Bucket(1, (0, 3), 50.0, 50.0), Bucket(8192, (0, 3), 200.0, 200.0))
    tables.found.append(replace(table, build=replace(BUILD, **change), buckets=buckets))
    plan = smallbatch.flashinfer_plan

    def on_an_h200(p, top_k):
        found = plan(p, top_k)
        found.card = CARDS["H200"]
        return found

    monkeypatch.setattr(smallbatch, "flashinfer_plan", on_an_h200)
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
    assert switches(layer(32, 2880, 2880), 4)[:2] == wanted
    assert switches(layer(32, 2880, 2880, ep_size=2), 4).tokens == 2 * wanted[0]


# Of what revision which code is. Change both here when the revision changes.
MEASURED = (1, "ca507c3148dd3e3b")


def fingerprint(source, monkeypatch):
    """Of the source and of how the bodies and their shards are cut and launched, in numbers."""
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: [*args, *kwargs.values()])
    made = [" ".join(essence(source))]
    for name in ("gpt-oss-20b", "gpt-oss-120b", "dsv4-flash"):
        for shard in ("", "-tp2", "-tp4", "-tp8"):
            shape = parse_body(name + shard).shape
            for nt in tiles(shape):
                gemms = cuts(shape, nt)
                configs = smallbatch._launches(
                    Compiled(gemms, (None,) * 3, 0, 132, {}), shape, 0, 8, 4
                ).configs
                made += [str([*gemm.macros().values()]) for gemm in gemms]
                made += [str([int(n) for n in flat(config)]) for config in configs]
    return hashlib.sha256("\n".join(made).encode()).hexdigest()[:16]


def flat(values):
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def test_a_change_of_the_kernel_makes_a_revision(monkeypatch):
    """Measured crossovers are believed by it, so that it must change when the kernel's times may."""
    found = (REVISION, fingerprint(smallbatch.source(), monkeypatch))
    assert found == MEASURED, (
        f"smallbatch.cu, its cuts or its launches are {found}, and {MEASURED} was measured. "
        "If times may differ, add 1 to REVISION in smallbatch.py, which voids all measured "
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
        lambda s: changed(s, "u32 before = 0;", "u32 before = 0; /* so far */"),
        lambda s: re.sub(r"(?m)^ +", " ", s),
        lambda s: changed(s, "if (more) load(q, i);", "if (more)\n  load( q , i ) ;"),
        lambda s: re.sub(r"\bseg_next\b", "following", s),  # declared after a comma
        lambda s: re.sub(r"\blane\b", "of_warp", s),
        lambda s: re.sub(r"\blocate\b", "find", s),  # a lambda
        lambda s: re.sub(r"\btoken_of\b", "token_of_pair", s),  # a function
        lambda s: re.sub(r"\bStep\b", "Part", s),  # a type
        lambda s: re.sub(r"\bUNITS\b", "UNITS_OF_ALL", s),  # a macro of its own
        lambda s: changed(s, "u16* const row = a.x", "u16* const of_x = a.x").replace(
            '"l"(row + 8 * q)', '"l"(of_x + 8 * q)'
        ),  # in one of the places that have a row
    ],
    ids=range(11),
)
def test_a_comment_a_name_and_formatting_are_no_change(change):
    source = smallbatch.source()
    assert change(source) != source
    assert essence(change(source)) == essence(source)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#define CHUNK 128", "#define CHUNK 64"),
        ("L2::256B", "L2::128B"),
        ("+ 126) * 0x800080u", "+ 127) * 0x800080u"),
        ("v0 * topw[j]", "v1 * topw[j]"),
        ("__expf(", "expf("),
        ("#pragma unroll 4", "#pragma unroll 2"),
        ("    sync_streamers();\n            const u32 buf", "    const u32 buf"),
        ("const u8* w;        // [E, WROWS, KP/2], FlashInfer's interleaved words\n", ""),
        ("u32 s[2][2];", "u8 s[2][2];"),
        ("i < warp ?", "i <= warp ?"),
        ("const float* topw;", "const float* top_weight;"),  # Python's packing follows the members
        ("make_uint4(0, 0, 0, 0)", "make_uint4(0, 0, 0, 1)"),
        ("lane >> 2, t = lane & 3", "lane & 3, t = lane >> 2"),
        ("WARPS (WK + NT * BUFS)", "WARPS (WK + BUFS * NT + 1)"),
        ("threadIdx.x, lane", "threadIdx.y, lane"),
    ],
)
def test_any_other_change_is_one(old, new):
    source = smallbatch.source()
    assert essence(changed(source, old, new)) != essence(source)


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
        {"MAX_WARPS": 8},
        {"cut": lambda *args: replace(cut(*args), buffers=3)},
        {"cut": lambda *args: replace(cut(*args), blocks=1)},
    ],
    ids=["warps", "buffers", "blocks"],
)
def test_another_cut_is_a_change(change, monkeypatch):
    tiles.cache_clear()
    for name, value in change.items():
        monkeypatch.setattr(smallbatch, name, value)
    assert fingerprint(smallbatch.source(), monkeypatch) != MEASURED[1]
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


class Args(ctypes.Structure):
    """smallbatch.cu's, by name."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("w", "scale", "bias", "x", "ids", "topw", "out")
    ]
    _fields_ += [
        (name, ctypes.c_int)
        for name in (
            "pairs",
            "top_k",
            "x_stride",
            "ids64",
            "ids_s0",
            "ids_s1",
            "topw_s0",
            "topw_s1",
        )
    ]
    _fields_ += [("magic", ctypes.c_uint)] + [
        (name, ctypes.c_float) for name in ("alpha", "beta", "limit")
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("partial", "ids", "out")]
    _fields_ += [(name, ctypes.c_int) for name in ("top_k", "ids64", "ids_s0", "ids_s1")]


@pytest.mark.parametrize("kind", [Args, SumArgs])
def test_arguments_are_as_the_source_declares_them(kind):
    """Names, order and types of its struct; what a call is given is read by these below."""
    (text,) = re.findall(
        rf"^struct {kind.__name__} {{$(.*?)^}};$", smallbatch.source(), re.MULTILINE | re.DOTALL
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
    by_thread, kinds = {}, {"fc1": Args, "fc2": Args, "sum": SumArgs}
    made = {}

    def compiled(shape, nt, device_index):
        return made.setdefault(
            (shape, nt), Compiled(cuts(shape, nt), tuple((nt, name) for name in kinds), 0, 132, {})
        )

    def launch(config, function, parameters):
        nt, name = function
        time.sleep(0)  # lets other threads run, as the driver's does
        arguments = kinds[name].from_buffer_copy(
            kinds[name].from_address(ctypes.c_void_p.from_address(parameters).value)
        )
        by_thread.setdefault(threading.get_ident(), []).append((nt, config, arguments))

    monkeypatch.setattr(smallbatch, "compiled", compiled)
    monkeypatch.setattr(smallbatch, "raw_stream", lambda index: 0)
    monkeypatch.setattr(driver, "launch_config", lambda *args, **kwargs: args)
    monkeypatch.setattr(driver, "launch", launch)
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
    """x copied only where the kernel can't read it; the parts of the workspace apart from each other and inside of it."""
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
    assert (fc1.w, fc1.scale, fc1.bias) == (
        p.w13.data_ptr(),
        p.w13_scale.data_ptr(),
        p.w13_bias.data_ptr(),
    )
    assert (fc2.w, fc2.scale, fc2.bias) == (
        p.w2.data_ptr(),
        p.w2_scale.data_ptr(),
        p.w2_bias.data_ptr(),
    )
    assert (fc1.topw, fc2.topw) == (None, weights.data_ptr())
    for one in (fc1, fc2):
        assert (one.pairs, one.top_k, one.ids, one.ids64, one.ids_s0, one.ids_s1) == (
            pairs,
            top_k,
            ids.data_ptr(),
            1,
            top_k,
            1,
        )
        assert (one.topw_s0, one.topw_s1, one.alpha, one.beta, one.limit) == (
            top_k,
            1,
            1.5,
            0.5,
            float("inf"),
        )
        assert all(p * one.magic >> 31 == p // top_k for p in range(MAX_PAIRS))
    assert fc2.x_stride == 96
    assert (total.ids, total.out, total.top_k) == (ids.data_ptr(), out.data_ptr(), top_k)
    assert (total.ids64, total.ids_s0, total.ids_s1) == (1, top_k, 1)


def test_what_a_call_is_given_follows_the_layer(launched):
    """No biases; a clamp; ids and weights of any strides; and tensors that were given other memory since the last call."""
    p = layer(8, 160, 96, w13_bias=None, w2_bias=None, swiglu=SwiGLU(1.0, 0.0, 7.0))
    x, _, _, out = call_of(4, 3)
    ids, weights = torch.zeros(3, 8, dtype=torch.int32).t()[::2], torch.rand(4, 9)[:, ::3]
    kernel = SmallBatchKernel()
    workspace = torch.empty(kernel.workspace_bytes(p, 4, 3), dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    p.w13.data, p.w2_scale.data = torch.ones(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    fc1, fc2, total = (arguments for _, _, arguments in launched[threading.get_ident()][3:])
    assert (fc1.w, fc2.scale) == (p.w13.data_ptr(), p.w2_scale.data_ptr())
    assert (fc1.bias, fc2.bias, fc1.limit) == (None, None, 7.0)
    assert (fc1.ids64, fc2.ids_s0, fc2.ids_s1, fc2.topw_s0, fc2.topw_s1) == (0, 2, 8, 9, 3)
    assert (total.ids64, total.ids_s0, total.ids_s1) == (0, 2, 8)


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
            nt
            for nt, _, arguments in launched[threading.get_ident()]
            if isinstance(arguments, SumArgs)
        ]

    assert tiles_of(kernel.make_runner, 1, 8, 9, 60) == [1, 1, 2, 2]
    tables.found.clear()
    assert tiles_of(kernel.make_runner, 8, 9) == [1, 2]
    assert tables.asked == [4]
    p.plans.clear()
    assert tiles_of(kernel.make_runner, 9, 40, 41) == [1, 1, 2]
    p.plans.clear()
    for nt in (1, 2):
        assert tiles_of(partial(tiles_runner, nt), 1, 60) == [nt, nt]
    assert p.plans == {}, "decided nothing"


def test_a_call_too_large_for_one_goes_in_parts(launched, tables):
    tables.found.append(measured(LayerShape(8, 160, 96), 8, 100, 600))
    p, kernel = layer(8, 160, 96), SmallBatchKernel()
    x, ids, weights, out = call_of(1100, 8)
    workspace = torch.empty(kernel.workspace_bytes(p, 1100, 8), dtype=torch.uint8)
    kernel.make_runner(p, *ids.shape)(Call(x, ids, weights, out, workspace), p)
    seen = launched[threading.get_ident()]
    assert [(nt, arguments.pairs) for nt, _, arguments in seen[::3]] == [
        (1, MAX_PAIRS),
        (1, MAX_PAIRS),
        (1, 8 * (1100 - 2 * MAX_PAIRS // 8)),
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
        assert {(arguments.ids, arguments.topw) for _, _, arguments in seen[1::3]} == {
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
