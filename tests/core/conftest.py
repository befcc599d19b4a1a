"""The core stands alone: none of its tests can import a framework or FlashInfer.

That it imports no adapter is held by the layers in pyproject.toml; installed adapters are plugins
that register themselves.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from hopper_mxfp4 import env
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.kernels.jit import ahead
from hopper_mxfp4.plugin import Compilation
from sm90 import PACK_SCALE, Plugin, Sm90Kernel

FORBIDDEN = ("vllm", "sglang", "flashinfer")


@pytest.fixture(scope="module", autouse=True)
def _nothing_but_the_core() -> Iterator[None]:
    """None in sys.modules makes an import raise; other tests of the same run get their modules
    back.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] in FORBIDDEN]:
            patch.delitem(sys.modules, name)
        for name in FORBIDDEN:
            patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shell has set must not decide which kernel is tested."""
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Compilation]:
    """What would be compiled in threads for the layers that a test prepares. Nothing is: it would
    go on beside other tests, into the user's cache.
    """
    seen: list[Compilation] = []
    monkeypatch.setattr(ahead, "begin", seen.append)
    return seen


@contextmanager
def _registered(plugin: object) -> Iterator[None]:
    plugins.manager.register(plugin)
    try:
        yield
    finally:
        plugins.manager.unregister(plugin)


@pytest.fixture(scope="session")
def registered():
    """A context manager in which a plugin object is registered."""
    return _registered


@pytest.fixture(scope="module")
def sm90_kernels() -> Iterator[None]:
    """Kernels "sm90-folded" and "sm90-by_k", which take FlashInfer's layout on a CPU."""
    with _registered(Plugin(*(Sm90Kernel(scales) for scales in PACK_SCALE))):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small tensors: sharing each out costs far more than the work, the more so on a busy
    machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tell(capsys, record_property) -> Callable[[Counter[str]], int]:
    """tell(outcomes) prints and records how many cases of a fuzz test came out how; returns how
    many there were.
    """

    def tell(outcomes: Counter[str]) -> int:
        total = sum(outcomes.values())
        with capsys.disabled():
            print(f"\n{total} cases: {dict(outcomes)}")
        for outcome, count in outcomes.items():
            record_property(outcome, count)
        record_property("times", total)
        return total

    return tell
