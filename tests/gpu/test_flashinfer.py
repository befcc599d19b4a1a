"""The flashinfer kernel on a Hopper GPU: bytes, bits, numbers, memory and CUDA graphs."""

import math
from bisect import bisect_left

import pytest
import torch

from hopper_mxfp4 import (
    ExpertWeights,
    LayerShape,
    SwiGLU,
    allocate_weights,
    env,
    fused_moe,
    prepare_experts,
    reference_moe,
    restore_weights,
    workspace_bytes,
)
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer.layout import unpack_sm90_scale_folded, unpack_sm90_weight
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from layers import (
    CUDA,
    FAMILY,
    SWIGLU,
    by_hand,
    direct_call,
    random_call,
    random_layer,
    relative_l2,
    spread_over_ranks,
)

BYTES = [
    ("gpt_oss", 32, 2880, 2880),
    ("gpt_oss", 4, 192, 192),
    ("gpt_oss", 8, 2880, 736),
    ("deepseek_v4", 16, 4096, 2048),
    ("deepseek_v4", 3, 192, 160),
]
CALLS = [
    # family, experts, hidden, intermediate, top_k, tokens, swiglu
    ("gpt_oss", 32, 2880, 2880, 4, 1, SwiGLU(1.702, 1.0, 7.0)),
    ("gpt_oss", 32, 2880, 2880, 4, 64, SwiGLU(1.702, 1.0, 7.0)),
    ("gpt_oss", 8, 192, 192, 2, 16, SwiGLU(1.702, 1.0, 7.0)),
    ("gpt_oss", 32, 2880, 384, 4, 7, SwiGLU(1.702, 1.0, 7.0)),
    ("deepseek_v4", 32, 4096, 2048, 6, 16, SwiGLU(1.0, 0.0, 10.0)),
    ("deepseek_v4", 8, 192, 192, 2, 5, SwiGLU(1.0, 0.0, None)),
    ("deepseek_v4", 8, 7168, 2048, 6, 33, SwiGLU(1.0, 0.0, 10.0)),
]


def name(case):
    return "-".join(str(part) for part in case if not isinstance(part, SwiGLU))


def same_bytes(a, b):
    return a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("case", BYTES, ids=name)
def test_prepared_bytes_are_the_hand_written_sequence(case):
    w = random_layer(*case)
    made = by_hand(w, case[0])
    p = prepare_experts(w, family=FAMILY[case[0]], swiglu=SWIGLU[case[0]])
    assert p.kernel.name == "flashinfer"
    for field, wanted in made.items():
        assert same_bytes(getattr(p, field), wanted), field
    restored = restore_weights(p)
    for field, wanted in (
        random_layer(*case).tensors().items()
    ):  # w itself may have been prepared in place
        assert same_bytes(getattr(restored, field), wanted), f"restored {field}"


@pytest.mark.parametrize("case", CALLS, ids=name)
def test_fused_moe_is_bit_equal_to_a_direct_call(case, monkeypatch):
    family, e, h, i, top_k, m, swiglu = case
    monkeypatch.setenv(env.DETERMINISTIC.name, "1")
    w = random_layer(family, e, h, i)
    x, ids, weights = random_call(m, h, e, top_k)
    before = x.clone()
    made = by_hand(w, family)
    p = prepare_experts(w, family=FAMILY[family], swiglu=swiglu)
    y = fused_moe(x, ids, weights, p)
    plan = p.plans[p.kernel.name, top_k]  # other tactics may round elsewhere
    wanted = direct_call(
        x,
        ids,
        weights,
        made,
        swiglu,
        plan.pairs[bisect_left(plan.edges, m)] if plan.pairs else None,
    )
    assert wanted.abs().max() > 0
    assert same_bytes(y, wanted)
    assert same_bytes(x, before)
    # The default mode may sum in another order; test_tactics.py says what it does today.
    monkeypatch.setenv(env.DETERMINISTIC.name, "0")
    w = random_layer(family, e, h, i)
    fused = fused_moe(x, ids, weights, prepare_experts(w, family=FAMILY[family], swiglu=swiglu))
    assert relative_l2(fused, wanted.float()) < 5e-3


@pytest.mark.parametrize("m", [1, 3, 16, 256])
@pytest.mark.parametrize(
    "case", [("gpt_oss", 32, 2880, 2880, 4), ("deepseek_v4", 64, 4096, 2048, 6)], ids=name
)
def test_error_against_the_float32_reference(case, m, record_property):
    family, e, h, i, top_k = case
    w = random_layer(family, e, h, i, seed=m)
    x, ids, weights = random_call(m, h, e, top_k, seed=m)
    reference = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
    y = fused_moe(x, ids, weights, prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family]))
    error = relative_l2(y, reference)
    record_property("relative_l2", error)
    assert error < 5e-3


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
@pytest.mark.parametrize("intermediate", [736, 672, 384, 192])
def test_tensor_parallel_shards(family, intermediate, record_property):
    w = random_layer(family, 8, 2880, intermediate)
    x, ids, weights = random_call(9, 2880, 8, 4)
    reference = reference_moe(x, ids, weights, w, family=FAMILY[family], swiglu=SWIGLU[family])
    error = relative_l2(
        fused_moe(
            x, ids, weights, prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family])
        ),
        reference,
    )
    record_property("relative_l2", error)
    assert error < 5e-3


