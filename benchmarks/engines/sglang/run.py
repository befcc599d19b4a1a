#!/usr/bin/env python3
"""SGLang servers on one Hopper GPU, this package beside the stock backends, asked over HTTP on one checkpoint.

    run.py FOLDER OUT.json [--modes stock,ours,..] [--limit SECONDS] [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode is `python -m sglang.launch_server`, all of them at once (--at-once N: that many), each killed once it has
answered. The same greedy prompts go to all: one at a time, then all in one request. OUT.json is written anew after every
mode. What a mode has not done by the limit is reported as it stands.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EAGER = ["--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"]
GRAPHS = ["--cuda-graph-bs-decode", "1", "2", "4", "--cuda-graph-bs-prefill", "64", "256"]
OURS = {"HOPPER_MXFP4": "on"}
MODES: dict = {  # flags, variables
    "stock": (EAGER, {}),  # what SGLang takes of itself on Hopper: triton_kernel
    "ours": (EAGER, OURS),
    "stock_graphs": (GRAPHS, {}),
    "ours_graphs": (GRAPHS, OURS),
    "ours_flag": ([*EAGER, "--moe-runner-backend", "hopper_mxfp4"], {}),
    "triton": ([*EAGER, "--moe-runner-backend", "triton"], {}),  # experts unpacked to bf16
    "marlin": ([*EAGER, "--moe-runner-backend", "marlin"], {}),
}
# a share of the memory large enough that servers starting beside each other do not count each other's as missing
COMMON = [
    "--mem-fraction-static",
    "0.6",
    "--max-total-tokens",
    "8192",
    "--max-running-requests",
    "8",
]
COMMON += [
    "--context-length",
    "1024",
    "--chunked-prefill-size",
    "1024",
    "--disable-radix-cache",
    "--disable-flashinfer-autotune",
]
COMMON += ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
COMMON += ["--skip-tokenizer-init", "--skip-server-warmup", "--host", "127.0.0.1"]
PROMPTS = [
    [5, 7, 9, 11, 300, 20],
    list(range(3, 203)),
    [(37 * i) % 1000 + 3 for i in range(64)],
    [9, 8, 7] * 20,
]
TOKENS = 16


def write_plugins(plugins: Path) -> None:
    """This package and the probe as SGLang's plugins, from the working tree."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "sglang.srt.plugins"
    ]
    for name, entries in (
        ("hopper_mxfp4", points),
        ("hopper_mxfp4_probe", {"probe": "probe:register"}),
    ):
        info = plugins / f"{name}-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n"
        )
        (info / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
        )


def environment(folder: Path, mode: str) -> dict:
    paths = [
        folder / "plugins",
        HERE,
        ROOT / "core",
        ROOT / "adapters" / "sglang",
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONUNBUFFERED": "1",
            "PROBE": str(folder / f"{mode}.probe.json"),
            "SGLANG_IS_FLASHINFER_AVAILABLE": "false",  # SGLang's own use of it would compile; this package's kernel does not ask
            "SGLANG_JIT_CACHE_DIR": str(folder / "jit"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "4",
            "CUDA_HOME": os.environ.get("CUDA_HOME") or cuda_home(),
        }
    )


def cuda_home() -> str:
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    return str((nvcc if nvcc.exists() else Path(shutil.which("nvcc") or nvcc).resolve()).parents[1])


def ask(port: int, path: str, body: dict | None = None, timeout: float = 5.0):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def generate(port: int, prompts: list, deadline: float) -> list:
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 5,
    }
    answers = ask(port, "/generate", body, max(1.0, deadline - time.time()))
    steps = [
        [{str(token): p for p, token, _ in step} for step in a["meta_info"]["output_top_logprobs"]]
        for a in answers
    ]
    return [{"tokens": a["output_ids"], "logprobs": s} for a, s in zip(answers, steps, strict=True)]


class Mode:
    def __init__(self, name: str, port: int, folder: Path, deadline: float):
        self.name, self.port, self.folder, self.deadline = name, port, folder, deadline
        self.log, self.result = folder / f"{name}.log", {"mode": name, "stage": "start"}

    def run(self) -> dict:
        flags, variables = MODES[self.name]
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(self.folder / "checkpoint"),
        ]
        command += ["--port", str(self.port), *COMMON, *flags]
        self.result["flags"] = " ".join(flags)
        began = time.time()
        env = environment(self.folder, self.name) | variables
        with self.log.open("w") as stream:
            server = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        try:
            self.until_ready(server, began)
            for stage, groups in (("alone", [[p] for p in PROMPTS]), ("together", [PROMPTS])):
                self.result["stage"], start = stage, time.time()
                for group in groups:
                    self.result.setdefault(stage, []).extend(
                        generate(self.port, group, self.deadline)
                    )
                self.result[f"{stage}_s"] = round(time.time() - start, 1)
            self.result["distinct_tokens"] = len(
                {token for answer in self.result["alone"] for token in answer["tokens"]}
            )  # few: nothing proved
            self.result["stage"] = "done"
            time.sleep(0.6)  # the probe's last word
        except Exception as error:
            self.result["failed"] = f"{type(error).__name__}: {error}"[:300]
        finally:
            kill(server)
            self.result["all_s"] = round(time.time() - began, 1)
            probe = self.folder / f"{self.name}.probe.json"
            if probe.exists():
                self.result["probe"] = json.loads(probe.read_text())
        return self.result

    def until_ready(self, server: subprocess.Popen, began: float) -> None:
        while True:
            try:
                ask(self.port, "/model_info")
                self.result["ready_s"] = round(time.time() - began, 1)
                return
            except OSError:
                if server.poll() is not None or "Received sigquit" in self.log.read_text(
                    errors="replace"
                ):
                    raise RuntimeError("the server died") from None
                if time.time() > self.deadline:
                    raise TimeoutError("not ready at the limit") from None
                time.sleep(0.5)


