"""The core's own scratch: one for all layers, grown and not shrunk, a thread's own."""

import threading

import pytest
import torch

from hopper_mxfp4 import (
    GPT_OSS,
    SwiGLU,
    fused_moe,
    prepare_experts,
    release_workspaces,
    reserve_workspace,
    workspace_bytes,
)
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.scratch import workspace
from random_layers import random_weights
from sm90 import Plugin, watched

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    release_workspaces()
    yield
    release_workspaces()


def test_shared_and_grown():
    small = workspace(CPU, 100)
    assert small.dtype == torch.uint8
    assert workspace(CPU, 50) is small
    large = workspace(CPU, 10_000_000)
    assert large.numel() >= 10_000_000
    assert large.numel() <= 1.2 * 10_000_000
    assert workspace(CPU, 100) is large


def test_growing_is_said_once(caplog):
    with caplog.at_level("INFO", "hopper_mxfp4.scratch"):
        for _ in range(3):
            workspace(CPU, 3 << 20)
    assert [record.getMessage() for record in caplog.records] == [
        "scratch memory on cpu: 3.0 MiB, shared by all layers"
    ]


def test_a_thread_has_its_own():
    mine, theirs = workspace(CPU, 100), []
    thread = threading.Thread(target=lambda: theirs.append(workspace(CPU, 100)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_made_in_inference_mode_and_written_outside():
    with torch.inference_mode():
        buffer = workspace(CPU, 100)
    buffer.fill_(1)  # raises for an inference tensor
    assert not buffer.is_inference()


class Hungry(ReferenceKernel):
    """Keeps the scratch it was given."""

    name = "hungry"
    auto_devices = frozenset()

    def __init__(self):
        self.given = []

    def workspace_bytes(self, p, num_tokens, top_k):
        return num_tokens * 100_000

    def make_runner(self, p, num_tokens, top_k):
        return watched(
            super().make_runner(p, num_tokens, top_k),
            lambda call: self.given.append(call.workspace),
        )


def test_layers_share_it(registered):
    kernel = Hungry()
    with registered(Plugin(kernel)):
        layers = [
            prepare_experts(
                random_weights(GPT_OSS, 2, 64, 32, seed=s),
                family=GPT_OSS,
                swiglu=SwiGLU(),
                kernel="hungry",
            )
            for s in (0, 1)
        ]
    assert reserve_workspace(layers[0], 9, 1) == workspace_bytes(layers[0], 9, 1) == 900_000
    for m in (1, 9, 3):
        for p in layers:
            fused_moe(
                torch.ones(m, 64).bfloat16(),
                torch.zeros(m, 1, dtype=torch.int32),
                torch.ones(m, 1),
                p,
            )
    assert len({id(given) for given in kernel.given}) == 1
    assert kernel.given[0].numel() >= 900_000
