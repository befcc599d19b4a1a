"""Which FlashInfer may run, and which scale layout it speaks: no FlashInfer is needed to know."""

import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from packaging.version import Version

from hopper_mxfp4.kernels.flashinfer import compat
from sm90 import PACK_SCALE

# version: (has the race of issue 5438, what is wrong by default, what is wrong when unsafe ones are
# allowed)
OLD, RACE, FINE = "too old", "wrong results on Hopper", None
VERSIONS = {
    "0.6.9": (False, OLD, OLD),
    "0.6.10": (True, RACE, FINE),
    "0.6.12": (True, RACE, FINE),
    "0.6.15.post1": (True, RACE, FINE),
    "0.6.16": (False, FINE, FINE),
    "0.6.16.post2": (False, FINE, FINE),
    "0.6.16.post3": (True, RACE, FINE),
    "0.6.16.post4": (True, RACE, FINE),
    "0.6.17": (True, RACE, FINE),
    "0.6.17+cu130": (True, RACE, FINE),
    "0.6.18rc2": (False, FINE, FINE),
    "0.6.18": (False, FINE, FINE),
    "0.6.18+cu130": (False, FINE, FINE),
    "0.7.2.post1": (False, FINE, FINE),
}


@pytest.mark.parametrize("allowed", [None, "0", "1"])
@pytest.mark.parametrize("version", list(VERSIONS))
def test_versions(version, allowed, monkeypatch) -> None:
    unsafe, default, overridden = VERSIONS[version]
    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version(version))
    if allowed is not None:
        monkeypatch.setenv("HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER", allowed)
    assert compat.is_unsafe(Version(version)) == unsafe
    wanted, problem = overridden if allowed == "1" else default, compat.flashinfer_problem()
    if wanted is None:
        assert problem is None
    else:
        assert wanted in problem
        assert version in problem
        assert "flashinfer-python>=0.6.18" in problem
    if wanted == RACE:
        assert "5438" in problem
        assert "HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER=1" in problem


def test_what_to_install_is_fine() -> None:
    """The advice must not send anyone to a release that is then refused."""
    wanted = Version(compat.INSTALL.partition(">=")[2])
    assert not compat.is_unsafe(wanted)
    assert wanted >= compat.OLDEST


def test_no_flashinfer() -> None:
    assert compat.flashinfer_version() is None
    assert compat.flashinfer_problem() == f"FlashInfer is not installed; {compat.INSTALL}"


@pytest.mark.parametrize("from_metadata", [True, False])
def test_installed_version(from_metadata, monkeypatch) -> None:
    """From the distribution's metadata; of a source tree on the path, which has none, from the
    module.
    """
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.__version__ = "0.7.9"
    monkeypatch.setitem(sys.modules, "flashinfer", module)

    def version(name: str) -> str:
        if from_metadata and name == "flashinfer-python":
            return "0.7.2.post1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert compat.flashinfer_version() == Version("0.7.2.post1" if from_metadata else "0.7.9")


def on_tensors(pack):
    """A helper with FlashInfer's signature."""

    def interleave(scales: torch.Tensor, group_size: int = 32) -> torch.Tensor:
        assert (scales.dtype, scales.dim(), group_size) == (torch.uint8, 3, 32)
        return torch.from_numpy(np.ascontiguousarray(pack(scales.numpy())))

    return interleave


def other_folding(s):
    """As "folded", but with the rows of a block in another order: the same shape, other bytes."""
    return PACK_SCALE["folded"](
        s.reshape(len(s), -1, 4, 16, s.shape[2]).swapaxes(2, 3).reshape(s.shape)
    )


def other_block_order(s):
    """As "folded", but the blocks of one K beside each other: the same bytes where there is a
    single block.
    """
    return PACK_SCALE["folded"](s).swapaxes(1, 2)


def k_after_rows(s):
    """As "by_k", but rows first: also the same where there is a single block of K."""
    e, _, groups = s.shape
    return (
        PACK_SCALE["by_k"](s)
        .reshape(e, groups // 4, -1, 4)
        .swapaxes(1, 2)
        .reshape(e, groups // 4, -1)
    )


def not_packed(s):
    return s


@pytest.mark.parametrize("name", list(PACK_SCALE))
def test_known_scale_layouts(name) -> None:
    assert compat.scale_layout(on_tensors(PACK_SCALE[name])) == name


@pytest.mark.parametrize(
    "pack",
    [other_folding, not_packed, other_block_order, k_after_rows],
    ids=lambda pack: pack.__name__,
)
def test_unknown_scale_layouts(pack) -> None:
    """A layout taken for another gives garbage without an error, so anything that differs anywhere
    must be told apart.
    """
    assert compat.scale_layout(on_tensors(pack)) is None
