"""`hopper-mxfp4 tune`: find the fastest pair of tactics for each number of tokens.

FlashInfer has some hundred tactics a GEMM, the worst twenty to a hundred times as slow as the best.
So every one is timed once, those beyond 1.5 times the best are dropped, and the few that are left
are measured properly: first the first GEMM's with the second's default, then the second's with the
best first. The pair is then measured side by side with FlashInfer's default, and the default kept
unless it is slower. Whole calls are timed, with real routing, on the way that serving takes.
"""

import logging
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
from hopper_mxfp4.plugin import choose_kernel
from hopper_mxfp4.tuning.tables import DEFAULT, Bucket, Pair, Table

logger = logging.getLogger(__name__)

# Powers of two, with steps between where the time grows with the tokens and tiles fill up.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
PRUNE = 1.5  # times the best single measurement
FINALISTS = 8
CONFIRM_S = 0.06  # for measuring each of a few candidates that one is chosen of
DEFAULT_PAIR: Pair = (DEFAULT, DEFAULT)


@dataclass(frozen=True)
class Timer:
    """How calls are timed at one number of tokens, in microseconds a call.

    once: one round. beside: the medians of several pairs that take turns, over so many seconds
        each.
    """

    once: Callable[[Pair], float]
    beside: Callable[[Sequence[Pair], float], list[float]]


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
    its tactics.
    """
    choose_kernel("flashinfer", workload.shape, device)
    layers = prepare_copies(
        workload, device, copies_needed(workload, l2_bytes(device)), "flashinfer"
    )
    plan = make_plan(layers[0], workload.top_k)
    tactics = layer_tactics(plan, layers[0])
    nbytes = workspace_bytes(layers[0], max(tokens), workload.top_k)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
    buckets: dict[int, Bucket] = {}
    timers: dict[int, Timer] = {}
    loaded: set[Pair] = set()
    fixed: Pair | None = None

    def table() -> Table:
        return Table(plan.build, plan.shape, tuple(buckets[m] for m in sorted(buckets)), fixed)

    for m in coarse_first(tokens):
        if time.monotonic() > deadline:
            break
        step(f"{workload.name} M={m}")
        timers[m] = gpu_timer(workload, layers, m, device, workspace, loaded)
        buckets[m] = tune_bucket(m, timers[m], tactics)
        keep(table())
    if not buckets:
        return None
    step(f"{workload.name}: one pair for all")
    if time.monotonic() < deadline:
        pairs = {bucket.pair for bucket in buckets.values()}
        fixed = fixed_pair(
            pairs, {m: b.us for m, b in buckets.items()}, lambda m, pair: timers[m].once(pair)
        )
    finished = table()
    keep(finished)
    return finished


def gpu_timer(
    workload: Workload,
    layers: Sequence[PreparedExperts],
    tokens: int,
    device: torch.device,
    workspace: torch.Tensor,
    loaded: set[Pair],
) -> Timer:
    """Times whole calls at one number of tokens, with uniform routing, in CUDA graphs.

    loaded: those whose kernels have run in this process; a kernel's first launch loads it, which
        can't be captured.
    """
    calls = rotation(workload, tokens, "uniform", device, l2_bytes(device))
    out = torch.empty_like(calls[0].x)
    plans = [make_plan(p, workload.top_k) for p in layers]

    def run_of(i: int, pair: Pair) -> Callable[[], None]:
        p, plan, call = layers[i % len(layers)], plans[i % len(layers)], calls[i]
        return partial(
            run_pair, plan, pair, Call(call.x, call.ids, call.weights, out, workspace), p
        )

    def runs(pair: Pair, count: int) -> list[Callable[[], None]]:
        made = [run_of(i, pair) for i in range(count)]
        if pair not in loaded:
            made[0]()
            synchronize(device)
            loaded.add(pair)
        return made

    def beside(pairs: Sequence[Pair], seconds: float) -> list[float]:
        rounds = [round_of(runs(pair, len(calls)), device) for pair in pairs]
        timings = timings_or_raise(time_beside(rounds, len(calls), device, seconds))
        return [timing.us for timing in timings]

    run_of(
        0, DEFAULT_PAIR
    )()  # what comes before and after the GEMMs differs from one number of tokens to another
    synchronize(device)
    few = 2 if tokens <= 512 else 1
    return Timer(
        once=lambda pair: time_once(runs(pair, min(few, len(calls))), device),
        beside=beside,
    )
