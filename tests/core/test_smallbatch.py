"""What of the smallbatch and hybrid kernels needs no GPU: how layers are cut, and that every cut compiles."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hopper_mxfp4 import LayerShape, SwiGLU, env
from hopper_mxfp4.bench.bodies import BODIES
from hopper_mxfp4.cli import main
from hopper_mxfp4.kernels import nvrtc, smallbatch
from hopper_mxfp4.kernels.hybrid import HybridKernel, small_tokens
from hopper_mxfp4.kernels.smallbatch import (
    MOST_PAIRS,
    RESERVED_BYTES,
    SHARED_BYTES,
    SM_SHARED_BYTES,
    STATIC_SHARED_BYTES,
    Compiled,
    SmallBatchKernel,
    cuts,
    fits,
    tiles,
)

sizes = st.integers(1, 240).map(lambda n: 32 * n)
needs_nvrtc = pytest.mark.skipif(nvrtc.problem() is not None, reason=str(nvrtc.problem()))


@given(experts=st.integers(1, 512), hidden=sizes, intermediate=sizes)
def test_a_cut_covers_the_layer_and_fits_the_gpu(experts, hidden, intermediate):
    shape = LayerShape(experts, hidden, intermediate)
    for nt in (1, 2):
        for gemm, k in zip(cuts(shape, nt), (hidden, intermediate), strict=True):
            chunks = -(-k // 128)
            assert gemm.warps * gemm.chunks_a_warp >= chunks
            assert gemm.warps * (gemm.chunks_a_warp - 1) < chunks, "some warp would have nothing to do"
            assert 1 <= gemm.warps <= 16
            assert gemm.blocks * gemm.threads <= 20 * 32, "no 96 registers a thread"
            if nt in tiles(shape):
                block = gemm.shared_bytes(MOST_PAIRS) + STATIC_SHARED_BYTES
                assert block <= SHARED_BYTES
                assert gemm.blocks * (block + RESERVED_BYTES) <= SM_SHARED_BYTES
    assert fits(cuts(shape, 1)) == (1 in tiles(shape))


def test_tiles_of_the_bodies():
    for body in BODIES.values():
        wanted = (1, 2) if body.hidden == 2880 else (1,)  # 4096 takes 16 warps, and tiles of 16 tokens 4 more
        assert tiles(body.shape) == wanted, body.name


def test_a_layer_of_many_small_experts_has_room_for_its_lists():
    assert tiles(LayerShape(600, 160, 96))


def test_a_layer_too_wide_is_declined(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    wide = LayerShape(8, 1 << 14, 2880)
    assert tiles(wide) == ()
    assert "too large for its shared memory" in SmallBatchKernel().beside_flashinfer(wide, torch.device("cuda"))


def test_without_nvrtc_both_decline_with_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: "NVRTC can't be used (ImportError: none); install it")
    monkeypatch.setattr("hopper_mxfp4.kernels.flashinfer.FlashInferKernel.why_not", lambda *args: None)
    for kernel in (SmallBatchKernel(), HybridKernel()):
        assert "install" in kernel.why_not(LayerShape(32, 2880, 2880), torch.device("cuda"))


@needs_nvrtc
@pytest.mark.parametrize("nt", [1, 2])
@pytest.mark.parametrize("body", ["gpt-oss-20b", "gpt-oss-120b-tp8", "dsv4-flash", "dsv4-flash-tp8"])
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
    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcCompileProgram", lambda *args: pytest.fail("it compiled again"))
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
    assert len(kept) == 8  # two layers, two GEMMs, tiles of 8 and of 16
    assert CliRunner().invoke(main, ["warmup", "--bodies", "8,160,96,2"]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == kept


@pytest.mark.parametrize(
    ("shape", "top_k", "tokens"),
    [((32, 2880, 2880), 4, 64), ((128, 2880, 736), 4, 256), ((256, 4096, 2048), 6, 213), ((8, 2880, 2880), 65, 0), ((3, 160, 96), 8, 3)],
)
def test_where_hybrid_changes_over(shape, top_k, tokens):
    p = SimpleNamespace(shape=LayerShape(*shape), batch_invariant=False, ep_size=1)
    assert small_tokens(p, top_k) == tokens
    p.ep_size = 8  # most pairs are holes
    assert 8 * tokens <= small_tokens(p, top_k) < 8 * (tokens + 1)
    p.batch_invariant = True
    assert small_tokens(p, top_k) == 0


def test_hybrid_asks_for_what_the_kernel_it_takes_needs():
    hybrid = HybridKernel()
    p = SimpleNamespace(shape=LayerShape(32, 2880, 2880), batch_invariant=False, ep_size=1)
    hybrid._large = SimpleNamespace(
        name="large", workspace_bytes=lambda p, tokens, top_k: 7 * tokens, run=lambda *args: ran.append("large")
    )
    small = SmallBatchKernel()
    assert hybrid.workspace_bytes(p, 64, 4) == small.workspace_bytes(p, 64, 4)
    assert hybrid.workspace_bytes(p, 65, 4) == small.workspace_bytes(p, 64, 4), "calls of fewer tokens get the same buffer"
    assert hybrid.workspace_bytes(p, 1 << 20, 4) == 7 << 20
    hybrid._small = SimpleNamespace(run=lambda *args: ran.append("small"))
    ran = []
    for tokens in (1, 64, 65, 4096):
        hybrid.run(torch.empty(tokens, 1), torch.empty(tokens, 4), None, p, None, None)
    assert ran == ["small", "small", "large", "large"]


@pytest.mark.parametrize("aligned", [True, False])
def test_what_a_call_is_given(aligned, monkeypatch):
    """x copied only where the kernel can't read it; the parts of the workspace apart from each other and inside of it."""
    shape, tokens, top_k = LayerShape(8, 160, 96), 5, 3
    tensors = {name: torch.zeros(8, dtype=torch.uint8) for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")}
    p = SimpleNamespace(shape=shape, ep_size=1, swiglu=SwiGLU(1.5, 0.5, None), **tensors)
    given = []
    monkeypatch.setattr(smallbatch, "compiled", lambda *key: Compiled(cuts(shape, 1), ("fc1", "fc2", "sum"), 132, {}))
    monkeypatch.setattr(smallbatch, "raw_stream", lambda index: 0)
    monkeypatch.setattr(nvrtc, "launch_config", lambda *args, **kwargs: args)

    def launch(config, function, parameters):
        kind = smallbatch._SumArgs if function == "sum" else smallbatch._Args
        given.append(kind.from_buffer_copy(kind.from_address(ctypes.c_void_p.from_address(parameters).value)))

    monkeypatch.setattr(nvrtc, "launch", launch)
    wide = torch.randn(tokens, 168).bfloat16()
    x = wide[:, :160] if aligned else wide[:, 1:161]
    ids, weights, out = torch.zeros(tokens, top_k, dtype=torch.int64), torch.rand(tokens, top_k), torch.empty(tokens, 160).bfloat16()
    kernel = SmallBatchKernel()
    workspace = torch.empty(kernel.workspace_bytes(p, tokens, top_k), dtype=torch.uint8)
    kernel.run(x, ids, weights, p, out, workspace)
    fc1, fc2, total = given
    begin, end, pairs = workspace.data_ptr(), workspace.data_ptr() + workspace.numel(), tokens * top_k
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
    assert (fc2.x_stride, fc2.pairs, fc2.ids64, fc2.ids_s0, fc2.topw_s1) == (96, pairs, 1, top_k, 1)
    assert (fc1.alpha, fc1.beta, fc1.limit) == (1.5, 0.5, float("inf"))
    assert total.out == out.data_ptr()
