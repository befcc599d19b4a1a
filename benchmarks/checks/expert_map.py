"""What it saves that kernels read the expert map themselves: a decode step of one rank's layer.

    python3 benchmarks/checks/expert_map.py

A rank of --ep has every ep-th part of a model's experts and all ranks' tokens, with global ids. Its
layer is timed, as a CUDA graph of layers whose weights have left the L2 cache, with

- torch: what vLLM's `Experts.apply` did before: the map applied by torch's operators, then the
  kernel with local ids;
- map: what it does now: the kernel is handed global ids and the map;
- local: the kernel with local ids that were there before, which no way can beat.

They take turns in random order. Medians a layer, in microseconds; the last line is JSON. All three
must give the same bytes.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

from hopper_mxfp4 import PreparedExperts, fused_moe, prepare_experts
from hopper_mxfp4.bench.timing import (
    l2_bytes,
    round_of,
    time_beside,
    timings_or_raise,
    warming_up,
)
from hopper_mxfp4.bench.workloads import (
    Batch,
    Workload,
    copies_needed,
    make_batch,
    parse_workload,
    random_weights,
)

CALLS = 32  # of a round


def local_ids(ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """As `Experts.apply` had it."""
    return torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])


def by_torch(call: Batch, p: PreparedExperts, expert_map: torch.Tensor) -> torch.Tensor:
    return fused_moe(call.x, local_ids(call.ids, expert_map), call.weights, p)


def by_map(call: Batch, p: PreparedExperts, expert_map: torch.Tensor) -> torch.Tensor:
    return fused_moe(call.x, call.ids, call.weights, p, expert_map=expert_map)


def with_local_ids(call: Batch, p: PreparedExperts, local: torch.Tensor) -> torch.Tensor:
    return fused_moe(call.x, local, call.weights, p)


def layers_of(
    workload: Workload, ep: int, kernel: str, device: torch.device
) -> list[PreparedExperts]:
    """One rank's layer, as often as it takes for the first to have left the L2 cache."""
    own = replace(workload, experts=workload.experts // ep)
    return [
        prepare_experts(
            random_weights(own, device, seed),
            family=own.family,
            swiglu=own.swiglu,
            kernel=kernel,
            ep_size=ep,
            deterministic=True,  # so that outputs can be compared whatever the kernel
        )
        for seed in range(copies_needed(own, l2_bytes(device)))
    ]


def rounds_of(
    layers: list[PreparedExperts],
    calls: list[Batch],
    expert_map: torch.Tensor,
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    """A round of each way, after its calls ran once. Raises AssertionError where two ways'
    outputs differ.
    """
    ways: dict[str, list[Callable[[], torch.Tensor]]] = {"torch": [], "map": [], "local": []}
    for i, call in enumerate(calls):
        p = layers[i % len(layers)]
        ways["torch"].append(partial(by_torch, call, p, expert_map))
        ways["map"].append(partial(by_map, call, p, expert_map))
        ways["local"].append(partial(with_local_ids, call, p, local_ids(call.ids, expert_map)))
    with warming_up(device):
        for one, *others in zip(*ways.values(), strict=True):
            y = one()
            assert all(torch.equal(other(), y) for other in others)
    return {name: round_of(runs, device) for name, runs in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", default=["gpt-oss-120b", "dsv4-flash"])
    parser.add_argument("--ep", type=int, default=8, help="ranks")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way and batch")
    parser.add_argument("--kernel", default="auto")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = []
    for name in options.workload:
        workload = parse_workload(name)
        layers = layers_of(workload, options.ep, options.kernel, device)
        own = layers[0].shape.num_experts
        expert_map = torch.full((workload.experts,), -1, dtype=torch.int32, device=device)
        expert_map[own : 2 * own] = torch.arange(own, dtype=torch.int32, device=device)
        print(f"{name}, rank 1 of {options.ep}: {own} of {workload.experts} experts", flush=True)
        print(f"{'tokens':>8}{'torch':>9}{'map':>9}{'local':>9}{'saved':>9}", flush=True)
        for tokens in options.tokens:
            calls = [make_batch(workload, tokens, "uniform", device, n) for n in range(CALLS)]
            rounds = rounds_of(layers, calls, expert_map, device)
            timings = timings_or_raise(
                time_beside(list(rounds.values()), CALLS, device, options.seconds)
            )
            by_name = dict(zip(rounds, timings, strict=True))
            medians = [timing.us for timing in timings]
            saved = by_name["torch"].us - by_name["map"].us
            print(f"{tokens:8}" + "".join(f"{us:9.2f}" for us in (*medians, saved)), flush=True)
            found.append(
                {"workload": name, "ep": options.ep, "tokens": tokens}
                | {way: asdict(timing) for way, timing in by_name.items()}
            )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": where, "kernel": layers[0].kernel.name, "layers": found}))


if __name__ == "__main__":
    main()
