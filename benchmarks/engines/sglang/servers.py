"""Processes of SGLang's, and what is asked of them over HTTP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from modes import COMMON, VARIABLES, Mode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# A mode's own ports. They lie below those that the system hands out; SGLang takes some by itself,
# up to 246 above a server's.
FIRST_PORT, PORTS = 10000, 900
NCCL, BOOTSTRAP = 40, 50  # above a server's port
DECODE, ROUTER = 300, 600  # above the mode's first port


class Process:
    """A started process and its log. ready: what it answers once it can be asked."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        env: dict[str, str],
        port: int,
        ready: str = "/model_info",
    ):
        self.log, self.port, self.ready = log, port, ready
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def until_ready(self, deadline: float) -> None:
        """Raises RuntimeError where the process ended, and TimeoutError at the deadline."""
        while True:
            try:
                ask(self.port, self.ready)
                return
            except OSError:
                text = self.log.read_text(errors="replace")
                if self.process.poll() is not None or "Received sigquit" in text:
                    raise RuntimeError(f"{self.log.stem} died") from None
                if time.time() > deadline:
                    raise TimeoutError(f"{self.log.stem} was not ready at the limit") from None
                time.sleep(0.5)

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def start(
    name: str,
    mode: Mode,
    gpus: list[int],
    number: int,
    folder: Path,
    more: tuple[str, ...] = (),
) -> list[Process]:
    """A mode's processes; the last one is asked.

    number: the mode's, which decides its ports. more: flags for every server.
    """
    port = FIRST_PORT + number * PORTS
    env = environment(folder, name, gpus)
    model = ["--model-path", str(folder / "checkpoint")]

    def server(role: str, first: int, flags: list[str], variables: dict[str, str]) -> Process:
        ports = ["--port", str(first), "--nccl-port", str(first + NCCL)]
        command = ["sglang.launch_server", *model, *ports, *COMMON, *mode.flags, *flags, *more]
        log = folder / f"{name}{role and '.'}{role}.log"
        return Process(command, log, env | variables, first)

    if mode.decode is None:
        return [server("", port, [], mode.variables)]
    common = ["--disaggregation-transfer-backend", mode.transfer]
    bootstrap = str(port + BOOTSTRAP)
    prefill = server(
        "prefill",
        port,
        [*common, "--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", bootstrap],
        mode.variables,
    )
    # Both see both GPUs, so that the one's memory can be mapped by the other.
    decode = server(
        "decode",
        port + DECODE,
        [*common, "--disaggregation-mode", "decode", "--base-gpu-id", "1"],
        mode.decode,
    )
    router = [
        "sglang_router.launch_router",
        "--pd-disaggregation",
        *("--host", "127.0.0.1", "--port", str(port + ROUTER)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(port + ROUTER + 1)),
        *("--worker-startup-check-interval", "2"),
        *("--prefill", f"http://127.0.0.1:{port}", bootstrap),
        *("--decode", f"http://127.0.0.1:{port + DECODE}"),
    ]
    return [
        prefill,
        decode,
        Process(router, folder / f"{name}.router.log", env, port + ROUTER, "/readiness"),
    ]


def environment(folder: Path, name: str, gpus: list[int]) -> dict[str, str]:
    paths = [folder / "plugins", HERE, ROOT / "core", ROOT / "adapters" / "sglang"]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(max(gpus) + 1)]
    return (
        os.environ
        | VARIABLES
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(devices[i] for i in gpus),
            "PROBE": str(probes(folder, name)),
            "SGLANG_JIT_CACHE_DIR": str(folder / "jit"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUDA_HOME": os.environ.get("CUDA_HOME") or cuda_home(),
        }
    )


def cuda_home() -> str:
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    return str((nvcc if nvcc.exists() else Path(shutil.which("nvcc") or nvcc).resolve()).parents[1])


def probes(folder: Path, name: str) -> Path:
    """Where a mode's schedulers leave what probe.py saw, a file each."""
    return folder / f"{name}.probes"


def read_probes(folder: Path, name: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(probes(folder, name).glob("*.json"))]


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


def ask(port: int, path: str, body: dict | None = None, timeout: float = 5.0):
    """The answer's JSON. Raises OSError where there is none, with what the server said."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:200]
        raise OSError(f"{path}: {error.code}: {said}") from None


def first_errors(log: Path) -> Iterator[str]:
    """The first errors of a log, and its end."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [
        line
        for line in lines
        if ("Error" in line or "hopper-mxfp4" in line)
        and line[:1] != " "
        and "Ignore import" not in line
    ]
    yield from (line[:300] for line in errors[:6] + lines[-12:])
