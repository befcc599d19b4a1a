#!/usr/bin/env python3
"""SGLang servers on Hopper GPUs, this package beside the stock backends, on one checkpoint.

    run.py FOLDER OUT.json [--modes stock,ours,..] [--limit SECONDS] [--gpus N]
                           [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode is one engine (modes.py), all of them at once (--at-once N: that many), dealt out over the
GPUs, each killed once it has answered. All are asked over HTTP for the same greedy tokens: one
prompt at a time, then all in one request. What a mode has not done by the limit is reported as it
stands.
"""

import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import rig
from modes import DEFAULT, MODES, place, references
from servers import (
    ROOT,
    Process,
    ask,
    first_errors,
    probes,
    read_probes,
    start,
    write_plugins,
)
from tokens import NEW_TOKENS, PROMPTS, TOP_LOGPROBS, Answer, compare, distinct_tokens

PACKAGES = (
    "sglang",
    "sglang-kernel",
    "triton",
    "transformers",
    "flashinfer-python",
    "apache-tvm-ffi",
)
SHOWN = ("stage", "gpus", "distinct_tokens", "ready_s", "alone_s", "together_s", "all_s", "failed")


def generate(port: int, prompts: list[list[int]], deadline: float) -> list[Answer]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP_LOGPROBS,
    }
    return [
        answer_of(given) for given in ask(port, "/generate", body, max(1.0, deadline - time.time()))
    ]


def answer_of(given: dict) -> Answer:
    return {
        "tokens": given["output_ids"],
        "logprobs": [
            {str(token): logprob for logprob, token, _ in step}
            for step in given["meta_info"]["output_top_logprobs"]
        ],
    }


class Run:
    """One mode from its start to its end."""

    def __init__(self, name: str, number: int, gpus: list[int], folder: Path, deadline: float):
        self.name, self.number, self.gpus = name, number, gpus
        self.folder, self.deadline = folder, deadline
        self.processes: list[Process] = []
        self.result: dict = {"mode": name, "stage": "start", "gpus": gpus}

    def run(self, more: tuple[str, ...]) -> dict:
        mode = MODES[self.name]
        self.result["flags"] = " ".join((*mode.flags, *more))
        if mode.decode is not None:
            self.result["transfer"] = mode.transfer
        began = time.time()
        try:
            self.processes = start(self.name, mode, self.gpus, self.number, self.folder, more)
            for process in self.processes:
                process.until_ready(self.deadline)
            self.result["ready_s"] = round(time.time() - began, 1)
            self.ask_all()
            self.result["stage"] = "done"
            time.sleep(0.6)  # the probe writes every half second
        except Exception as error:
            self.result["failed"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            for process in self.processes:
                process.kill()
            self.result["all_s"] = round(time.time() - began, 1)
            self.result["probes"] = read_probes(self.folder, self.name)
        return self.result

    def ask_all(self) -> None:
        port = self.processes[-1].port
        for stage, groups in (("alone", [[p] for p in PROMPTS]), ("together", [PROMPTS])):
            self.result["stage"], began = stage, time.time()
            answers = self.result.setdefault(stage, [])
            for group in groups:
                answers.extend(generate(port, group, self.deadline))
            self.result[f"{stage}_s"] = round(time.time() - began, 1)
        self.result["distinct_tokens"] = distinct_tokens(self.result["alone"])

    def show(self) -> None:
        short = {key: self.result[key] for key in SHOWN if key in self.result}
        print(f"== {self.name}", json.dumps(short), flush=True)
        for probe in self.result["probes"]:
            print("   scheduler", json.dumps(probe), flush=True)
        if "failed" in self.result:
            for process in self.processes:
                print(f"   {process.log.name}", *first_errors(process.log), sep="\n", flush=True)
        elif self.result.get("alone"):
            print("   tokens", self.result["alone"][0]["tokens"], flush=True)


def compare_all(done: dict[str, dict]) -> None:
    """Each mode with its references, as `against_` their names."""
    finished = {name for name, result in done.items() if result["stage"] == "done"}
    for name in finished:
        for first in references(name, finished):
            done[name][f"against_{first}"] = {
                stage: compare(done[first][stage], done[name][stage], first)
                for stage in ("alone", "together")
            }


def main() -> None:
    parser = rig.parser(__doc__, DEFAULT)
    parser.add_argument("--limit", type=float, default=200, help="seconds for everything")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--gpus", type=int, help="how many to use; all, unless given")
    parser.add_argument("--flags", default="", help="for every server, after its own")
    args = parser.parse_args()
    deadline = time.time() + args.limit - 8
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "core"))
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    report = rig.report(PACKAGES, args.checkpoint)
    report["versions"]["sglang-kernel"] += " (its libraries: 0.4.5)"
    names = args.modes.split(",")
    places = place(names, args.gpus or max(len(report["gpus"]), 1))
    write_gpt_oss(folder / "checkpoint", **args.checkpoint)
    write_plugins(folder / "plugins")
    for name in names:
        shutil.rmtree(probes(folder, name), ignore_errors=True)
        probes(folder, name).mkdir()
    print(report["versions"], report["gpus"], flush=True)
    runs = [Run(name, i, places[name], folder, deadline) for i, name in enumerate(names)]
    done: dict[str, dict] = {}
    lock = threading.Lock()

    def run(one: Run) -> None:
        result = one.run(tuple(args.flags.split()))
        with lock:
            done[one.name] = result
            compare_all(done)
            results = [done[name] for name in names if name in done]
            args.out.write_text(json.dumps(report | {"modes": results}, indent=1) + "\n")
            one.show()

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(run, runs))
    for name, result in done.items():
        for key, value in result.items():
            if key.startswith("against_"):
                print(f"{name} {key}: {json.dumps(value)}", flush=True)


if __name__ == "__main__":
    main()
