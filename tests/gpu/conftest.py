"""GPU tests: skipped, with the reason, where the flashinfer kernel can't run. `--gpu-results FILE` keeps what was seen."""

import json
import platform
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

import hopper_mxfp4
from hopper_mxfp4 import KernelUnavailable, LayerShape, choose_kernel
from hopper_mxfp4.check import driver_version

HERE = Path(__file__).parent
RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--gpu-results", metavar="FILE", help="write versions and each GPU test's outcome and figures to this JSON file")


def _unavailable():
    if not torch.cuda.is_available():
        return "no GPU here"
    try:
        choose_kernel("flashinfer", LayerShape(32, 2880, 2880), torch.device("cuda"))
    except KernelUnavailable as reason:
        return str(reason)
    return None


def pytest_configure(config):
    config.stash[RESULTS] = []


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in item.path.parents]
    if not ours:
        return
    reason = _unavailable()
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if HERE in item.path.parents and (report.when == "call" or report.skipped or report.failed):
        row = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "seen": dict(item.user_properties)}
        if report.failed:
            row["error"] = str(report.longrepr).splitlines()[-1]
        item.config.stash[RESULTS].append(row)


def pytest_sessionfinish(session):
    target, rows = session.config.getoption("--gpu-results"), session.config.stash[RESULTS]
    if not target or not rows:
        return
    versions = {"hopper-mxfp4": hopper_mxfp4.__version__, "python": platform.python_version(), "torch": torch.__version__}
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
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
    result = {"when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "gpu": gpu, "versions": versions, "counts": counts, "tests": rows}
    Path(target).write_text(json.dumps(result, indent=1) + "\n")