def kill(server: subprocess.Popen) -> None:
    try:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def compare(first: dict, other: dict) -> dict:
    """How the other's tokens and probabilities lie beside the first's, up to where the tokens part."""
    found: dict = {}
    for stage in ("alone", "together"):
        rows, worst = [], 0.0
        for a, b in zip(first.get(stage, []), other.get(stage, []), strict=False):
            s, t = a["tokens"], b["tokens"]
            at = next((i for i, (x, y) in enumerate(zip(s, t, strict=False)) if x != y), None)
            for p, q in list(zip(a["logprobs"], b["logprobs"], strict=False))[
                : None if at is None else at + 1
            ]:
                worst = max([worst, *(abs(p[k] - q[k]) for k in p.keys() & q.keys())])
            if at is None:
                rows.append("equal" if len(s) == len(t) else f"{len(s)} and {len(t)} tokens")
            else:
                margin = sorted(a["logprobs"][at].values())
                rows.append(
                    f"part at token {at}, where {first['mode']} chose by {margin[-1] - margin[-2]:.4f} nats"
                )
        found[stage] = rows
        found[f"{stage}_largest_logprob_difference"] = round(worst, 4)
    return found


def failure(log: Path) -> list:
    """The first errors of a log, and its end."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [
        line
        for line in lines
        if ("Error" in line or "hopper-mxfp4" in line)
        and line[:1] != " "
        and "Ignore import" not in line
    ]
    return [line[:300] for line in errors[:6] + lines[-12:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--modes", default="stock,ours,stock_graphs,ours_graphs,triton")
    parser.add_argument("--limit", type=float, default=200, help="seconds for everything")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--checkpoint", default="1,2880,2880,32,4")
    args = parser.parse_args()
    deadline = time.time() + args.limit - 8
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.probe.json"):
        stale.unlink()
    sys.path.insert(0, str(ROOT / "core"))
    import torch

    from hopper_mxfp4 import __version__
    from hopper_mxfp4.checkpoint import write_gpt_oss

    sizes = dict(
        zip(
            ("layers", "hidden", "intermediate", "experts", "top_k"),
            map(int, args.checkpoint.split(",")),
            strict=True,
        )
    )
    write_gpt_oss(folder / "checkpoint", **sizes)
    write_plugins(folder / "plugins")
    versions = {"hopper-mxfp4": __version__, "torch": torch.__version__}
    for name in (
        "sglang",
        "sglang-kernel",
        "triton",
        "transformers",
        "flashinfer-python",
        "apache-tvm-ffi",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["sglang-kernel"] += " (its libraries: 0.4.5)"
    print(versions, flush=True)
    report = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": versions,
        "checkpoint": sizes,
    }
    report["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    modes = [
        Mode(name, 31100 + i, folder, deadline) for i, name in enumerate(args.modes.split(","))
    ]
    done: dict = {}
    lock = threading.Lock()

    def run(mode: Mode) -> None:
        result = mode.run()
        with lock:
            done[mode.name] = result
            for (
                name,
                other,
            ) in done.items():  # against stock as it is run, and every other against plain stock
                first = done.get("stock_graphs" if name.endswith("graphs") else "stock")
                if (
                    first is not None
                    and first is not other
                    and {first["stage"], other["stage"]} == {"done"}
                ):
                    other[f"against_{first['mode']}"] = compare(first, other)
            args.out.write_text(
                json.dumps(
                    report | {"modes": [done[m.name] for m in modes if m.name in done]}, indent=1
                )
                + "\n"
            )
            short = {
                k: result.get(k)
                for k in (
                    "stage",
                    "distinct_tokens",
                    "ready_s",
                    "alone_s",
                    "together_s",
                    "all_s",
                    "failed",
                )
                if k in result
            }
            print(f"== {mode.name}", json.dumps(short | {"probe": result.get("probe")}), flush=True)
            if "failed" in result:
                print("\n".join(failure(mode.log)), flush=True)
            elif result.get("alone"):
                print("   tokens", result["alone"][0]["tokens"], flush=True)

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(run, modes))
    for name, result in done.items():
        for key, value in result.items():
            if key.startswith("against_"):
                print(f"{name} {key}: {json.dumps(value)}", flush=True)


if __name__ == "__main__":
    main()
