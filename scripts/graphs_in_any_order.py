"""Replay the CUDA graphs of several kernels in random order and see whether one hangs or changes.

    python3 scripts/graphs_in_any_order.py --body gpt-oss-20b --tokens 8192 --kernels ours vllm-triton

Every kernel's graph stays alive, as they did in `hopper-mxfp4 bench` when GPT-OSS hung on an H100. After each
replay of the graph of a kernel, its output is compared with what it gave the first time. Where nothing moves
for --stall seconds, a GPU core dump is asked for, which tells the kernel that is running; cuda-gdb
reads it. The last line is JSON: "ok", "hung", or how many outputs changed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
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

from hopper_mxfp4.bench.bodies import parse_body, rotation  # noqa: E402
from hopper_mxfp4.bench.peers import contenders  # noqa: E402
from hopper_mxfp4.bench.report import names_of  # noqa: E402
from hopper_mxfp4.bench.run import _layers  # noqa: E402
from hopper_mxfp4.bench.timing import l2_bytes, round_of  # noqa: E402

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", default="gpt-oss-20b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--kernels", nargs="*", default=[])
    parser.add_argument("--without", nargs="*", default=[], help="names to leave out")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--burst", type=int, default=20, help="most replays in a row")
    parser.add_argument("--stall", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device, body = torch.device("cuda", 0), parse_body(options.body)
    known = [c for c in contenders(device) if not c.slow and c.name not in options.without]
    wanted = names_of(options.kernels, [c.name for c in known], "kernel")
    watch = Watch(options.stall)
    with torch.inference_mode():
        layers = _layers(body, device)
        calls = rotation(body, options.tokens, options.routing, device, l2_bytes(device))
        graphs, outputs, firsts = {}, {}, {}
        for c in known:
            if c.name not in wanted:
                continue
            watch.moved(f"building {c.name}", grace=300)
            try:
                binds = [c.build(layer) for layer in layers]
            except Exception as error:
                print(f"{c.name} is absent: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            runs = [binds[i % len(binds)](call) for i, call in enumerate(calls)]
            for run in runs:
                run()
            torch.cuda.synchronize()
            graphs[c.name] = runs
        kept = {}
        for name, runs in graphs.items():
            watch.moved(f"capturing {name}", grace=60)
            results: list[torch.Tensor] = []
            graph = round_of([lambda run=run, to=results: to.append(run()) for run in runs], device)
            kept[name], outputs[name] = graph, results
            graph()
            torch.cuda.synchronize()
            firsts[name] = results[0].clone()
            watch.moved(f"captured {name}")
        order, changed, bursts = random.Random(options.seed), {}, 0
        names = sorted(kept)
        begin = time.monotonic()
        for number in range(options.rounds):
            for name in order.sample(names, len(names)):
                count = order.randint(1, options.burst)
                for _ in range(count):
                    kept[name]()
                done = torch.cuda.Event()
                done.record()
                watch.moved(f"round {number}: {count} replays of {name}")
                while not done.query():
                    time.sleep(0.0005)
                if not torch.equal(outputs[name][0], firsts[name]):
                    changed[name] = changed.get(name, 0) + 1
                bursts += 1
    told = {
        "outcome": "ok" if not changed else "changed",
        "changed": changed,
        "kernels": names,
        "body": body.name,
        "tokens": options.tokens,
        "bursts": bursts,
        "seconds": round(time.monotonic() - begin, 1),
        "device": torch.cuda.get_device_name(device),
    }
    print(json.dumps(told), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
