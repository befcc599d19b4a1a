"""`--results FILE` keeps what a test run saw, on whatever machine: docs/dev/evidence/gpu-tests.md
and docs/dev/evidence/reliability.md are made from such files.
"""

import json
import platform
import time
from importlib import metadata
from pathlib import Path

import pytest

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    text = "write versions and each test's outcome and figures to this JSON file"
    parser.addoption("--results", "--gpu-results", dest="results", metavar="FILE", help=text)


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or report.skipped or report.failed:
        row = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "seen": dict(item.user_properties),
        }
        if report.failed:
            row["error"] = str(report.longrepr).splitlines()[-1]
        item.config.stash[RESULTS].append(row)


def pytest_sessionfinish(session):
    target, rows = session.config.getoption("results"), session.config.stash[RESULTS]
    if not target or not rows:
        return
    import torch  # not before a test does

    import hopper_mxfp4
    from hopper_mxfp4.bench.run import driver_version

    versions = {
        "hopper-mxfp4": hopper_mxfp4.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("flashinfer-python", "triton", "vllm", "transformers", "pytest"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    counts = {
        outcome: sum(row["outcome"] == outcome for row in rows)
        for outcome in ("passed", "failed", "skipped")
    }
    result = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpu": gpu,
        "versions": versions,
        "counts": counts,
        "tests": rows,
    }
    Path(target).write_text(json.dumps(result, indent=1) + "\n")
