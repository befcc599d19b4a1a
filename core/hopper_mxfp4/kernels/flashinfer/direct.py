"""FlashInfer's compiled MoE runner, without FlashInfer's Python in between.

`cutlass_fused_moe` makes a Python object, asks its autotuner twice under a lock and allocates three
tensors that nobody reads, for every call. What the compiled runner is handed in the end is the same
each time but for six arguments. Which these are is not written down anywhere and differs between
releases, so the wrapper is asked: it makes one call whose runner only notes its arguments.
"""

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from hopper_mxfp4 import observe
from hopper_mxfp4.tuning.tables import Pair

_ARCHITECTURE = "90"  # what the wrapper asks its module for on Hopper
_PAIR = [
    -81,
    -82,
]  # no wrapper changes a pair of tactics on the way, and nothing else is a list like it
_DYNAMIC = ("output", "input", "token_selected_experts", "token_final_scales", "workspace_buffer")
_lock = threading.Lock()


class NotRecorded(RuntimeError):
    """This FlashInfer is built in another way than this module knows."""


class Direct(NamedTuple):
    """run(*arguments), with arguments[places] replaced by a call's own: what `call` does.

    places: of output, input, ids, weights, workspace and the pair of tactics. runner: FlashInfer's
        object.
    """

    run: Any
    arguments: list[Any]
    places: tuple[int, ...]
    runner: Any

    def call(
        self, output: Any, source: Any, ids: Any, weights: Any, workspace: Any, pair: Pair
    ) -> None:
        arguments = self.arguments.copy()
        a, b, c, d, e, f = self.places
        arguments[a], arguments[b], arguments[c], arguments[d], arguments[e], arguments[f] = (
            output,
            source,
            ids,
            weights,
            workspace,
            pair,
        )
        if observe.launching:
            self.run(*arguments)


class _Recorder:
    """Stands in for FlashInfer's runner in one thread; in others it is that runner."""

    def __init__(self, runner: Any, seen: list[Any], thread: int) -> None:
        self._runner, self._seen, self._thread = runner, seen, thread

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._runner, name)
        if name != "run_moe" or threading.get_ident() != self._thread:
            return real
        return lambda *arguments: self._seen.append((self._runner, real, arguments))


class _Recorders(dict[Any, Any]):
    """FlashInfer's runners by kind, each looked up as a recorder."""

    def __init__(self, runners: dict[Any, Any], seen: list[Any]) -> None:
        super().__init__(runners)
        self.seen, self.thread = seen, threading.get_ident()

    def __getitem__(self, key: Any) -> Any:
        return _Recorder(super().__getitem__(key), self.seen, self.thread)


@contextmanager
def _recording(moe: Any, seen: list[Any]) -> Iterator[None]:
    holder = moe.core.get_cutlass_fused_moe_module(_ARCHITECTURE).MoERunner
    with _lock:
        kept = holder.runner_dict
        if type(kept) is not dict:
            raise NotRecorded(f"its runners are in a {type(kept).__name__}")
        recorders = _Recorders(kept, seen)
        holder.runner_dict = recorders
        try:
            yield
        finally:
            kept.update(dict.items(recorders))  # a runner made meanwhile
            holder.runner_dict = kept


def record(moe: Any, arguments: dict[str, Any]) -> Direct:
    """The direct form of moe.cutlass_fused_moe(**arguments); runs nothing on the device.

    moe: the module flashinfer.fused_moe. Raises NotRecorded, saying what was met, where this
        FlashInfer works in another way.
    """
    seen: list[Any] = []
    try:
        with _recording(moe, seen):
            moe.cutlass_fused_moe(**arguments, profile_ids=list(_PAIR))
    except NotRecorded:
        raise
    except (
        Exception
    ) as error:  # whatever another release's wrapper raises at what it was not made for
        raise NotRecorded(f"{type(error).__name__}: {error}") from error
    if len(seen) != 1:
        raise NotRecorded(f"one call reached its runner {len(seen)} times")
    runner, run, handed = seen[0]
    # An enum costs the call more than the number it stands for.
    handed = [int(value) if isinstance(value, enum.IntEnum) else value for value in handed]
    places = [
        [i for i, value in enumerate(handed) if value is arguments[name]] for name in _DYNAMIC
    ]
    # By type first: another list holds tensors, which do not compare like numbers.
    places.append(
        [
            i
            for i, value in enumerate(handed)
            if type(value) is list and [type(n) for n in value] == [int, int] and value == _PAIR
        ]
    )
    if any(len(found) != 1 for found in places):
        raise NotRecorded(
            f"its runner is handed {len(handed)} arguments, some of a call's own not once each: "
            f"{places}"
        )
    return Direct(run, handed, tuple(found[0] for found in places), runner)


def tactic_counts(runner: Any) -> Pair:
    """How many tactics it has for each GEMM. The second's are numbered on from the first's."""
    return int(runner.get_gemm1_tactic_count()), int(runner.get_gemm2_tactic_count())


def fitting_tactics(runner: Any, gemm: int, n: int, k: int) -> set[int]:
    """The tactics of GEMM 1 or 2 whose tiles fit a shape (n rows of weights, k values each)."""
    return {int(tactic) for tactic in runner.get_valid_tactics_for_shape(gemm, n, k)}


def valid_tactics(runner: Any, gemm: int, n: int, k: int) -> list[int]:
    """Those that fit and can run on the current device, in order. Loads each kernel to find out."""
    return [
        tactic
        for tactic in sorted(fitting_tactics(runner, gemm, n, k))
        if runner.get_tactic_occupancy(tactic) > 0
    ]
