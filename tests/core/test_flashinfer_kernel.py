"""The `flashinfer` kernel's own work (layout, padding, scratch, arguments) with a stand-in for
FlashInfer that runs on a CPU.

The stand-in computes from the very tensors that FlashInfer would get; the GPU tests do the same
with FlashInfer itself.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version

from hopper_mxfp4 import (
    GPT_OSS,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    fused_moe,
    prepare_experts,
    reference_moe,
    workspace_bytes,
)
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer import kernel as flashinfer
from hopper_mxfp4.kernels.flashinfer.layout import unpack_sm90_weight
from random_layers import FAMILIES, FAMILY_IDS, dequantize, random_weights
from sm90 import PACK_SCALE, UNPACK_SCALE, Plugin, expected, pack_weight

CPU = torch.device("cpu")
SCRATCH = 1000  # bytes that the stand-in asks for


class StandIn(SimpleNamespace):
    """flashinfer.fused_moe as this package uses it; ``calls`` keeps the arguments of each call."""

    def __init__(self, scales: str = "folded", pack=pack_weight) -> None:
        super().__init__(scales=scales, pack=pack, calls=[], sizes=[])

    def interleave_moe_weights_for_sm90_mixed_gemm(
        self, weight: torch.Tensor, quant_type: str
    ) -> torch.Tensor:
        assert quant_type == "fp4"
        return torch.from_numpy(self.pack(weight.numpy()))

    def interleave_moe_scales_for_sm90_mixed_gemm(
        self, scales: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        assert group_size == 32
        return torch.from_numpy(PACK_SCALE[self.scales](scales.numpy()))

    def cutlass_fused_moe_workspace_size(self, *args, **kwargs) -> int:
        self.sizes.append((args, kwargs))
        return SCRATCH

    def cutlass_fused_moe(self, **call) -> None:
        self.calls.append(call)
        call["workspace_buffer"].fill_(255)  # whatever else lies there is gone
        assert call["workspace_buffer"].numel() >= SCRATCH
        x, ids, weights, output = (
            call[name]
            for name in ("input", "token_selected_experts", "token_final_scales", "output")
        )
        assert all(t.is_contiguous() for t in (x, ids, weights, output))
        assert (x.dtype, ids.dtype, weights.dtype, output.dtype) == (
            torch.bfloat16,
            torch.int32,
            torch.float32,
            torch.bfloat16,
        )
        assert x.shape == output.shape
        for row in ids.tolist():  # FlashInfer is wrong where a row names an expert twice
            named = [e for e in row if e != -1]
            assert len(set(named)) == len(named)
        assert (
            output.data_ptr() >= x.data_ptr() + x.nbytes
            or x.data_ptr() >= output.data_ptr() + output.nbytes
        )
        w13, w2 = (
            dequantize(unpack_sm90_weight(call[name]), UNPACK_SCALE[self.scales](scale))
            for name, scale in zip(
                ("fc1_expert_weights", "fc2_expert_weights"), call["quant_scales"], strict=True
            )
        )
        result = torch.zeros(x.shape)
        for m in range(len(x)):
            for e, weight in zip(ids[m].tolist(), weights[m].tolist(), strict=True):
                if e == -1:
                    continue
                both = w13[e] @ x[m].float()
                if call["fc1_expert_biases"] is not None:
                    both += call["fc1_expert_biases"][e].float()
                up, gate = both.chunk(2)
                alpha, beta = call["swiglu_alpha"][e].item(), call["swiglu_beta"][e].item()
                limit = None if call["swiglu_limit"] is None else call["swiglu_limit"][e].item()
                down = w2[e] @ SwiGLU(alpha, beta, limit)(gate, up)
                if call["fc2_expert_biases"] is not None:
                    down += call["fc2_expert_biases"][e].float()
                result[m] += weight * down
        output.copy_(result)


class OnCpu(flashinfer.FlashInferKernel):
    name = "flashinfer-cpu"
    auto_devices = frozenset()

    def unsupported_reason(self, shape, device, deterministic=False) -> None:
        return None

    def layout(self, device):
        return flashinfer._layout.__wrapped__(device)


@pytest.fixture(params=list(PACK_SCALE))
def stand_in(request, monkeypatch, registered):
    """FlashInfer's stand-in, and the kernel allowed on a CPU."""
    moe = StandIn(request.param)
    monkeypatch.setattr(compat, "flashinfer_moe", lambda: moe)
    monkeypatch.setattr(compat, "compiled_module", lambda: Path("fused_moe_90.so"))

    flashinfer._flashinfer_bytes.cache_clear()
    with registered(Plugin(OnCpu())):
        yield moe
    flashinfer._flashinfer_bytes.cache_clear()


