"""What of wide8 needs no GPU: how layers are cut, that every cut compiles and keeps wgmma's
operands apart, where it runs, and preparing through the public functions.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given

from hopper_mxfp4 import DEEPSEEK_V4, LayerShape, SwiGLU, env, prepare_experts
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.tiles.e5m2 import TILES_E5M2
from hopper_mxfp4.kernels.wide import launch
from hopper_mxfp4.kernels.wide.tiling import SHARED_BYTES
from hopper_mxfp4.kernels.wide8.kernel import Wide8Kernel
from hopper_mxfp4.kernels.wide8.tiling import GROUP_BLOCKS, Tiling8, cut_layer
from random_layers import random_weights
from sass import disassemble, overwritten_operands
from test_wide import SHAPES, layers, needs_disassembler, needs_nvrtc, on_cpu

__all__ = ["on_cpu"]  # a fixture


@given(layers)
def test_blocks_fit_the_gpu(shape):
    for tiling in cut_layer(shape):
        assert tiling.shared_bytes <= SHARED_BYTES
        assert replace(tiling, stages=tiling.stages + 1).shared_bytes > SHARED_BYTES
        assert tiling.stages >= 4
        assert tiling.block_n in tiling.widths
        assert not tiling.panel % GROUP_BLOCKS
        assert not GROUP_BLOCKS % tiling.blocks
        # setmaxnreg gives out what the block was launched with, else it waits for ever.
        launched = (1 << 16) // tiling.threads // 8 * 8 * tiling.threads
        needed = tiling.consumers * tiling.consumer_registers + tiling.producer_registers
        assert 128 * needed <= launched


def test_sizes_of_rows():
    """As tokens.cuh has them: e4m3 in groups of 128 with a scale each; fc2's bf16 takes the place
    of fc1's.
    """
    tiling = Tiling8(LayerShape(8, 2880, 736))
    assert (tiling.hidden_padded, tiling.intermediate_padded) == (2944, 768)
    assert tiling.h_bytes == 768 + 4 * 6
    assert tiling.stage_bytes == round_up(132 * tiling.block_n, 1024) + tiling.panel * 4352


def test_the_workspace_is_enough_for_fewer_tokens_and_either_cut():
    kernel, p = Wide8Kernel(), SimpleNamespace(shape=LayerShape(32, 2880, 2880), ep_size=1)
    sizes = [kernel.workspace_bytes(p, tokens, 4) for tokens in (1, 16, 300, 600, 2048, 1 << 20)]
    assert sizes == sorted(sizes)
    for tiling in cut_layer(p.shape):
        assert launch.workspace_parts(tiling, 300, 4).end <= sizes[3]
    with pytest.raises(ValueError, match="65 columns; the wide8 kernel takes at most 64"):
        kernel.workspace_bytes(p, 1, 65)


@pytest.mark.usefixtures("on_cpu")
def test_prepared_weights():
    w = random_weights(DEEPSEEK_V4, 3, 160, 96)
    p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="wide8", activations="fp8")
    assert (p.kernel.name, p.layout, p.activations) == ("wide8", TILES_E5M2, "fp8")


# ---- Compiled -----------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_it_compiles(sizes, tmp_path, monkeypatch):
    """With two widths in place of all."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    tiling = cut_layer(LayerShape(*sizes))[0]
    few = replace(tiling, block_n=32, step_from=32, stages=4)
    route, gemms = launch.compile_cubins(few)
    for name in launch._FUNCTIONS:
        assert (name.encode() in route) != (name.encode() in gemms), name


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize("cut", [0, 1], ids=["few", "many"])
@pytest.mark.parametrize("sizes", [(32, 2880, 2880), (256, 4096, 2048)], ids=str)
def test_operands_of_wgmma_are_kept_until_it_has_read_them(sizes, cut, tmp_path, monkeypatch):
    """And no main loop spills or waits for each wgmma, as ptxas makes it where it loses track."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    tiling = cut_layer(LayerShape(*sizes))[cut]
    cubin = tmp_path / "gemms.cubin"
    cubin.write_bytes(nvrtc.compile_cubin(launch.gemm_source(tiling), tiling.macros()))
    lines = disassemble(cubin)
    assert overwritten_operands(lines) == []
    text = "\n".join(lines)
    found = re.findall(r"QGMMA\.64x(\d+)x32\.F32\.E5M2\.E4M3", text)
    units = max(tiling.blocks, 2)  # of a turn of the main loop, four wgmmas each
    assert {int(n) for n in found} == set(tiling.widths)
    assert len(found) == 4 * units * len(tiling.widths)
    loops = text[text.index("QGMMA") : text.rindex("QGMMA")]
    assert not re.search(r"\b(STL|LDL)\b", loops), "a main loop spills"
    assert len(re.findall(r"\b(STL|LDL)\b", text)) <= 8  # once a tile: its place in rings
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
    assert len(waits) == units * len(tiling.widths), "it waits for each wgmma at once"
