"""Timing on the device, free of the host's share: CUDA-graph replay. On a CPU, the clock."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

Run = Callable[[], Any]
MOST = 200  # samples
TURNS = 10  # in which they are taken, at least one in each


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the tenth and ninetieth percentile of so many samples."""

    us: float
    low: float
    high: float
    samples: int


def time_calls(calls: Sequence[Run], device: torch.device, seconds: float) -> Timing:
    """Time one round of calls, again and again for about so many seconds, at least once a turn.

    Each call must have run once before, so that whatever it compiles or loads is there. On a GPU the
    round is captured in a CUDA graph. Raises whatever a call raises, or capturing it.
    """
    return time_beside([round_of(calls, device)], len(calls), device, seconds)[0]


def round_of(calls: Sequence[Run], device: torch.device) -> Run:
    """One round of calls as a function: a CUDA graph's replay on a GPU."""
    return capture(calls) if device.type == "cuda" else _in_turn(calls)


def time_beside(
    rounds: Sequence[Run], calls: int, device: torch.device, seconds: float
) -> list[Timing]:
    """Time several rounds (`round_of`) of as many calls, each for about so many seconds, taking turns in any order.

    A GPU at its power limit changes its clock within tenths of a second, so that a time depends on what ran before:
    on an H100 equal launches timed one after the other, or in turns of one order, were up to 9 % apart, in turns of
    any order 3 % (once 4).
    """
    counts = []
    for run in rounds:
        first = _spans(run, device, 1)[0]
        wanted = min(int(seconds * 1e6 / max(first, 1e-3)), MOST)
        counts.append(max(math.ceil(wanted / TURNS), 1))
    spans: list[list[float]] = [[] for _ in rounds]
    turns = random.Random(0)
    for _ in range(TURNS):
        for i in turns.sample(range(len(rounds)), len(rounds)):
            rounds[i]()  # the first after another waits for its launch
            spans[i] += _spans(rounds[i], device, counts[i])
    return [_timing(each, calls) for each in spans]


def time_once(calls: Sequence[Run], device: torch.device) -> float:
    """Microseconds a call from a single round; for telling the hopeless from the rest."""
    replay = round_of(calls, device)
    first = _spans(replay, device, 1)[0]
    if first < 2000:  # a graph's first launch costs some tens of microseconds more
        first = min(first, *_spans(replay, device, 2))
    return first / len(calls)


def capture(calls: Sequence[Run]) -> Run:
    """A CUDA graph of the calls, as a function that replays it.

    torch.cuda.graph would empty the allocator's cache and may collect garbage each time: tens of
    milliseconds, thousands of times while tuning.
    """
    graph = torch.cuda.CUDAGraph()
    stream, pool = _capturing()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        except BaseException:
            with suppress(RuntimeError):  # the capture is lost; the reason is the one on its way
                graph.capture_end()
            raise
        graph.capture_end()
    return graph.replay


@cache
def _capturing() -> tuple[Any, Any]:
    """One stream and one memory pool for every capture, so that each graph reuses what the last one had.

    The pool lives as long as a graph that uses it: the first, which is kept.
    """
    stream, first = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        first.capture_begin()
        torch.zeros(1, device="cuda")
        first.capture_end()
    _kept.append(first)
    return stream, first.pool()


_kept: list[Any] = []


def time_host(call: Run, device: torch.device, calls: int = 1000, batch: int = 20) -> float:
    """Microseconds that a call keeps the host busy: the best batch's mean. The device catches up between batches."""
    best = float("inf")
    for _ in range(max(calls // batch, 1)):
        begin = time.perf_counter_ns()
        for _ in range(batch):
            call()
        best = min(best, (time.perf_counter_ns() - begin) / batch / 1e3)
        synchronize(device)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turn(calls: Sequence[Run]) -> Run:
    def round_of_calls() -> None:
        for call in calls:
            call()

    return round_of_calls


def _spans(replay: Run, device: torch.device, count: int) -> list[float]:
    """Microseconds of each of so many rounds."""
    if device.type != "cuda":
        times = [time.perf_counter_ns()]
        for _ in range(count):
            replay()
            times.append(time.perf_counter_ns())
        return [(b - a) / 1e3 for a, b in pairwise(times)]
    begins, ends = ([_event() for _ in range(count)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) * 1e3 for begin, end in zip(begins, ends, strict=True)]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _timing(spans: list[float], calls: int) -> Timing:
    per_call = sorted(span / calls for span in spans)
    last = len(per_call) - 1
    return Timing(
        statistics.median(per_call),
        per_call[round(0.1 * last)],
        per_call[round(0.9 * last)],
        len(per_call),
    )


@dataclass(frozen=True)
class Rates:
    """What this device does at best, measured: bytes a second that a kernel moves, bf16 FLOPs a second of a matmul."""

    bytes_per_s: float
    flops_per_s: float


def measure_rates(device: torch.device, seconds: float = 0.3) -> Rates:
    """The ceilings that floors are computed with. On a CPU smaller problems are measured.

    Bytes: the faster of reading 4 GiB (a sum) and of reading and writing 1 GiB each, both by kernels: a plain
    copy in a CUDA graph becomes a memcpy node, which was a fifth slower than either on an H100.
    """
    cuda = device.type == "cuda"
    size, n = (1 << 30, 8192) if cuda else (1 << 22, 256)
    source = torch.ones(size, dtype=torch.float32, device=device)
    part, total = source[: size // 4], torch.empty((), dtype=torch.float32, device=device)
    target = torch.empty_like(part)
    a = torch.randn(n, n, device=device).bfloat16()
    c = torch.empty_like(a)
    work: dict[Run, float] = {
        lambda: torch.sum(source, dim=0, out=total): source.nbytes,
        lambda: torch.neg(part, out=target): 2 * part.nbytes,
    }
    rates = []
    for run, nbytes in work.items():
        run()
        rates.append(nbytes / time_calls([run], device, seconds).us * 1e6)
    torch.mm(a, a, out=c)
    matmul = time_calls([lambda: torch.mm(a, a, out=c)], device, seconds).us
    return Rates(max(rates), 2 * n**3 / matmul * 1e6)


def l2_bytes(device: torch.device) -> int:
    """The device's L2 cache; nothing for a CPU, where bench only proves that it works."""
    return (
        int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
    )
