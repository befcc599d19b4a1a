"""`hopper-mxfp4 tune`: find the fastest pair of tactics for each number of tokens.

FlashInfer has some hundred tactics a GEMM, the worst twenty to a hundred times as slow as the best.
So every one is timed once, those beyond 1.5 times the best are dropped, and the few that are left
are measured properly: first the first GEMM's with the second's default, then the second's with the
best first. The pair is then measured side by side with FlashInfer's default, and the default kept
unless it is slower. Whole calls are timed, with real routing, on the way that serving takes.
Then the smallbatch kernel is measured side by side with the pairs, to find where they overtake it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

import torch

from hopper_mxfp4 import PreparedExperts, workspace_bytes
from hopper_mxfp4.bench.run import coarse_first
from hopper_mxfp4.bench.timing import (
    l2_bytes,
    round_of,
    synchronize,
    time_beside,
    time_once,
    timings_or_raise,
)
from hopper_mxfp4.bench.workloads import Workload, copies_needed, prepare_copies, rotation
from hopper_mxfp4.contract import Call
from hopper_mxfp4.kernels.flashinfer.kernel import layer_tactics, make_plan, run_pair
from hopper_mxfp4.kernels.smallbatch.kernel import (
    MAX_TOP_K,
    REVISION,
    SmallBatchKernel,
    tiles,
    tiles_runner,
)
from hopper_mxfp4.plugin import choose_kernel
from hopper_mxfp4.tuning.tables import DEFAULT, Bucket, Pair, SmallBatch, Table, schedule

logger = logging.getLogger(__name__)

# Powers of two, with steps between where the time grows with the tokens and tiles fill up.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
PRUNE = 1.5  # times the best single measurement
FINALISTS = 8
CONFIRM_S = 0.06  # for measuring each of a few candidates that one is chosen of
# A crossover is found to between tokens this near; with times 1.6x apart a doubling that costs 1 %
CLOSE = 1.03
# Of running a call: FlashInfer with a pair of tactics, or smallbatch with tiles of so many tokens.
Candidate = Pair | int
DEFAULT_PAIR: Pair = (DEFAULT, DEFAULT)


@dataclass(frozen=True)
class Timer:
    """How calls are timed at one number of tokens, in microseconds a call.

    once: one round. beside: the medians of several candidates that take turns, over so many seconds
        each.
    """

    once: Callable[[Candidate], float]
    beside: Callable[[Sequence[Candidate], float], list[float]]


def tune_bucket(
    tokens: int, timer: Timer, tactics: tuple[Sequence[int], Sequence[int]], seconds: float = 0.02
) -> Bucket:
    """The best pair at one number of tokens. tactics: those of each GEMM that can run. seconds: for
    measuring one pair properly.

    A tactic that raises is dropped. Raises what the default pair raises if that can't run either.
    """
    first = _best(tactics[0], lambda t: (t, DEFAULT), timer, seconds)
    second = _best(tactics[1], lambda t: (first, t), timer, seconds)
    pair = (first, second)
    if pair == DEFAULT_PAIR:
        (default_us,) = timer.beside([DEFAULT_PAIR], seconds)
        return Bucket(tokens, pair, round(default_us, 2), round(default_us, 2))
    us, default_us = (round(us, 2) for us in timer.beside((pair, DEFAULT_PAIR), CONFIRM_S))
    return (
        Bucket(tokens, pair, us, default_us)
        if us < default_us
        else Bucket(tokens, DEFAULT_PAIR, default_us, default_us)
    )


def _best(
    candidates: Iterable[int], pair_of: Callable[[int], Pair], timer: Timer, seconds: float
) -> int:
    rough = {}
    for tactic in candidates:
        try:
            rough[tactic] = timer.once(pair_of(tactic))
        # FlashInfer's compiled code raises more than one kind where a tactic does not fit after all
        except Exception as error:
            logger.debug("tactic %s is left out: %s", tactic, error)
    finalists = prune(rough)
    if len(finalists) < 2:
        return finalists[0] if finalists else DEFAULT
    fine = timer.beside([pair_of(tactic) for tactic in finalists], seconds)
    return min(zip(fine, finalists, strict=True))[1]


def prune(rough: dict[int, float]) -> list[int]:
    """The tactics within PRUNE times the best, at most FINALISTS, fastest first."""
    if not rough:
        return []
    limit = PRUNE * min(rough.values())
    return sorted((t for t, us in rough.items() if us <= limit), key=lambda t: (rough[t], t))[
        :FINALISTS
    ]


def fixed_pair(
    candidates: Iterable[Pair], best_us: dict[int, float], time_at: Callable[[int, Pair], float]
) -> Pair | None:
    """The one pair that loses least over all buckets: the smallest geometric mean of its time over
    the bucket's best.

    candidates: the pairs to try. best_us: the best time by tokens. time_at(tokens, pair): its time
    there. None without candidates.
    """
    losses: dict[Pair, float] = {}
    for pair in sorted(set(candidates)):
        ratios: list[float] = []
        for tokens, best in best_us.items():
            ratios.append(time_at(tokens, pair) / best)
            if ratios[-1] > 20:  # hopeless, and slow to go on measuring
                break
        losses[pair] = geometric_mean(ratios) if len(ratios) == len(best_us) else float("inf")
    return min(losses, key=lambda pair: (losses[pair], pair), default=None)


def last_win(points: Iterable[int], ratio: Callable[[int], float]) -> int | None:
    """Up to how many tokens one way of running a layer is faster than another: 0 for none, None for
    all.

    points: numbers of tokens, rising. ratio(tokens): its time over the other's. Asked at the points
    until it is hopeless, then between the last one where it wins and the next.
    """
    low, high = 0, None
    for tokens in points:
        times = ratio(tokens)
        if times < 1:
            low, high = tokens, None
        elif high is None:
            high = tokens
        if times > PRUNE:
            break
    if high is None:
        return None
    if not low:
        return 0
    while high - low > 1 and high > CLOSE * low:
        middle = round(math.sqrt(low * high))
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    return round(math.sqrt(low * high))


def tune_smallbatch(
    points: Iterable[int],
    time_at: Callable[[int], Sequence[float]],
    deadline: float = float("inf"),
) -> SmallBatch | None:
    """Where smallbatch changes its tiles, and where the pairs of a table overtake it. None where
    the deadline came first.

    points: numbers of tokens. time_at(tokens): microseconds a call of the table's pair, of
    smallbatch with tiles of 8 tokens and, if the layer has them, with tiles of 16. deadline: by
    time.monotonic.
    """
    times: dict[int, Sequence[float]] = {}

    def seen(tokens: int) -> Sequence[float]:
        if tokens not in times:
            if time.monotonic() > deadline:
                raise TimeoutError
            times[tokens] = time_at(tokens)
        return times[tokens]

    try:
        # From one token on, or a crossover below the first bucket would not be seen.
        tokens = last_win(sorted({1, *points}), lambda m: min(seen(m)[1:]) / seen(m)[0])
        narrow = (
            last_win(sorted(times), lambda m: seen(m)[1] / seen(m)[2])
            if len(times[1]) > 2
            else None
        )
    except TimeoutError:
        return None
    return SmallBatch(tokens, None if narrow is None else narrow + 1, REVISION)


def tune(
    workload: Workload,
    device: torch.device,
    deadline: float,
    tokens: Sequence[int] = TOKENS,
    keep: Callable[[Table], None] = lambda table: None,
    step: Callable[[str], None] = lambda text: None,
) -> Table | None:
    """Measure a workload's table on this GPU until a deadline (time.monotonic); what is not reached
    is not in it.

    keep: is given the table so far after every bucket. Returns None where the time was over before
    the first. Raises KernelUnavailable where the flashinfer kernel can't run here or does not tell
    its tactics, and RuntimeError where smallbatch does not compile.
    """
    choose_kernel("flashinfer", workload.shape, device)
    layers = prepare_copies(
        workload, device, copies_needed(workload, l2_bytes(device)), "flashinfer"
    )
    plan = make_plan(layers[0], workload.top_k)
    tactics = layer_tactics(plan, layers[0])
    small = load_smallbatch(layers[0], workload.top_k)
    nbytes = workspace_bytes(layers[0], max(tokens), workload.top_k)
    if small:
        nbytes = max(
            nbytes, SmallBatchKernel().workspace_bytes(layers[0], max(tokens), workload.top_k)
        )
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
    buckets: dict[int, Bucket] = {}
    timers: dict[int, Timer] = {}
    loaded: set[Candidate] = set()
    found: SmallBatch | None = None
    fixed: Pair | None = None

    def table() -> Table:
        return Table(
            plan.build, plan.shape, tuple(buckets[m] for m in sorted(buckets)), fixed, found
        )

    def timer_at(m: int) -> Timer:
        return timers.get(m) or gpu_timer(workload, layers, m, device, workspace, loaded)

    for m in coarse_first(tokens):
        if time.monotonic() > deadline:
            break
        step(f"{workload.name} M={m}")
        timers[m] = timer_at(m)
        buckets[m] = tune_bucket(m, timers[m], tactics)
        keep(table())
    if not buckets:
        return None
    step(f"{workload.name}: smallbatch")
    if small:
        pairs_by = schedule(table(), plan.shape, lambda gemm, tactic: True)
        found = tune_smallbatch(
            buckets,
            lambda m: timer_at(m).beside((pairs_by.pair(m), *small), CONFIRM_S),
            deadline,
        )
        keep(table())
    step(f"{workload.name}: one pair for all")
    if time.monotonic() < deadline:
        pairs = {bucket.pair for bucket in buckets.values()}
        fixed = fixed_pair(
            pairs, {m: b.us for m, b in buckets.items()}, lambda m, pair: timers[m].once(pair)
        )
    finished = table()
    keep(finished)
    return finished


def load_smallbatch(p: PreparedExperts, top_k: int) -> tuple[int, ...]:
    """Compile the smallbatch kernel for a layer and load it. Returns the tiles it has, none, with
    the reason logged, where it can't run.
    """
    kernel = SmallBatchKernel()
    reason = kernel.beside_flashinfer(p.shape, p.w13.device)
    if not reason and top_k > MAX_TOP_K:
        reason = f"it takes at most {MAX_TOP_K} experts a token"
    if reason:
        logger.warning("smallbatch is not measured: %s", reason)
        return ()
    kernel.warm_up(p)
    return tiles(p.shape)


def gpu_timer(
    workload: Workload,
    layers: Sequence[PreparedExperts],
    tokens: int,
    device: torch.device,
    workspace: torch.Tensor,
    loaded: set[Candidate],
) -> Timer:
    """Times whole calls at one number of tokens, with uniform routing, in CUDA graphs.

    loaded: those whose kernels have run in this process; a kernel's first launch loads it, which
        can't be captured.
    """
    calls = rotation(workload, tokens, "uniform", device, l2_bytes(device))
    out = torch.empty_like(calls[0].x)
    plans = [make_plan(p, workload.top_k) for p in layers]

    def run_of(i: int, candidate: Candidate) -> Callable[[], None]:
        p, plan, call = layers[i % len(layers)], plans[i % len(layers)], calls[i]
        run = (
            tiles_runner(candidate, p, tokens, workload.top_k)
            if isinstance(candidate, int)
            else partial(run_pair, plan, candidate)
        )
        return partial(run, Call(call.x, call.ids, call.weights, out, workspace), p)

    def runs(candidate: Candidate, count: int) -> list[Callable[[], None]]:
        made = [run_of(i, candidate) for i in range(count)]
        if candidate not in loaded:
            made[0]()
            synchronize(device)
            loaded.add(candidate)
        return made

    def beside(candidates: Sequence[Candidate], seconds: float) -> list[float]:
        rounds = [round_of(runs(candidate, len(calls)), device) for candidate in candidates]
        timings = timings_or_raise(time_beside(rounds, len(calls), device, seconds))
        return [timing.us for timing in timings]

    run_of(
        0, DEFAULT_PAIR
    )()  # what comes before and after the GEMMs differs from one number of tokens to another
    synchronize(device)
    few = 2 if tokens <= 512 else 1
    return Timer(
        once=lambda candidate: time_once(runs(candidate, min(few, len(calls))), device),
        beside=beside,
    )
