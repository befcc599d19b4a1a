"""Replay the CUDA graphs of several kernels in random order: does one hang or change?

    python3 benchmarks/checks/graphs_in_any_order.py --workload gpt-oss-20b --tokens 1 8192 \\
        --kernels ours vllm

At each number of tokens all kernels' graphs are alive and take turns, as in `hopper-mxfp4 bench`.
Their outputs are compared with what each gave the first time. Where nothing moves for --stall
seconds, the script asks for a GPU core dump, and cuda-gdb tells which kernel is running. The last
line is JSON: "ok", "hung" or "changed".

--shared-pool captures as bench once did: all graphs from one memory pool, with nothing run before
on the capturing stream. That hung, and this shows it:

    python3 benchmarks/checks/graphs_in_any_order.py --tokens 1 8192 --kernels vllm --shared-pool

The kernel "scratch" is not one: it stands for torch's own fills of memory that is freed again. With
it the hang shows without any kernel of this package:

    python3 benchmarks/checks/graphs_in_any_order.py --tokens 1 8192 --shared-pool \\
        --kernels scratch vllm-marlin
"""

import argparse
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

DUMPS = Path(mkdtemp(prefix="graphs-"))
os.environ |= {
    "CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1",
    "CUDA_COREDUMP_PIPE": str(DUMPS / "pipe"),
    "CUDA_COREDUMP_FILE": str(DUMPS / "core"),
    "CUDA_COREDUMP_GENERATION_FLAGS": "skip_global_memory,skip_local_memory,skip_abort",
}

import torch  # noqa: E402

from hopper_mxfp4.bench.baselines import Bind, Contender, Layer, contenders  # noqa: E402
from hopper_mxfp4.bench.report import names_of  # noqa: E402
from hopper_mxfp4.bench.timing import l2_bytes, round_of, warming_up  # noqa: E402
from hopper_mxfp4.bench.workloads import (  # noqa: E402
    Workload,
    copies_needed,
    copy_weights,
    parse_workload,
    random_weights,
    rotation,
)

COMMANDS = ("info cuda kernels", "info cuda blocks", "info cuda warps", "bt", "x/12i $pc-64")


class Watch(threading.Thread):
    """Ends the process with a report where `moved` is not called for some seconds."""

    def __init__(self, seconds: float):
        super().__init__(daemon=True)
        self.seconds, self.doing = seconds, "starting"
        self.moved("starting", grace=600)
        self.start()

    def moved(self, doing: str, grace: float = 0) -> None:
        self.doing, self.limit = doing, time.monotonic() + max(self.seconds, grace)

    def run(self) -> None:
        while time.monotonic() < self.limit:
            time.sleep(0.2)
        doing = self.doing
        print(f"nothing moved for {self.seconds} s: {doing}", flush=True)
        dump()
        print(json.dumps({"outcome": "hung", "doing": doing}), flush=True)
        os._exit(3)


def dump() -> None:
    pipes, cores = list(DUMPS.glob("pipe*")), []
    if pipes:
        with open(pipes[0], "wb", buffering=0) as pipe:
            pipe.write(b"1")
        for _ in range(100):
            time.sleep(0.3)
            cores = list(DUMPS.glob("core*"))
            if cores and cores[0].stat().st_size and time.time() - cores[0].stat().st_mtime > 3:
                break
    for core in cores[:1]:
        asked = [part for command in COMMANDS for part in ("-ex", command)]
        command = ["cuda-gdb", "-batch", "-ex", f"target cudacore {core}", *asked]
        told = subprocess.run(command, capture_output=True, text=True, timeout=90)
        print(told.stdout[-6000:], told.stderr[-1000:], flush=True)
    if not cores:
        print(f"no core dump came; pipes {pipes}", flush=True)


def sharing_a_pool(device: torch.device) -> Callable[[list], Callable]:
    """Capture as bench did when it hung."""
    stream, first = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        first.capture_begin()
        torch.zeros(1, device=device)
        first.capture_end()

    def capture(calls: list) -> Callable:
        assert first  # lives as long as the pool is used
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=first.pool(), capture_error_mode="thread_local")
            for call in calls:
                call()
            graph.capture_end()
        return graph.replay

    return capture