@pytest.mark.parametrize("hidden", [2880, 4096], ids=["padded", "unpadded"])
@pytest.mark.parametrize("deterministic", ["0", "1"])
def test_holes_and_their_garbage_weights(hidden, deterministic, monkeypatch):
    """Padding rows of a CUDA graph: ids of -1 or past the end, weights that may be anything."""
    monkeypatch.setenv(env.DETERMINISTIC.name, deterministic)
    w = random_layer("gpt_oss", 8, hidden, 256)
    x, ids, weights = random_call(24, hidden, 8, 4)
    ids[3] = -1
    ids[5, 1:] = -1
    ids[7] = 8
    ids[9, 0] = 2**31 - 1
    ids[11] = -(2**31)
    ids[16:] = -1
    masked = (ids < 0) | (ids >= 8)
    reference = reference_moe(
        x, ids, weights, w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"]
    )
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    weights[masked] = math.nan
    x[16:] = math.nan
    out = torch.full_like(x, math.nan)
    y = fused_moe(x, ids, weights, p, out=out)
    assert y is out
    assert torch.isfinite(y).all()
    assert not y[masked.all(1)].any()
    assert relative_l2(y, reference.nan_to_num(0.0)) < 5e-3


@pytest.mark.parametrize("m", [1, 17])
def test_no_expert_at_all(m):
    """What frameworks capture their graphs with: every row is padding."""
    p = prepare_experts(
        random_layer("gpt_oss", 8, 2880, 256), family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"]
    )
    x, ids, weights = random_call(m, 2880, 8, 4)
    y = fused_moe(x, torch.full_like(ids, -1), weights, p, out=torch.full_like(x, 5.0))
    assert not y.any()


def test_arguments_of_every_kind():
    """int64 ids, strided arguments, no token, and a workspace of the caller's give the same
    bits.
    """
    e, m, top_k = 8, 12, 4
    for hidden in (2880, 4096):
        w = random_layer("gpt_oss", e, hidden, 256)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(env.DETERMINISTIC.name, "1")
            p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
        x, ids, weights = random_call(m, hidden, e, top_k)
        wanted = fused_moe(x, ids, weights, p)
        wide = torch.full((m, hidden + 8), math.nan, dtype=torch.bfloat16, device=x.device)
        wide[:, :hidden] = x
        assert same_bytes(fused_moe(x, ids.long(), weights, p), wanted)
        assert same_bytes(
            fused_moe(wide[:, :hidden], ids.t().contiguous().t(), weights.t().contiguous().t(), p),
            wanted,
        )
        workspace = torch.full(
            (workspace_bytes(p, m, top_k),), 255, dtype=torch.uint8, device=x.device
        )
        assert same_bytes(fused_moe(x, ids, weights, p, workspace=workspace), wanted)
        assert fused_moe(x[:0], ids[:0], weights[:0], p).shape == (0, hidden)
        with pytest.raises(ValueError, match="give one aligned to 256 bytes"):
            fused_moe(
                x,
                ids,
                weights,
                p,
                workspace=torch.empty(workspace.numel() + 64, dtype=torch.uint8, device=x.device)[
                    64:
                ],
            )
        with pytest.raises(ValueError, match=f"at least {workspace.numel()} bytes"):
            fused_moe(x, ids, weights, p, workspace=workspace[:-1])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_cuda_graph_replays_with_new_inputs(family):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.DETERMINISTIC.name, "1")
        p = prepare_experts(
            random_layer(family, 16, 2880, 512), family=FAMILY[family], swiglu=SWIGLU[family]
        )
    x, ids, weights = random_call(8, 2880, 16, 4)
    ids.fill_(-1)  # captured as the frameworks do, with padding alone
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
    fused_moe(x, ids, weights, p, out=out)
    with torch.cuda.graph(graph):
        fused_moe(x, ids, weights, p, out=out)
    for seed in range(3):
        new = random_call(8, 2880, 16, 4, seed=seed)
        for old, fresh in zip((x, ids, weights), new, strict=True):
            old.copy_(fresh)
        out.fill_(math.nan)
        graph.replay()
        assert same_bytes(out, fused_moe(*new, p))


def test_no_host_synchronisation():
    p = prepare_experts(
        random_layer("gpt_oss", 8, 2880, 256),
        family=FAMILY["gpt_oss"],
        swiglu=SWIGLU["gpt_oss"],
        deterministic=True,
    )
    x, ids, weights = random_call(8, 2880, 8, 4)
    spread, expert_map = spread_over_ranks(ids, 8, torch.Generator().manual_seed(0))
    wanted = fused_moe(x, ids, weights, p)
    fused_moe(x, spread, weights, p, expert_map=expert_map)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_moe(x, ids, weights, p)
        y = fused_moe(x, spread, weights, p, expert_map=expert_map)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4"])
