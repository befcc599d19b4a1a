"""The adapter against SGLang's own Python, on the CPU.

Skipped where there is no SGLang; `make test` installs one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
elif find_spec("torchvision") is None:
    sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(
                    pytest.mark.skip(
                        reason="these tests are the reference kernel's, on a CPU: run with "
                        "CUDA_VISIBLE_DEVICES= (empty)"
                    )
                )


@pytest.fixture(scope="session", autouse=True)
def plugins():
    """Loaded as every process of SGLang loads them, from the installed entry points."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """On, unless a test says otherwise; whatever the shell has set."""
    from hopper_mxfp4 import env

    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("HOPPER_MXFP4", "on")


@pytest.fixture
def sm90_layout(monkeypatch):
    """The reference kernel with the flashinfer kernel's padding.

    Parameters are then larger than what is loaded into them.
    """
    from dataclasses import replace

    from hopper_mxfp4.contract import PLAIN
    from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel

    monkeypatch.setattr(
        ReferenceKernel, "layout", lambda self, device: replace(PLAIN, name="padded", multiple=128)
    )