def scratch(layer: Layer) -> Bind:
    """Write and free memory of many sizes, as any kernel does that allocates what it needs."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for power in range(9, 24):
            torch.full((1 << power,), 7, dtype=torch.uint8, device=x.device)
        return x

    return lambda call: partial(run, call.x)


def copies(workload: Workload, device: torch.device) -> list[Layer]:
    """A layer, so often that its weights have left the L2 cache when their turn comes again."""
    weights = random_weights(workload, device)
    others = range(copies_needed(workload, l2_bytes(device)) - 1)
    return [Layer(workload, weights), *(Layer(workload, copy_weights(weights)) for _ in others)]


def differs(y: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether by more than another order of summation explains."""
    return not ((y.float() - first.float()).norm() <= 1e-2 * first.float().norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="gpt-oss-20b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8192])
    parser.add_argument("--routing", default="uniform")
    parser.add_argument(
        "--kernels", nargs="*", default=[], help="beginnings of names, in the order of capture"
    )
    parser.add_argument("--without", nargs="*", default=[], help="names to leave out")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--burst", type=int, default=20, help="most replays in a row")
    parser.add_argument("--stall", type=float, default=20)
    parser.add_argument("--shared-pool", action="store_true")
    options = parser.parse_args()
    device, workload = torch.device("cuda", 0), parse_workload(options.workload)
    known = [c for c in contenders(device) if not c.slow and c.name not in options.without]
    known.append(Contender("scratch", False, scratch))
    names_of(options.kernels, [c.name for c in known], "kernel")  # refuses what fits none
    chosen = [c for start in options.kernels or [""] for c in known if c.name.startswith(start)]
    watch, order = Watch(options.stall), random.Random(0)
    capture = (
        sharing_a_pool(device) if options.shared_pool else (lambda runs: round_of(runs, device))
    )
    warm = nullcontext if options.shared_pool else partial(warming_up, device)
    changed: dict[str, int] = {}
    begin = time.monotonic()
    with torch.inference_mode():
        layers, binds = copies(workload, device), {}
        for c in chosen:
            watch.moved(f"building {c.name}", grace=300)
            try:
                binds[c.name] = [c.build(layer) for layer in layers]
            except Exception as error:
                print(f"{c.name} is absent: {type(error).__name__}: {error}"[:300], flush=True)
        for tokens in options.tokens:
            calls = rotation(workload, tokens, options.routing, device, l2_bytes(device))
            runs, graphs, outputs, firsts = {}, {}, {}, {}
            for name, layer_binds in binds.items():
                watch.moved(f"first calls of {name} at {tokens} tokens", grace=300)
                runs[name] = [layer_binds[i % len(layer_binds)](c) for i, c in enumerate(calls)]
                with warm():
                    for run in runs[name]:
                        run()
                torch.cuda.synchronize()
            for name in runs:
                outputs[name] = []
                graphs[name] = capture(
                    [lambda run=run, to=outputs[name]: to.append(run()) for run in runs[name]]
                )
            for number in range(options.rounds):
                for name in order.sample(sorted(graphs), len(graphs)):
                    count = order.randint(1, options.burst)
                    for _ in range(count):
                        graphs[name]()
                    done = torch.cuda.Event()
                    done.record()
                    watch.moved(f"{tokens} tokens, round {number}: {count} replays of {name}")
                    while not done.query():
                        time.sleep(0.0005)
                    y = outputs[name][-1]
                    if name not in firsts:
                        firsts[name] = y.clone()
                    elif differs(y, firsts[name]):
                        changed[name] = changed.get(name, 0) + 1
    told = {
        "outcome": "changed" if changed else "ok",
        "changed": changed,
        "kernels": sorted(binds),
        "workload": workload.name,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "shared_pool": options.shared_pool,
        "seconds": round(time.monotonic() - begin, 1),
        "device": torch.cuda.get_device_name(device),
    }
    print(json.dumps(told), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