def test_memory_in_place(family, record_property):
    """The input, an eighth of its weights and 64 MiB: what preparing allocated weights may
    reach.
    """
    shape = LayerShape(32, 2880, 2880) if family == "gpt_oss" else LayerShape(64, 4096, 2048)
    w = allocate_weights(shape, family=FAMILY[family], device=CUDA)
    source = random_layer(family, shape.num_experts, shape.hidden_size, shape.intermediate_size)
    i, half = shape.intermediate_size, w.w13.shape[1] // 2
    for field, t in source.tensors().items():
        target = getattr(w, field)
        if field.startswith("w13") and family == "deepseek_v4":
            target[:, :i].copy_(t[:, :i])
            target[:, half : half + i].copy_(t[:, i:])
        else:
            target[tuple(slice(n) for n in t.shape)].copy_(t)
    wanted = by_hand(source, family)
    addresses = {field: t.data_ptr() for field, t in w.tensors().items()}
    layer_bytes = w.w13.nbytes + w.w2.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p = prepare_experts(w, family=FAMILY[family], swiglu=SWIGLU[family])
    extra = torch.cuda.max_memory_allocated() - before
    record_property("layer_mib", layer_bytes / 2**20)
    record_property("extra_mib", extra / 2**20)
    assert extra <= layer_bytes / 8 + (64 << 20)
    for field, address in addresses.items():
        assert getattr(p, field).data_ptr() == address
        assert same_bytes(getattr(p, field), wanted[field]), field


def test_memory_out_of_place(record_property):
    w = random_layer("gpt_oss", 32, 2880, 2880)
    copies = {field: t.clone() for field, t in w.tensors().items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p = prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    extra = torch.cuda.max_memory_allocated() - before
    output = sum(getattr(p, field).nbytes for field in copies)
    record_property("output_mib", output / 2**20)
    record_property("extra_mib", extra / 2**20)
    assert extra <= output + (w.w13.nbytes + w.w2.nbytes) / 8 + (64 << 20)
    for field, copy in copies.items():
        assert same_bytes(getattr(w, field), copy), f"{field} was changed"


def test_layouts_of_the_installed_flashinfer(record_property):
    """The probes say which layout it is; unpacking index patterns proves the whole map, not a
    sample of it.
    """
    from flashinfer.fused_moe import (
        interleave_moe_scales_for_sm90_mixed_gemm,
        interleave_moe_weights_for_sm90_mixed_gemm,
    )

    record_property("flashinfer", str(compat.flashinfer_version()))
    assert compat.scale_layout(interleave_moe_scales_for_sm90_mixed_gemm) == "folded"
    rows, half_k = 128, 256
    positions = torch.arange(2 * rows * half_k, device=CUDA).view(2, rows, half_k)
    for shift in (0, 8, 16):  # together the bytes of every position's number
        w = (positions >> shift).to(torch.uint8)
        assert same_bytes(
            unpack_sm90_weight(interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4")), w
        )
        s = w[:, :, : half_k // 16].contiguous()
        assert same_bytes(
            unpack_sm90_scale_folded(interleave_moe_scales_for_sm90_mixed_gemm(s, group_size=32)), s
        )


def test_refusals_before_anything_is_changed():
    w = random_layer("gpt_oss", 4, 192, 192)
    copies = {field: t.clone() for field, t in w.tensors().items()}
    w.w2_scale[2, 5, 1] = 255
    with pytest.raises(ValueError, match=r"w2_scale\[2, 5, 1\] is 255"):
        prepare_experts(w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    w.w2_scale[2, 5, 1] = copies["w2_scale"][2, 5, 1]
    mixed = ExpertWeights(**(w.tensors() | {"w2": w.w2.cpu()}))
    with pytest.raises(ValueError, match="w2 is on cpu but w13 on cuda:0"):
        prepare_experts(mixed, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"])
    for field, copy in copies.items():
        assert same_bytes(getattr(w, field), copy)


def test_reference_kernel_on_prepared_weights_of_either_layout():
    """The reference runs on a GPU too, and agrees with itself whatever the layout it reads."""
    w = random_layer("gpt_oss", 4, 192, 160)
    call = random_call(5, 192, 4, 2)
    sm90 = prepare_experts(
        w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"]
    )  # padded, so w stays as it is
    plain = prepare_experts(
        w, family=FAMILY["gpt_oss"], swiglu=SWIGLU["gpt_oss"], kernel="reference"
    )
    out = torch.empty_like(call[0])
    ReferenceKernel().make_runner(sm90, 5, 2)(Call(*call, out, call[0]), sm90)
    assert relative_l2(out, fused_moe(*call, plain).float()) < 1e-3
