"""Timing on the device, free of the host's share: CUDA-graph replay. On a CPU, the clock."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

Timed = Callable[[], Any]
MAX_SAMPLES = 200  # samples
TURNS = 10  # in which they are taken, at least one in each


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the tenth and ninetieth percentile of so many samples."""

    us: float
    low: float
    high: float
    samples: int


def time_calls(calls: Sequence[Timed], device: torch.device, seconds: float) -> Timing:
    """Time one round of calls, again and again for about so many seconds, at least once a turn.

    Each call must have run once before (see `warming_up`), so that whatever it compiles or loads is
    there. On a GPU the round is captured in a CUDA graph. Raises whatever a call raises, or
    capturing it.
    """
    (timing,) = timings_or_raise(
        time_beside([round_of(calls, device)], len(calls), device, seconds)
    )
    return timing


def round_of(calls: Sequence[Timed], device: torch.device) -> Timed:
    """One round of calls as a function: a CUDA graph's replay on a GPU."""
    return capture(calls) if device.type == "cuda" else _in_turn(calls)


def time_beside(
    rounds: Sequence[Timed], calls: int, device: torch.device, seconds: float
) -> list[Timing | Exception]:
    """Time several rounds (`round_of`) of as many calls, each for about so many seconds, taking
    turns in random order.

    One that raises is left out from then on, and what it raised stands in its timing's place.

    A GPU at its power limit changes its clock within tenths of a second, so that a time depends on
    what ran before: on an H100 equal launches timed one after the other, or in turns of one order,
    were up to 9 % apart, in turns of random order 3 % (once 4).
    """
    counts = [1] * len(rounds)
    spans: list[list[float]] = [[] for _ in rounds]
    failed: dict[int, Exception] = {}
    turns = random.Random(0)
    for turn in range(
        -1, TURNS
    ):  # in the one before the first, how many fit into a turn is found out
        for i in turns.sample(range(len(rounds)), len(rounds)):
            if i in failed:
                continue
            try:
                if turn < 0:
                    first = _spans(rounds[i], device, 1)[0]
                    wanted = min(int(seconds * 1e6 / max(first, 1e-3)), MAX_SAMPLES)
                    counts[i] = max(math.ceil(wanted / TURNS), 1)
                else:
                    rounds[i]()  # the first after another waits for its launch
                    spans[i] += _spans(rounds[i], device, counts[i])
            except Exception as error:  # a framework's kernel may raise anything
                failed[i] = error
    return [failed.get(i) or _timing(each, calls) for i, each in enumerate(spans)]


def timings_or_raise(timings: Sequence[Timing | Exception]) -> list[Timing]:
    """The timings of `time_beside`. Raises the first of what was raised, if anything was."""
    found = []
    for timing in timings:
        if isinstance(timing, Exception):
            raise timing
        found.append(timing)
    return found


def time_once(calls: Sequence[Timed], device: torch.device) -> float:
    """Microseconds a call from a single round; for telling the hopeless from the rest."""
    replay = round_of(calls, device)
    first = _spans(replay, device, 1)[0]
    if first < 2000:  # a graph's first launch costs some tens of microseconds more
        first = min(first, *_spans(replay, device, 2))
    return first / len(calls)


def capture(calls: Sequence[Timed]) -> Timed:
    """A CUDA graph of the calls, as a function that replays it.

    Each graph has memory of its own. Graphs that share a pool may only be replayed in the order of
    their capture: what one has freed, the next may keep for good, and the first overwrites it
    whenever it runs again. That is how Marlin's locks, which vLLM makes at the first call on a
    stream, came to be garbage and GPT-OSS hung (docs/dev/evidence/reliability.md).

    torch.cuda.graph would empty the allocator's cache and may collect garbage each time: tens of
    milliseconds, thousands of times while tuning.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_capture_stream()):
        graph.capture_begin(capture_error_mode="thread_local")
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
def _capture_stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def warming_up(device: torch.device) -> Iterator[None]:
    """Calls run here before they are captured: on the same stream, so that what is made once a
    stream is made outside a graph.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_capture_stream()):
        yield
    torch.cuda.synchronize(device)


def time_host(call: Timed, device: torch.device, calls: int = 1000, batch: int = 20) -> float:
    """Microseconds that a call keeps the host busy: the best batch's mean. The device catches up
    between batches.
    """
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


def _in_turn(calls: Sequence[Timed]) -> Timed:
    def round_of_calls() -> None:
        for call in calls:
            call()

    return round_of_calls


def _spans(replay: Timed, device: torch.device, count: int) -> list[float]:
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
    """What this device does at best, measured: bytes a second that a kernel moves, bf16 FLOPs a
    second of a matmul.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_rates(device: torch.device, seconds: float = 0.3) -> Rates:
    """The ceilings that rooflines are computed with. On a CPU smaller problems are measured.

    Bytes: the faster of reading 4 GiB (a sum) and of reading and writing 1 GiB each, both by
    kernels: a plain copy in a CUDA graph becomes a memcpy node, which was a fifth slower than
        either on an H100.
    """
    cuda = device.type == "cuda"
    size, n = (1 << 30, 8192) if cuda else (1 << 22, 256)
    source = torch.ones(size, dtype=torch.float32, device=device)
    part, total = source[: size // 4], torch.empty((), dtype=torch.float32, device=device)
    target = torch.empty_like(part)
    a = torch.randn(n, n, device=device).bfloat16()
    c = torch.empty_like(a)
    work: dict[Timed, float] = {
        lambda: torch.sum(source, dim=0, out=total): source.nbytes,
        lambda: torch.neg(part, out=target): 2 * part.nbytes,
    }
    rates = []
    for run, nbytes in work.items():
        with warming_up(device):
            run()
        rates.append(nbytes / time_calls([run], device, seconds).us * 1e6)
    with warming_up(device):
        torch.mm(a, a, out=c)
    matmul = time_calls([lambda: torch.mm(a, a, out=c)], device, seconds).us
    return Rates(max(rates), 2 * n**3 / matmul * 1e6)


def l2_bytes(device: torch.device) -> int:
    """The device's L2 cache; nothing for a CPU, where bench only proves that it works."""
    return (
        int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
    )
