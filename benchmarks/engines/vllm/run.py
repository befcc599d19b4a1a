#!/usr/bin/env python3
"""Whole vLLM engines on Hopper, this package beside the stock backends, on one checkpoint.

    run.py FOLDER OUT.json [--modes marlin,ours,..] [--at-once 1] [--limit 600]
                           [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode (engine.py lists them) is an engine in a process of its own, or several with data
parallelism. It reports its greedy tokens, the logits of every prompt position where one process has
them all, load time, peak memory while loading, and how often this package's kernel was called (or
captured). Each is compared with the modes that engine.py names for it, of those that ran: where
tokens part, the report says by how much the other preferred its own.

Modes run side by side, each GPU with --at-once engines at most. Those that need most GPUs start
first. What is not done after --limit seconds is ended, as are all processes of a mode one of whose
processes failed.

Where there are fewer GPUs than tensor-parallel ranks, the ranks share one, and gloo adds up their
parts through the host, since NCCL takes one rank per GPU. Without any GPU, vLLM's CPU engine runs
what it can of it: modes of ours, eager, on a small --checkpoint.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
import rig
from engine import MODES
from tokens import compare_results, logits_beside

ENGINE = Path(__file__).resolve().parent / "engine.py"
TESTS = Path(__file__).resolve().parents[3] / "tests"
SHOWN = 1500  # characters of a mode's result on the terminal


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Gpus:
    """Which GPUs have room for another engine. Each has room for `at_once`."""

    def __init__(self, names: list[str], at_once: int):
        self.room = dict.fromkeys(names, at_once)
        self.changed = threading.Condition()

    def take(self, count: int, timeout: float) -> list[str]:
        """That many different ones, those with most room, once there are as many with some.

        None of them where there are not enough within the timeout, in seconds.
        """
        with self.changed:
            enough = lambda: sum(map(bool, self.room.values())) >= count  # noqa: E731
            if not self.changed.wait_for(enough, timeout):
                return []
            taken = sorted(self.room, key=self.room.get, reverse=True)[:count]
            for name in taken:
                self.room[name] -= 1
            return sorted(taken)

    def give_back(self, names: list[str]) -> None:
        with self.changed:
            for name in names:
                self.room[name] += 1
            self.changed.notify_all()


class Rig:
    def __init__(self, folder: Path, at_once: int, limit: float):
        import torch

        self.folder, self.end = folder, time.monotonic() + limit
        self.on_gpu = torch.cuda.is_available()
        every = ",".join(map(str, range(torch.cuda.device_count() or 1)))
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or every
        self.gpus = Gpus(names.split(","), at_once)
        self.gpu_count = len(self.gpus.room)

    def checkpoint(self, mode: str) -> Path:
        return self.folder / MODES[mode].checkpoint

    def file(self, mode: str) -> Path:
        return self.folder / f"{mode}.json"

    def left(self) -> float:
        """Seconds for what still runs."""
        return max(0.0, self.end - time.monotonic())

    def run(self, mode: str) -> dict:
        """Run a mode's processes to their end, once there are GPUs for it."""
        wanted = MODES[mode].gpus
        shares = wanted > self.gpu_count
        taken = self.gpus.take(1 if shares else wanted, self.left())
        if not taken:
            return {"mode": mode, "failed": "there was no time left to start it"}
        began = time.time()
        try:
            if MODES[mode].engines > 1 and (not shares or not self.on_gpu):
                result = self._run_parallel(mode, taken)
            elif shares and self.on_gpu:
                result = self._run(mode, self._ranks_of_one_gpu(wanted, taken[0]))
            else:
                result = self._run(mode, [self._place(taken)])
        finally:
            self.gpus.give_back(taken)
        print(f"{mode} done in {time.time() - began:.0f} s on GPU {','.join(taken)}", flush=True)
        return result

    def _run_parallel(self, mode: str, gpus: list[str]) -> dict:
        """Data-parallel engines: each answers every so manieth prompt, in a file of its own."""
        count = MODES[mode].engines
        meet = {
            "VLLM_DP_SIZE": str(count),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(free_port()),
        }
        places = [self._place(gpus) | meet | {"VLLM_DP_RANK": str(rank)} for rank in range(count)]
        files = [self.folder / f"{mode}.{rank}.json" for rank in range(count)]
        failed = self._processes(mode, places, files)
        if failed:
            return failed
        if logits_beside(files[0]).exists():  # each engine saw all of them
            logits_beside(files[0]).replace(logits_beside(self.file(mode)))
        result = merged([json.loads(file.read_text()) for file in files])
        self.file(mode).write_text(json.dumps(result))
        return result

    def _run(self, mode: str, places: list[dict[str, str]]) -> dict:
        failed = self._processes(mode, places, [self.file(mode)] * len(places))
        return failed or json.loads(self.file(mode).read_text())

    def _processes(self, mode: str, places: list[dict[str, str]], files: list[Path]) -> dict | None:
        """Start an engine for each of the places, which are environments; what failed, if so."""
        log = self.folder / f"{mode}.log"
        for file in (*files, self.file(mode)):
            file.unlink(missing_ok=True)
            logits_beside(file).unlink(missing_ok=True)
        with log.open("w") as stream:
            started = [
                subprocess.Popen(
                    [sys.executable, ENGINE, mode, self.checkpoint(mode), file],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | place,
                    start_new_session=True,
                )
                for place, file in zip(places, files, strict=True)
            ]
            why = wait_for(started, self.left)
        missing = [file.name for file in files if not file.exists()]
        if why or missing:
            return {"mode": mode, "failed": f"{why or missing}: {log.read_text()[-3000:]}"}
        return None

    def _place(self, gpus: list[str]) -> dict[str, str]:
        if self.on_gpu:
            return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        path = [str(TESTS / "vllm"), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(path)}

    def _ranks_of_one_gpu(self, count: int, gpu: str) -> list[dict[str, str]]:
        meet = {
            "CUDA_VISIBLE_DEVICES": gpu,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": "0",
        }
        return [meet | {"RANK": str(rank)} for rank in range(count)]


