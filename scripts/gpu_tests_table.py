#!/usr/bin/env python3
"""Turn the JSON of `pytest tests/gpu --gpu-results FILE` into a Markdown page: gpu_tests_table.py FILE PAGE."""

import json
import sys
from pathlib import Path


def page(result: dict) -> str:
    gpu, counts = result["gpu"], result["counts"]
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version
    )
    lines = [
        "# GPU tests",
        "",
        "Made by `make gpu` from `results/gpu-tests.json`; not written by hand.",
        "",
        f"{result['when']}, {gpu['name']} ({gpu['multiprocessors']} SMs), driver {gpu['driver'].split()[0]}, CUDA {gpu['cuda']};",
        f"{versions}.",
        "",
        f"**{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped.** {result.get('note', '')}".rstrip(),
        "",
        "| test | outcome | seen | s |",
        "|---|---|---|---|",
    ]
    for row in result["tests"]:
        seen = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row["seen"].items()
        )
        lines.append(
            f"| {row['test'].split('::')[1]} | {row['outcome']} | {seen} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(page(json.loads(source.read_text())))
