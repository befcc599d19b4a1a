"""GPU tests: skipped, with the reason, where the flashinfer kernel can't run."""

from pathlib import Path

import pytest
import torch

from hopper_mxfp4 import KernelUnavailable, LayerShape, env
from hopper_mxfp4.plugin import choose_kernel

HERE = Path(__file__).parent


def _unavailable():
    if not torch.cuda.is_available():
        return "no GPU here"
    try:
        choose_kernel("flashinfer", LayerShape(32, 2880, 2880), torch.device("cuda"))
    except KernelUnavailable as reason:
        return str(reason)
    return None


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in item.path.parents]
    if not ours:
        return
    reason = _unavailable()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def flashinfer_unless_a_test_says_otherwise(monkeypatch):
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
