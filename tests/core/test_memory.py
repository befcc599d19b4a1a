"""How much memory preparing and computing take while they run, as the allocator itself counts
it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hopper_mxfp4 import (
    GPT_OSS,
    ExpertWeights,
    LayerShape,
    SwiGLU,
    allocate_weights,
    prepare_experts,
    reference_moe,
)
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.plugin import Layout
from random_layers import random_weights
from sm90 import Plugin

MIB = 1 << 20


def peak_allocation(function: Callable[[], Any]) -> tuple[Any, int, int]:
    """What the function returns, the most bytes of CPU tensors it held at a time, and those it
    still holds at its end.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak, now


def test_the_measure_itself() -> None:
    """Two copies of 32 MiB at a time and one in the end; a third one, later, adds nothing to the
    peak.
    """

    def copies() -> torch.Tensor:
        first = torch.zeros(32 * MIB, dtype=torch.uint8)
        second = first.clone()
        del first
        return second.clone()

    result, peak, held = peak_allocation(copies)
    assert result.nbytes == held
    assert 64 * MIB <= peak < 65 * MIB
    assert 32 * MIB <= held < 33 * MIB


class Copying:
    """A kernel whose packing makes a new tensor, as FlashInfer's helpers do, and costs nothing
    else.
    """

    name = "copying"
    auto_devices = frozenset()
    activations = frozenset({"bf16"})
    unsupported_reason = staticmethod(lambda *args: None)
    runner = ReferenceKernel().make_runner
    workspace_bytes = ReferenceKernel().workspace_bytes

    def warm_up(self, p):
        pass

    def layout(self, device: torch.device) -> Layout:
        return Layout("copying", 128, *[torch.clone] * 4)


@pytest.fixture(scope="module")
def _copying_kernel(registered):
    with registered(Plugin(Copying())):
        yield


# 64 experts of about 2000 x 2000: w13 252 MB and w2 126 MB, so that the bound (114 MB) is less than
# either, let alone a second copy.
EXPERTS, HIDDEN, INTERMEDIATE = 64, 2016, 1952


def allowed_beside(w: ExpertWeights) -> int:
    """An eighth of the weights' bytes and 64 MiB."""
    allowed = (w.w13.nbytes + w.w2.nbytes) // 8 + 64 * MIB
    assert allowed < w.w2.nbytes, "a whole second copy of one tensor would go unseen"
    return allowed


@pytest.mark.usefixtures("_copying_kernel")
def test_preparing_in_place_takes_little_memory() -> None:
    w = allocate_weights(
        LayerShape(EXPERTS, HIDDEN, INTERMEDIATE), family=GPT_OSS, device="cpu", kernel="copying"
    )
    prepared, peak, held = peak_allocation(
        lambda: prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="copying")
    )
    assert peak <= allowed_beside(w)
    assert held < MIB, "something stays allocated beside the weights"
    assert prepared.w13.data_ptr() == w.w13.data_ptr()


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.usefixtures("_copying_kernel")
def test_preparing_into_new_tensors_takes_little_more_than_these(scale_dtype) -> None:
    w = random_weights(GPT_OSS, EXPERTS, HIDDEN, INTERMEDIATE, scale_dtype=scale_dtype)
    prepared, peak, held = peak_allocation(
        lambda: prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="copying")
    )
    output = sum(getattr(prepared, name).nbytes for name in w.tensors())
    assert prepared.w13.data_ptr() != w.w13.data_ptr()
    assert output <= held < output + MIB
    assert peak <= output + allowed_beside(w)


def test_the_reference_dequantises_expert_by_expert() -> None:
    """GPT-OSS-20B's layer: under 4 GiB beyond the weights, and no more for four experts in use than
    for two.
    """
    w = random_weights(GPT_OSS, 32, 2880, 2880)
    x = torch.randn(64, 2880, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = torch.full((64, 2), 0.5)
    peaks = []
    for experts in ((3, 17), (3, 17, 30, 31)):
        ids = torch.tensor(experts).repeat(128 // len(experts)).view(64, 2)
        _, peak, _ = peak_allocation(
            lambda ids=ids: reference_moe(
                x, ids, weights, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0)
            )
        )
        peaks.append(peak)
    one_expert = 3 * 2880 * 2880 * 4
    assert one_expert < peaks[0] < 4 << 30
    assert peaks[1] < peaks[0] + one_expert // 4


def test_the_reference_takes_many_tokens_in_parts() -> None:
    """What a token needs beyond its input and output is bounded by the chunk of rows, not by the
    number of tokens.
    """
    w = random_weights(GPT_OSS, 1, 32, 1024)
    peaks = []
    for tokens in (8192, 32768):
        x, ids, weights = (
            torch.zeros(tokens, 32),
            torch.zeros(tokens, 1, dtype=torch.int64),
            torch.ones(tokens, 1),
        )
        _, peak, _ = peak_allocation(
            lambda x=x, ids=ids, weights=weights: reference_moe(
                x, ids, weights, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0)
            )
        )
        peaks.append(peak - 2 * x.nbytes)
    assert peaks[1] < 1.5 * peaks[0], peaks
