"""`hopper-mxfp4 tune`: find the fastest pair of tactics for each number of tokens.

FlashInfer has some hundred tactics a GEMM, the worst twenty to a hundred times as slow as the best. So
every one is timed once, those beyond 1.5 times the best are dropped, and the few that are left are
measured properly: first the first GEMM's with the second's default, then the second's with the best first.
The pair is then measured side by side with FlashInfer's default, and the default kept unless it is slower.
Whole calls are timed, with real routing, on the way that serving takes.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

import torch

from . import PreparedExperts, choose_kernel, workspace_bytes
from .bench.bodies import Body, copies_needed, prepare_copies, rotation
from .bench.run import coarse_first
from .bench.timing import l2_bytes, synchronize, time_calls, time_once
from .kernels.flashinfer import layer_tactics, make_plan, run_pair
from .tactics import DEFAULT, Bucket, Pair, Table

logger = logging.getLogger(__name__)

# Powers of two, with steps between where the time grows with the tokens and tiles fill up.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
PRUNE = 1.5  # times the best single measurement
FINALISTS = 8
DEFAULT_PAIR: Pair = (DEFAULT, DEFAULT)


@dataclass(frozen=True)
class Timer:
    """How a pair is timed at one number of tokens, in microseconds a call. once: one round; properly: the median over so many seconds."""

    once: Callable[[Pair], float]
    properly: Callable[[Pair, float], float]


def tune_bucket(tokens: int, timer: Timer, tactics: tuple[Sequence[int], Sequence[int]], seconds: float = 0.02) -> Bucket:
    """The best pair at one number of tokens. tactics: those of each GEMM that can run. seconds: for measuring one pair properly.

    A tactic that raises is dropped. Raises what the default pair raises if that can't run either.
    """
    first = _best(tactics[0], lambda t: (t, DEFAULT), timer, seconds)
    second = _best(tactics[1], lambda t: (first, t), timer, seconds)
    pair = (first, second)
    default_us = timer.properly(DEFAULT_PAIR, seconds)
    if pair == DEFAULT_PAIR:
        return Bucket(tokens, pair, round(default_us, 2), round(default_us, 2))
    # Side by side and in turn, so that a clock that drifts moves both.
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        times[0].append(timer.properly(pair, seconds))
        times[1].append(timer.properly(DEFAULT_PAIR, seconds))
    us, default_us = round(median(times[0]), 2), round(median(times[1]), 2)
    return Bucket(tokens, pair, us, default_us) if us < default_us else Bucket(tokens, DEFAULT_PAIR, default_us, default_us)


def _best(candidates: Iterable[int], pair_of: Callable[[int], Pair], timer: Timer, seconds: float) -> int:
    rough = {}
    for tactic in candidates:
        try:
            rough[tactic] = timer.once(pair_of(tactic))
        except Exception as error:  # FlashInfer's compiled code raises more than one kind where a tactic does not fit after all
            logger.debug("tactic %s is left out: %s", tactic, error)
    finalists = prune(rough)
    if len(finalists) < 2:
        return finalists[0] if finalists else DEFAULT
    fine = {tactic: timer.properly(pair_of(tactic), seconds) for tactic in finalists}
    return min(fine, key=lambda tactic: (fine[tactic], tactic))


def prune(rough: dict[int, float]) -> list[int]:
    """The tactics within PRUNE times the best, at most FINALISTS, fastest first."""
    if not rough:
        return []
    limit = PRUNE * min(rough.values())
    return sorted((t for t, us in rough.items() if us <= limit), key=lambda t: (rough[t], t))[:FINALISTS]


def fixed_pair(candidates: Iterable[Pair], best_us: dict[int, float], time_at: Callable[[int, Pair], float]) -> Pair | None:
    """The one pair that loses least over all buckets: the smallest geometric mean of its time over the bucket's best.

    candidates: the pairs to try. best_us: the best time by tokens. time_at(tokens, pair): its time there.
    None without candidates.
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
    body: Body,
    device: torch.device,
    deadline: float,
    tokens: Sequence[int] = TOKENS,
    keep: Callable[[Table], None] = lambda table: None,
    step: Callable[[str], None] = lambda text: None,
) -> Table | None:
    """Measure a body's table on this GPU until a deadline (time.monotonic); buckets not reached are not in it.

    keep: is given the table so far after every bucket. Returns None where the time was over before the first.
    Raises KernelUnavailable where the flashinfer kernel can't run here or does not tell its tactics.
    """
    choose_kernel("flashinfer", body.shape, device)
    layers = prepare_copies(body, device, copies_needed(body, l2_bytes(device)), "flashinfer")
    plan = make_plan(layers[0], body.top_k)
    tactics = layer_tactics(plan, layers[0])
    workspace = torch.empty(workspace_bytes(layers[0], max(tokens), body.top_k), dtype=torch.uint8, device=device)
    buckets: dict[int, Bucket] = {}
    timers: dict[int, Timer] = {}
    loaded: set[Pair] = set()

    def table(fixed: Pair | None = None) -> Table:
        return Table(plan.build, plan.shape, tuple(buckets[m] for m in sorted(buckets)), fixed)

    for m in coarse_first(tokens):
        if time.monotonic() > deadline:
            break
        step(f"{body.name} M={m}")
        timers[m] = gpu_timer(body, layers, m, device, workspace, loaded)
        buckets[m] = tune_bucket(m, timers[m], tactics)
        keep(table())
    if not buckets:
        return None
    step(f"{body.name}: one pair for all")
    fixed = None
    if time.monotonic() < deadline:
        pairs = {bucket.pair for bucket in buckets.values()}
        fixed = fixed_pair(pairs, {m: b.us for m, b in buckets.items()}, lambda m, pair: timers[m].once(pair))
    finished = table(fixed)
    keep(finished)
    return finished


def gpu_timer(
    body: Body, layers: Sequence[PreparedExperts], tokens: int, device: torch.device, workspace: torch.Tensor, loaded: set[Pair]
) -> Timer:
    """Times whole calls at one number of tokens, with uniform routing, in CUDA graphs.

    loaded: the pairs whose kernels have run in this process; a kernel's first launch loads it, which can't be captured.
    """
    calls = rotation(body, tokens, "uniform", device, l2_bytes(device))
    out = torch.empty_like(calls[0].x)
    plans = [make_plan(p, body.top_k) for p in layers]

    def run_of(i: int, pair: Pair) -> Callable[[], None]:
        p, plan, call = layers[i % len(layers)], plans[i % len(layers)], calls[i]
        return lambda: run_pair(plan, pair, call.x, call.ids, call.weights, p, out, workspace)

    def runs(pair: Pair, count: int) -> list[Callable[[], None]]:
        made = [run_of(i, pair) for i in range(count)]
        if pair not in loaded:
            made[0]()
            synchronize(device)
            loaded.add(pair)
        return made

    run_of(0, DEFAULT_PAIR)()  # what comes before and after the GEMMs differs from one number of tokens to another
    synchronize(device)
    few = 2 if tokens <= 512 else 1
    return Timer(
        once=lambda pair: time_once(runs(pair, min(few, len(calls))), device),
        properly=lambda pair, seconds: time_calls(runs(pair, len(calls)), device, seconds).us,
    )
