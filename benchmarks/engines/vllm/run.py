#!/usr/bin/env python3
"""Whole vLLM engines on Hopper, this package beside the stock backends, on one checkpoint.

    run.py FOLDER OUT.json [--modes marlin,ours,..]
                           [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode (engine.py lists them) is an engine in a process of its own. It reports its greedy tokens,
the logits of every prompt position, load time, peak memory while loading, and how often this
package's kernel was called (or captured). Modes of one GPU run side by side on as many as there
are. Each is compared with Marlin in the same mode; where tokens part, the report says by how much
Marlin preferred its own.

Where there are fewer GPUs than ranks, the ranks share one, and gloo adds up their parts through the
host, since NCCL takes one rank per GPU.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
import rig
from engine import MODES
from tokens import compare_results

ENGINE = Path(__file__).resolve().parent / "engine.py"
# Compiled with compiled: torch.compile rounds at other places than the eager model.
AGAINST = {"ours_graphs": "marlin_graphs"}
SHOWN = 1200  # characters of a mode's result on the terminal


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(mode: str) -> int:
    return MODES[mode].get("tensor_parallel_size", 1)


class Rig:
    def __init__(self, folder: Path):
        import torch

        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.gpu_count = torch.cuda.device_count()
        every = ",".join(map(str, range(self.gpu_count)))
        self.gpus: queue.Queue = queue.Queue()
        for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(","):
            self.gpus.put(gpu)

    def file(self, mode: str) -> Path:
        return self.folder / f"{mode}.json"

    def run(self, mode: str) -> dict:
        """Run a mode's processes to their end. One of a single GPU waits until one is free."""
        began = time.time()
        if ranks(mode) == 1:
            gpu = self.gpus.get()
            try:
                result = self._run(mode, [{"CUDA_VISIBLE_DEVICES": gpu}])
            finally:
                self.gpus.put(gpu)
        elif ranks(mode) > self.gpu_count:
            result = self._run(mode, self._ranks_of_one_gpu(ranks(mode)))
        else:
            result = self._run(mode, [{}])
        print(f"{mode} done in {time.time() - began:.0f} s", flush=True)
        return result

    def _run(self, mode: str, places: list[dict[str, str]]) -> dict:
        """places: the environment variables of each process."""
        log, file = self.folder / f"{mode}.log", self.file(mode)
        file.unlink(missing_ok=True)
        command = [sys.executable, ENGINE, mode, self.checkpoint, file]
        with log.open("w") as stream:
            started = [
                subprocess.Popen(
                    command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | place
                )
                for place in places
            ]
            codes = [process.wait() for process in started]
        if any(codes) or not file.exists():
            return {"mode": mode, "failed": log.read_text()[-1500:]}
        return json.loads(file.read_text())

    def _ranks_of_one_gpu(self, count: int) -> list[dict[str, str]]:
        meet = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": "0",
        }
        return [meet | {"RANK": str(rank)} for rank in range(count)]


def main() -> None:
    parser = rig.parser(
        __doc__, "marlin,ours,marlin_graphs,ours_graphs,triton,flashinfer_cutlass,ours_sleep"
    )
    args = parser.parse_args()
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    here = Rig(args.folder)
    write_gpt_oss(here.checkpoint, **args.checkpoint)
    report = rig.report(("vllm", "flashinfer-python"), args.checkpoint)
    results: dict[str, dict] = {}

    def finish(mode: str) -> None:
        result = results[mode]
        first = results.get(AGAINST.get(mode, "marlin"), results.get("ours", result))
        if first is not result and "failed" not in result and "failed" not in first:
            against = compare_results(here.file(first["mode"]), here.file(mode))
            result[f"against_{first['mode']}"] = against
        shown = {k: v for k, v in result.items() if k not in ("answers", "mode")}
        print(mode, json.dumps(shown)[:SHOWN], flush=True)
        # After each, so that a run cut short has shown something.
        args.out.write_text(json.dumps(report | {"modes": list(results.values())}, indent=1) + "\n")

    modes = args.modes.split(",")
    single = [mode for mode in modes if ranks(mode) == 1]
    with ThreadPoolExecutor(here.gpus.qsize()) as pool:
        results.update(zip(single, pool.map(here.run, single), strict=True))
    for mode in single:
        finish(mode)
    for mode in modes:
        if mode not in single:
            results[mode] = here.run(mode)
            finish(mode)


if __name__ == "__main__":
    main()