def wait_for(started: list[subprocess.Popen], left: Callable[[], float]) -> str | None:
    """Until all processes ended. Where one fails or no time is left, the others are ended too, with
    those that they started; returns which it was. left: seconds until then, asked again and again.
    """
    why, codes = None, [None]
    while why is None and None in codes:
        codes = [process.poll() for process in started]
        if failed := [code for code in codes if code]:
            why = f"ended with status {failed[0]}"
        elif not left():
            why = "took longer than there was time"
        elif None in codes:
            time.sleep(0.1)
    if why:
        for process in started:
            try:  # its workers, too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
    return why


def merged(parts: list[dict]) -> dict:
    """One result of those of data-parallel engines, of which each answered its own prompts."""
    answers = [None] * sum(len(part["answers"]) for part in parts)
    for rank, part in enumerate(parts):
        answers[rank :: len(parts)] = part["answers"]
    of_all = {name: [rank for part in parts for rank in part[name]] for name in ("layers", "calls")}
    return parts[0] | of_all | {"answers": answers, "engines": len(parts)}


def write_checkpoints(folder: Path, modes: list[str], sizes: dict[str, int]) -> dict[str, dict]:
    """Those that the modes read. Returns the sizes of each."""
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    kinds = {MODES[mode].checkpoint for mode in modes}
    if "gpt-oss" in kinds:
        write_gpt_oss(folder / "gpt-oss", **sizes)
    if "qwen3-moe" in kinds:
        sys.path.insert(0, str(TESTS / "checkpoints"))
        from moe_checkpoints import compressed_tensors, write

        write(folder / "qwen3-moe", compressed_tensors(), vocabulary=1024)
    if "deepseek-v4" in kinds and not (folder / "deepseek-v4" / "config.json").exists():
        raise SystemExit("benchmarks/engines/deepseek_v4/run.sh makes that checkpoint")
    return {kind: rig.sizes_of(folder / kind) for kind in sorted(kinds)}


def main() -> None:
    parser = rig.parser(
        __doc__, "marlin,ours,marlin_graphs,ours_graphs,triton,flashinfer_cutlass,ours_sleep"
    )
    parser.add_argument("--at-once", type=int, default=1, help="engines on a GPU")
    parser.add_argument("--limit", type=float, default=600, help="seconds for everything")
    args = parser.parse_args()
    modes = args.modes.split(",")
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        parser.error(f"no modes {unknown}; there are {', '.join(MODES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    here = Rig(args.folder, args.at_once, args.limit)
    # So that no engine stays behind on a GPU.
    signal.signal(signal.SIGTERM, lambda *which: setattr(here, "end", 0))
    checkpoints = write_checkpoints(here.folder, modes, args.checkpoint)
    report = rig.report(("vllm", "flashinfer-python"), checkpoints)
    results: dict[str, dict] = {}

    def compare_all() -> None:
        for mode, result in results.items():
            for other in MODES[mode].against:
                both = (results.get(other), result)
                name = f"against_{other}"
                if None in both or name in result or any("failed" in one for one in both):
                    continue
                result[name] = compare_results(here.file(other), here.file(mode))
                print(mode, name, json.dumps(result[name]), flush=True)

    most_first = sorted(modes, key=lambda mode: -MODES[mode].gpus)
    with ThreadPoolExecutor(len(modes)) as pool:
        running = {}
        for mode in most_first:
            running[pool.submit(here.run, mode)] = mode
        for done in as_completed(running):
            mode = running[done]
            results[mode] = done.result()
            told = {k: v for k, v in results[mode].items() if k not in ("answers", "mode")}
            print(mode, json.dumps(told)[:SHOWN], flush=True)
            compare_all()
            # After each, so that a run cut short has shown something.
            ran = [results[mode] for mode in modes if mode in results]
            args.out.write_text(json.dumps(report | {"modes": ran}, indent=1) + "\n")
    failed = [mode for mode in modes if "failed" in results[mode]]
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
