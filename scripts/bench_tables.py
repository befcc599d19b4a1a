#!/usr/bin/env python3
"""Write bench's results into docs/performance.md, between its two markers.

usage: bench_tables.py PAGE.md RESULT.json..

RESULT.json is from `hopper-mxfp4 bench --json`, or holds what several runs measured of our tactics beside FlashInfer's
autotuner: {"runs": [results of bench]}.
"""

import json
import sys
from pathlib import Path

from hopper_mxfp4.bench import report

BEGIN, END = (
    "<!-- bench: made by scripts/bench_tables.py, not written by hand -->",
    "<!-- end of bench -->",
)


def table(rows):
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = [
        "| M | experts | floor | " + " | ".join(names) + " | best peer / ours |",
        "|---" * (len(names) + 4) + "|",
    ]
    for m, at in report.by_tokens(rows).items():
        cells = {
            row["kernel"]: f"{row['us']:.1f} ({report.share(row):.0%})" if "us" in row else "failed"
            for row in at
        }
        first, times = at[0], " | ".join(cells.get(name, "") for name in names)
        lines.append(
            f"| {m} | {first['active_experts']:g} | {first['floor_us']:.1f} | {times} | "
            f"{report.best_peers(at)} |"
        )
    return "\n".join(lines)


def section(result):
    told = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    rates = f"{told['bytes_per_s'] / 1e12:.2f} TB/s and {told['flops_per_s'] / 1e12:.0f} TFLOP/s measured in the same run"
    parts = [f"{told['device']}, {told['when']}; {versions}; {rates}."]
    parts += [
        f"**{body}, {routing} routing**\n\n{table(rows)}"
        for body, routing, rows in report.groups(result)
    ]
    for kernel, why in dict.fromkeys((item["kernel"], item["why"]) for item in result["absent"]):
        parts.append(f"Absent: {kernel} ({why}).")
    if result["missed"]:
        parts.append(f"{result['missed']} measurements were missed: the time budget was over.")
    return "\n\n".join(parts)


def against_autotuner(runs):
    """Times of ours over the autotuner's, each of one run, by tokens and body."""
    ratios = {}
    for run in runs:
        for body, _, rows in report.groups(run):
            for m, at in report.by_tokens(rows).items():
                us = {row["kernel"]: row["us"] for row in at}
                ratios.setdefault(m, {})[body] = us["ours-flashinfer"] / us["flashinfer-autotuned"]
    bodies = list(dict.fromkeys(body for at in ratios.values() for body in at))
    lines = ["| M | " + " | ".join(bodies) + " |", "|---" * (len(bodies) + 1) + "|"]
    for m, at in sorted(ratios.items()):
        lines.append(
            f"| {m} | "
            + " | ".join(f"{at[body]:.3f}" if body in at else "" for body in bodies)
            + " |"
        )
    when = [run["about"]["when"] for run in runs]
    return (
        f"**ours-flashinfer / flashinfer-autotuned**, in {len(runs)} runs, {min(when)} to {max(when)}\n\n"
        + "\n".join(lines)
    )


def made_of(path):
    result = json.loads(path.read_text())
    return against_autotuner(result["runs"]) if "runs" in result else section(report.load(path))


def main():
    page = Path(sys.argv[1])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made = "\n\n".join(made_of(Path(name)) for name in sys.argv[2:])
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