def test_flashinfers_helpers_run_on_the_tensors_gpu(stand_in, monkeypatch) -> None:
    """Whoever calls them: choosing a kernel already does, to see whether it knows their layout."""
    current, seen = [None], []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(flashinfer, "device_guard", on)
    pack = stand_in.pack
    stand_in.pack = lambda w: (seen.append(current[-1]), pack(w))[1]
    layout = OnCpu().layout(CPU)
    layout.pack_weight(torch.zeros(1, 64, 64, dtype=torch.uint8))
    assert seen == [CPU] * 2


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_prepared_bytes(family, stand_in) -> None:
    """Through FlashInfer's own helpers, under a name that tells the two scale layouts apart."""
    w = random_weights(family, 2, 160, 96)
    wanted = expected(w, family, stand_in.scales)
    p = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel="flashinfer-cpu")
    assert p.layout.name == f"flashinfer-sm90-{stand_in.scales}"
    for name, tensor in wanted.items():
        assert torch.equal(getattr(p, name), tensor), name


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("hidden", [160, 256], ids=["padded", "unpadded"])
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_running(family, hidden, strided, stand_in) -> None:
    """Padding in and out, strides, int64 ids, masked ids and duplicates; the scratch keeps no one's
    input in the way.
    """
    swiglu = SwiGLU(1.702, 1.0, 7.0) if family.bias else SwiGLU()
    w = random_weights(family, 3, hidden, 96)
    kept = reference_input(hidden)
    wanted = reference_moe(*kept, w, family=family, swiglu=swiglu)
    p = prepare_experts(w, family=family, swiglu=swiglu, kernel="flashinfer-cpu")
    x, ids, weights = kept
    if strided:
        x, ids, weights = (
            torch.cat((x, x), 1)[:, :hidden],
            ids.t().contiguous().t(),
            weights.repeat_interleave(2, 1)[:, ::2],
        )
    before = x.clone()
    size = workspace_bytes(p, 7, 4)
    workspace = torch.empty(size, dtype=torch.uint8)
    out = torch.full((7, hidden), float("nan"), dtype=torch.bfloat16)
    assert fused_moe(x, ids, weights, p, out=out, workspace=workspace) is out
    assert torch.equal(x, before)
    assert not out[3].any(), "the row of masked ids"
    assert (out.float() - wanted).norm() / wanted.norm() < 5e-3
    (call,) = stand_in.calls
    scratch = call["workspace_buffer"]
    assert (scratch.data_ptr() - workspace.data_ptr()) % 128 == 0, (
        "FlashInfer wants its scratch aligned"
    )
    assert workspace.data_ptr() <= scratch.data_ptr()
    assert scratch.data_ptr() + scratch.numel() == workspace.data_ptr() + size
    assert call["input"].shape[1] == -(-hidden // 128) * 128
    if hidden % 128:
        assert not call["input"][:, hidden:].any(), "zeros there, not what the scratch held"
    elif not strided:
        assert call["input"].data_ptr() == x.data_ptr(), "copied for nothing"
        assert call["output"] is out
    args, kwargs = stand_in.sizes[-1]
    assert args == (7, -(-hidden // 128) * 128, 128, 3, 4)
    assert kwargs["use_fused_finalize"] is call["use_fused_finalize"] is True


def reference_input(hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(
        [
            [0, 1, 2, 0],
            [2, 2, 2, 2],
            [-1, 1, 3, 0],
            [-1, 3, 2**32 + 1, -(2**40)],
            [1, 0, 1, 0],
            [0, 0, 0, 2],
            [2, 1, 0, 1],
        ]
    )
    return (
        torch.randn(7, hidden, generator=generator).bfloat16(),
        ids,
        torch.rand(7, 4, generator=generator),
    )


def test_deterministic_runs(stand_in, monkeypatch) -> None:
    """The variable is read at preparation and reaches both the call and the size of its scratch."""
    monkeypatch.setenv("HOPPER_MXFP4_DETERMINISTIC", "1")
    p = prepare_experts(
        random_weights(GPT_OSS, 3, 128, 128),
        family=GPT_OSS,
        swiglu=SwiGLU(),
        kernel="flashinfer-cpu",
    )
    monkeypatch.delenv("HOPPER_MXFP4_DETERMINISTIC")
    fused_moe(*reference_input(128), p)
    assert stand_in.calls[0]["use_fused_finalize"] is False
    assert stand_in.sizes[0][1]["use_fused_finalize"] is False


class OldStandIn(StandIn):
    """As before 0.6.15: fewer arguments, and no say about scratch memory."""

    def cutlass_fused_moe(
        self, input, token_selected_experts, token_final_scales, fc1_expert_weights,
        fc2_expert_weights, output_dtype, quant_scales,
        fc1_expert_biases=None, fc2_expert_biases=None, swiglu_alpha=None, swiglu_beta=None,
        swiglu_limit=None, tp_size=1, tp_rank=0,
        ep_size=1, ep_rank=0, output=None, use_w4_group_scaling=False,
    ):  # fmt: skip
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().cutlass_fused_moe(**given, workspace_buffer=torch.empty(SCRATCH, dtype=torch.uint8))

    def cutlass_fused_moe_workspace_size(self, *args, **kwargs):
        pytest.fail("it has no such function")


@pytest.mark.parametrize("stand_in", ["by_k"], indirect=True)
def test_a_release_that_lacks_arguments(stand_in, monkeypatch, caplog) -> None:
    """An unsafe old release that the user allowed: right but for the race, said loudly, and no
    promise about order.
    """
    monkeypatch.setattr(compat, "flashinfer_moe", lambda: moe)
    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version("0.6.12"))
    monkeypatch.setenv("HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER", "1")
    moe = OldStandIn("by_k")
    assert compat.lacking() == compat.LATER
    w = random_weights(GPT_OSS, 3, 160, 96)
    call = reference_input(160)
    swiglu = SwiGLU(1.702, 1.0, 7.0)
    wanted = reference_moe(*call, w, family=GPT_OSS, swiglu=swiglu)
    p = prepare_experts(w, family=GPT_OSS, swiglu=swiglu, kernel="flashinfer-cpu")
    (warning,) = [r.getMessage() for r in caplog.records if "5438" in r.getMessage()]
    assert "0.6.12" in warning
    assert (
        "HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER is set; install flashinfer-python>=0.6.18" in warning
    )
    y = fused_moe(*call, p)
    assert len(moe.calls) == 1
    assert (y.float() - wanted).norm() / wanted.norm() < 5e-3
    reason = flashinfer._determinism_problem()
    assert (
        "0.6.12 takes no profile_ids, use_fused_finalize, workspace_buffer, which deterministic "
        "and batch-invariant" in reason
    )
    moe = StandIn("by_k")
    assert flashinfer._determinism_problem() is None


def test_weights_laid_out_another_way(stand_in) -> None:
    """A release whose weight helper changed must be refused before any weight is touched."""
    stand_in.pack = lambda w: np.ascontiguousarray(w[:, ::-1])
    w = random_weights(GPT_OSS, 2, 128, 128)
    before = w.w13.clone()
    with pytest.raises(
        KernelUnavailable, match="lays weights out in a way this release does not know; install"
    ):
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="flashinfer-cpu")
    assert torch.equal(w.w13, before)


def no_import():
    raise OSError("libcudart.so.13: cannot open shared object file")


UNKNOWN_SCALES = StandIn()
UNKNOWN_SCALES.interleave_moe_scales_for_sm90_mixed_gemm = lambda scales, group_size: scales


@pytest.mark.parametrize(
    ("moe", "parts"),
    [
        (no_import, ["importing FlashInfer failed", "OSError", "libcudart.so.13", compat.INSTALL]),
        (
            lambda: SimpleNamespace(cutlass_fused_moe=None),
            ["lacks interleave_moe_weights_for_sm90_mixed_gemm", compat.INSTALL],
        ),
        (
            lambda: UNKNOWN_SCALES,
            ["lays scales out in a way this release does not know", compat.INSTALL],
        ),
    ],
    ids=["broken", "without helpers", "other scales"],
)
def test_unusable_flashinfer(moe, parts, monkeypatch) -> None:
    monkeypatch.setattr(compat, "flashinfer_moe", moe)
    reason = flashinfer._import_problem.__wrapped__()
    for part in parts:
        assert part in reason


@pytest.mark.parametrize(
    ("capability", "part"),
    [((8, 0), "Test GPU has 8.0"), ((10, 0), "Test GPU has 10.0"), ((9, 0), "not installed")],
)
def test_other_gpus(capability, part, monkeypatch) -> None:
    """Only compute capability 9.0 is looked at further, and only then FlashInfer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    reason = flashinfer.FlashInferKernel().unsupported_reason(
        LayerShape(1, 128, 128), torch.device("cuda", 0)
    )
    assert part in reason
    assert capability == (9, 0) or "9.0 (Hopper)" in reason


@pytest.mark.parametrize(
    ("before", "after"), [(None, "INFO"), ("ERROR", "ERROR"), ("TRACE", "TRACE")]
)
def test_the_kernels_trace_is_off_unless_asked_for(before, after, monkeypatch) -> None:
    """Before FlashInfer is imported, and only where the user has not said what to log."""
    monkeypatch.setenv("TLLM_LOG_LEVEL", before or "")
    if before is None:
        monkeypatch.delenv("TLLM_LOG_LEVEL")
    seen = []

    def importing() -> None:
        seen.append(os.environ.get("TLLM_LOG_LEVEL"))
        raise ImportError("not here")

    monkeypatch.setattr(compat, "flashinfer_moe", importing)
    assert (
        "importing FlashInfer failed (ImportError: not here)"
        in flashinfer._import_problem.__wrapped__()
    )
    assert seen == [after]
