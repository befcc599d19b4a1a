#!/usr/bin/env python3
"""SGLang servers on one Hopper GPU, this package beside the stock backends, on one checkpoint.

    run.py FOLDER OUT.json [--modes stock,ours,..] [--limit SECONDS]
                           [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode is `python -m sglang.launch_server`, all of them at once (--at-once N: that many), each
killed once it has answered. All are asked over HTTP for the same greedy tokens: one prompt at a
time, then all in one request. What a mode has not done by the limit is reported as it stands.
"""

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
import rig
from tokens import NEW_TOKENS, PROMPTS, TOP_LOGPROBS, Answer, compare, distinct_tokens

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
EAGER = ["--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"]
GRAPHS = ["--cuda-graph-bs-decode", "1", "2", "4", "--cuda-graph-bs-prefill", "64", "256"]
OURS = {"HOPPER_MXFP4": "on"}
MODES: dict[str, tuple[list[str], dict[str, str]]] = {  # flags, variables
    "stock": (EAGER, {}),  # what SGLang takes of itself on Hopper: triton_kernel
    "ours": (EAGER, OURS),
    "stock_graphs": (GRAPHS, {}),
    "ours_graphs": (GRAPHS, OURS),
    "ours_flag": ([*EAGER, "--moe-runner-backend", "hopper_mxfp4"], {}),
    "triton": ([*EAGER, "--moe-runner-backend", "triton"], {}),  # experts unpacked to bf16
    "marlin": ([*EAGER, "--moe-runner-backend", "marlin"], {}),
}
# Servers that start side by side take each other's memory for missing. A share this large, with a
# small pool of tokens, keeps each of them satisfied.
COMMON = [
    *("--mem-fraction-static", "0.6"),
    *("--max-total-tokens", "8192"),
    *("--max-running-requests", "8"),
    *("--context-length", "1024"),
    *("--chunked-prefill-size", "1024"),
    *("--attention-backend", "triton"),
    *("--sampling-backend", "pytorch"),
    *("--host", "127.0.0.1"),
    "--disable-radix-cache",
    "--disable-flashinfer-autotune",
    "--skip-tokenizer-init",
    "--skip-server-warmup",
]
FIRST_PORT = 31100
PACKAGES = (
    "sglang",
    "sglang-kernel",
    "triton",
    "transformers",
    "flashinfer-python",
    "apache-tvm-ffi",
)
SHOWN = ("stage", "distinct_tokens", "ready_s", "alone_s", "together_s", "all_s", "failed")


def write_plugins(plugins: Path) -> None:
    """This package and the probe as SGLang's plugins, from the working tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = project["entry-points"]["sglang.srt.plugins"]
    for name, entries in (
        ("hopper_mxfp4", ours),
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


def environment(folder: Path, mode: str) -> dict[str, str]:
    paths = [folder / "plugins", HERE, ROOT / "core", ROOT / "adapters" / "sglang"]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "PROBE": str(folder / f"{mode}.probe.json"),
        # SGLang's own uses of FlashInfer would have to compile. This package's kernel does not ask.
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        "SGLANG_JIT_CACHE_DIR": str(folder / "jit"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "4",
        "CUDA_HOME": os.environ.get("CUDA_HOME") or cuda_home(),
    }


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


def generate(port: int, prompts: list[list[int]], deadline: float) -> list[Answer]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP_LOGPROBS,
    }
    answers = ask(port, "/generate", body, max(1.0, deadline - time.time()))
    return [
        {
            "tokens": answer["output_ids"],
            "logprobs": [
                {str(token): logprob for logprob, token, _ in step}
                for step in answer["meta_info"]["output_top_logprobs"]
            ],
        }
        for answer in answers
    ]


class Mode:
    def __init__(self, name: str, port: int, folder: Path, deadline: float):
        self.name, self.port, self.folder, self.deadline = name, port, folder, deadline
        self.log = folder / f"{name}.log"
        self.result: dict = {"mode": name, "stage": "start"}

    def run(self) -> dict:
        flags, variables = MODES[self.name]
        model = ["--model-path", str(self.folder / "checkpoint"), "--port", str(self.port)]
        command = [sys.executable, "-m", "sglang.launch_server", *model, *COMMON, *flags]
        self.result["flags"] = " ".join(flags)
        began = time.time()
        env = environment(self.folder, self.name) | variables
        with self.log.open("w") as stream:
            server = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        try:
            self.until_ready(server, began)
            self.ask_all()
            self.result["stage"] = "done"
            time.sleep(0.6)  # the probe writes every half second
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
                log = self.log.read_text(errors="replace")
                if server.poll() is not None or "Received sigquit" in log:
                    raise RuntimeError("the server died") from None
                if time.time() > self.deadline:
                    raise TimeoutError("not ready at the limit") from None
                time.sleep(0.5)

    def ask_all(self) -> None:
        for stage, groups in (("alone", [[p] for p in PROMPTS]), ("together", [PROMPTS])):
            self.result["stage"], start = stage, time.time()
            answers = self.result.setdefault(stage, [])
            for group in groups:
                answers.extend(generate(self.port, group, self.deadline))
            self.result[f"{stage}_s"] = round(time.time() - start, 1)
        self.result["distinct_tokens"] = distinct_tokens(self.result["alone"])


def kill(server: subprocess.Popen) -> None:
    try:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def failure(log: Path) -> list[str]:
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


def compare_all(done: dict[str, dict]) -> None:
    """Each mode with stock as it runs itself: with CUDA graphs, or without."""
    for name, other in done.items():
        first = done.get("stock_graphs" if name.endswith("graphs") else "stock")
        if first is None or first is other or {first["stage"], other["stage"]} != {"done"}:
            continue
        other[f"against_{first['mode']}"] = {
            stage: compare(first[stage], other[stage], first["mode"])
            for stage in ("alone", "together")
        }


def main() -> None:
    parser = rig.parser(__doc__, "stock,ours,stock_graphs,ours_graphs,triton")
    parser.add_argument("--limit", type=float, default=200, help="seconds for everything")
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()
    deadline = time.time() + args.limit - 8
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.probe.json"):
        stale.unlink()
    sys.path.insert(0, str(ROOT / "core"))
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    write_gpt_oss(folder / "checkpoint", **args.checkpoint)
    write_plugins(folder / "plugins")
    report = rig.report(PACKAGES, args.checkpoint)
    report["versions"]["sglang-kernel"] += " (its libraries: 0.4.5)"
    print(report["versions"], flush=True)
    modes = [
        Mode(name, FIRST_PORT + i, folder, deadline) for i, name in enumerate(args.modes.split(","))
    ]
    done: dict[str, dict] = {}
    lock = threading.Lock()

    def run(mode: Mode) -> None:
        result = mode.run()
        with lock:
            done[mode.name] = result
            compare_all(done)
            results = [done[m.name] for m in modes if m.name in done]
            args.out.write_text(json.dumps(report | {"modes": results}, indent=1) + "\n")
            short = {key: result[key] for key in SHOWN if key in result}
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
