"""The measuring itself: workloads x tokens x routings x contenders, within a time budget, written
down as it goes.
"""

import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hopper_mxfp4 import __version__
from hopper_mxfp4.bench.baselines import Bind, Contender, Layer
from hopper_mxfp4.bench.timing import (
    Rates,
    Timed,
    l2_bytes,
    measure_rates,
    round_of,
    time_beside,
    warming_up,
)
from hopper_mxfp4.bench.workloads import (
    Batch,
    Workload,
    active_experts,
    copies_needed,
    copy_weights,
    random_weights,
    rotation,
)

FORMAT = 1
LEAST_S, MAX_S = 0.02, 0.25  # of measuring a point; compiling and building come on top
Result = dict[str, Any]


def bench(
    workloads: Sequence[Workload],
    tokens: Sequence[int],
    routings: Sequence[str],
    found: Sequence[Contender],
    device: torch.device,
    budget: float,
    keep: Callable[[Result], None] = lambda result: None,
    step: Callable[[str, int, int], None] = lambda text, done, of: None,
) -> Result:
    """Measure every contender at every point; returns what bench's JSON holds.

    budget: seconds for everything. What is not measured for want of time is counted in ``missed``.
    keep: is given the result so far after every point. step: is told what is next, and how much is
        done of how much.
    """
    deadline = time.monotonic() + budget
    rates = measure_rates(device, MAX_S)
    result: Result = {
        "format": FORMAT,
        "about": about(device, rates),
        "rows": [],
        "absent": [],
        "missed": 0,
    }
    total = len(workloads) * len(tokens) * len(routings) * len(found)
    done = 0
    for workload in workloads:
        layers = _layers(workload, device)
        binds: dict[str, list[Bind]] = {}
        for contender in found:
            step(f"{workload.name}: building {contender.name}", done, total)
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError("the time budget was over before it was built")
                binds[contender.name] = [contender.build(layer) for layer in layers]
            except (
                Exception
            ) as error:  # whatever a baseline raises where it can't run is the reason
                result["absent"].append(
                    {"workload": workload.name, "kernel": contender.name, "why": _why(error)}
                )
        present = [contender for contender in found if contender.name in binds]
        done += (len(found) - len(present)) * len(tokens) * len(routings)
        firsts: dict[tuple[str, int], torch.Tensor] = {}
        # Kernels that tune come last and get the time that is left; from few tokens to many,
        # for which one point takes a minute.
        order = [(False, *point) for point in product(routings, coarse_first(tokens))]
        order += [(True, *point) for point in product(routings, sorted(set(tokens)))]
        for slow, routing, m in order:
            group = [contender for contender in present if contender.slow is slow]
            if not group:
                continue
            if time.monotonic() > deadline:
                result["missed"] += len(group)
                done += len(group)
                continue
            calls = rotation(workload, m, routing, device, l2_bytes(device))
            point = {
                "workload": workload.name,
                "routing": routing,
                "tokens": m,
                **roofline(workload, calls, rates),
            }
            step(f"{workload.name} {routing} M={m}", done, total)
            left = 0.3 * (deadline - time.monotonic()) / max(total - done, 1)
            seconds = min(max(left, LEAST_S), MAX_S)
            rows, outputs = _measure(group, binds, calls, device, seconds)
            for row in rows:
                if "failed" not in row:
                    output = outputs[row["kernel"]][:, : workload.hidden]
                    first = firsts.setdefault((routing, m), output)
                    row["relative_l2"] = _relative_l2(output, first)
                result["rows"].append(point | row)
            done += len(group)
            keep(result)
        del layers, binds, firsts
        if device.type == "cuda":
            torch.cuda.empty_cache()
    step("done", total, total)
    keep(result)
    return result


def _layers(workload: Workload, device: torch.device) -> list[Layer]:
    """As many copies of one layer as it takes for their weights not to stay in the L2 cache from
    call to call.
    """
    weights = random_weights(workload, device)
    return [Layer(workload, weights)] + [
        Layer(workload, copy_weights(weights))
        for _ in range(copies_needed(workload, l2_bytes(device)) - 1)
    ]


