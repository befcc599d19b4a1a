"""Work that is done in a process of its own: told by a JSON file, answered in another."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class JobFailed(RuntimeError):
    """A job's process ended without an answer; the message has the end of its log."""


def run_job(
    module: str,
    job: dict[str, Any],
    stem: Path,
    console: Any,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run a module on a job, with its output in STEM.log; returns what it wrote.

    environment: variables beside those of this process. Raises JobFailed.
    """
    job_file, answer_file, log_file = (
        stem.with_suffix(suffix).resolve() for suffix in (".job.json", ".json", ".log")
    )
    answer_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job | {"answer": str(answer_file)}))
    began = time.time()
    with (
        log_file.open("w") as log,
        console.status(f"{stem.name} at work, half a minute to two; its log is {log_file}"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, str(job_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env=os.environ | (environment or {}),
        )
    if done.returncode or not answer_file.exists():
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-25:])
        raise JobFailed(
            f"{tail}\nthe {stem.name} process ended with status {done.returncode}; the whole log "
            f"is {log_file}"
        )
    console.print(f"{stem.name}: {time.time() - began:.1f} s", highlight=False)
    return json.loads(answer_file.read_text())


def answer(job_path: str, do: Callable[[dict[str, Any]], Any]) -> None:
    """Carry out the job in a file: the main of every process that `run_job` starts."""
    job = json.loads(Path(job_path).read_text())
    Path(job["answer"]).write_text(json.dumps(do(job)))
