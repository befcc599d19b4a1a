#!/usr/bin/env python3
"""Write docs/dev/evidence/gpu-tests.md from the recorded run of `make gpu`.

    python docs/dev/generate/gpu_tests_table.py

The run is benchmarks/results/gpu-tests.json, the JSON of `pytest tests/gpu --gpu-results FILE`.
"""

import json
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmarks" / "results" / "gpu-tests.json"
PAGE = ROOT / "docs" / "dev" / "evidence" / "gpu-tests.md"


def value(v: object) -> str:
    return f"{v:.3g}" if isinstance(v, float) else str(v)


def page(result: dict) -> str:
    gpu, counts = result["gpu"], result["counts"]
    where = f"{gpu['name']} ({gpu['multiprocessors']} SMs)"
    driver = f"driver {gpu['driver'].split()[0]}, CUDA {gpu['cuda']}"
    counted = ", ".join(f"{counts[outcome]} {outcome}" for outcome in counts)
    lines = [
        "# Tests on a GPU",
        "",
        "Made by `make gpu` from [the recorded run](../../../benchmarks/results/gpu-tests.json),",
        "not written by hand.",
        "",
        f"{result['when']}, {where}, {driver}.",
        "",
        *(f"- {name} {version}" for name, version in result["versions"].items() if version),
        "",
        *textwrap.wrap(f"**{counted}.** {result.get('note', '')}", 100),
        "",
        "| test | outcome | seen | s |",
        "|---|---|---|---|",
    ]
    for test in result["tests"]:
        seen = ", ".join(f"{key} {value(v)}" for key, v in test["seen"].items())
        name = test["test"].split("::")[1]
        lines.append(f"| {name} | {test['outcome']} | {seen} | {test['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULT.read_text())))