def _measure(
    group: Sequence[Contender],
    binds: dict[str, list[Bind]],
    calls: Sequence[Batch],
    device: torch.device,
    seconds: float,
) -> tuple[list[Result], dict[str, torch.Tensor]]:
    """Rows without their point, and what the first call returned, by kernel. All of the group take
    turns.
    """
    rows: list[Result] = [
        {"kernel": c.name, "ours": c.ours, "activations": c.activations} for c in group
    ]
    runs: dict[str, list[Timed]] = {}
    outputs: dict[str, torch.Tensor] = {}
    rounds: list[Timed] = []
    timed: list[Result] = []
    for row in rows:
        with _failing_in(row):
            runs[row["kernel"]], outputs[row["kernel"]] = _first_calls(
                binds[row["kernel"]], calls, device
            )
    for row in rows:  # all have run: none has anything left to allocate
        if "failed" not in row:
            with _failing_in(row):
                rounds.append(round_of(runs[row["kernel"]], device))
                timed.append(row)
    timings = time_beside(rounds, len(calls), device, seconds)
    for row, timing in zip(timed, timings, strict=True):
        if isinstance(timing, Exception):
            row["failed"] = _why(timing)
        else:
            row |= {name: round(value, 3) for name, value in asdict(timing).items()}
    return rows, outputs


@contextmanager
def _failing_in(row: Result) -> Iterator[None]:
    """What is raised becomes the row's reason: a baseline that fails at one size must not end the
    run.
    """
    try:
        yield
    except Exception as error:
        row["failed"] = _why(error)


def _first_calls(
    binds: Sequence[Bind], calls: Sequence[Batch], device: torch.device
) -> tuple[list[Timed], torch.Tensor]:
    """Timed every call once, so that whatever it compiles, loads or lets grow is there; returns the
    first's output too.
    """
    runs = [binds[i % len(binds)](call) for i, call in enumerate(calls)]
    with warming_up(device):
        output = runs[0]().clone()
        for run in runs[1:]:
            run()
    return runs, output


def _relative_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    wanted = reference.float()
    return float(f"{((y.float() - wanted).norm() / wanted.norm()).item():.3g}")


def _why(error: Exception) -> str:
    told = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if str(error):
        return told
    where = traceback.extract_tb(error.__traceback__)[-1]  # a bare assertion says nothing else
    return f"{told}{Path(where.filename).name}:{where.lineno} {where.line}"


def roofline(workload: Workload, calls: Sequence[Batch], rates: Rates) -> Result:
    """The least time a call can take here: its bytes at the measured bandwidth or its FLOPs at the
    measured rate, whichever is longer.

    Bytes: the experts that are active, once each, unpadded; the input and the output.
    """
    active = sum(map(active_experts, calls)) / len(calls)
    tokens = len(calls[0].x)
    nbytes = active * workload.expert_bytes + 2 * 2 * tokens * workload.hidden
    by_bytes, by_flops = (
        nbytes / rates.bytes_per_s * 1e6,
        tokens * workload.token_flops() / rates.flops_per_s * 1e6,
    )
    return {
        "active_experts": round(active, 2),
        "roofline_us": round(max(by_bytes, by_flops), 3),
        "bound": "memory" if by_bytes > by_flops else "compute",
    }


def coarse_first(values: Iterable[int]) -> list[int]:
    """The ends, then the middles of what lies between: a run that is cut off leaves points all
    over.
    """
    ordered = sorted(set(values))
    chosen: list[int] = []
    gaps = [(0, len(ordered) - 1)]
    for end in gaps[0]:
        if ordered and ordered[end] not in chosen:
            chosen.append(ordered[end])
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            chosen.append(ordered[middle])
            gaps += [(low, middle), (middle, high)]
    return chosen


def about(device: torch.device, rates: Rates | None = None) -> Result:
    """What was measured, with which software, on what."""
    found: Result = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "versions": {
            "hopper-mxfp4": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        | _versions(),
    }
    if device.type == "cuda":
        found |= {
            "driver": driver_version(),
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        }
    if rates:
        found |= {name: float(f"{value:.4g}") for name, value in asdict(rates).items()}
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in ("flashinfer-python", "vllm", "sglang", "triton", "humming-kernels"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str:
    """The NVIDIA driver's version, "unknown" where nvidia-smi does not say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
