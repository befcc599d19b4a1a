#!/usr/bin/env python3
"""Write docs/dev/evidence/bench.md from the recorded results of `hopper-mxfp4 bench`.

    python docs/dev/generate/bench_tables.py

The results are in benchmarks/results. A file is what `bench --json` writes, or
{"runs": [such results]} for our tactics measured beside FlashInfer's autotuner.
"""

import json
from pathlib import Path

from hopper_mxfp4.bench import report

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "dev" / "evidence" / "bench.md"
WORKLOADS = ("gpt-oss-20b", "gpt-oss-120b", "dsv4-flash")
INTRODUCTION = """\
# One layer, every kernel

Made by `docs/dev/generate/bench_tables.py` from [recorded
results](../../../benchmarks/results), not written by hand.
[benchmarking.md](../benchmarking.md) says how these times are measured and what the columns
are; [performance.md](../../performance.md) says what they mean for a server.

Times are microseconds for one MoE layer and M tokens; in brackets is the share of the roofline,
the time that memory and arithmetic alone would take. "Best baseline / ours" is above 1 where ours
is the faster."""

OF_H200 = """\
Of a build before routing took 4 to 16 us less a call ([wide-kernel.md](../wide-kernel.md), section
10), gpt-oss-20b also before `wide` and `wide8` handed tiles over whole (section 9). Of the build of
the others it was timed at a few sizes before the machine was gone: `ours-native` 25.2, 83.7, 153.0
and 2330.5 at 1, 8, 64 and 8192 tokens, the best baseline 48.2, 131.0, 187.1 and 3237.1."""


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def heading(columns: list[str]) -> list[str]:
    return [row(columns), "|---" * len(columns) + "|"]


def kernels_by_tokens(rows: list[dict]) -> str:
    names = list(dict.fromkeys(r["kernel"] for r in rows))
    lines = heading(["M", "experts", "roofline", *names, "best baseline / ours"])
    for tokens, at in report.by_tokens(rows).items():
        cells = {
            r["kernel"]: f"{r['us']:.1f} ({report.share(r):.0%})" if "us" in r else "failed"
            for r in at
        }
        first, times = at[0], [cells.get(name, "") for name in names]
        active, roofline = f"{first['active_experts']:g}", f"{first['roofline_us']:.1f}"
        lines.append(row([str(tokens), active, roofline, *times, report.best_baselines(at)]))
    return "\n".join(lines)


def section(result: dict) -> str:
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rates = f"{about['bytes_per_s'] / 1e12:.2f} TB/s and {about['flops_per_s'] / 1e12:.0f} TFLOP/s"
    parts = [
        f"### {workload}, {routing} routing\n\n{kernels_by_tokens(rows)}"
        for workload, routing, rows in report.groups(result)
    ]
    parts.append(
        f"{about['device']}, {about['when']}; {rates} measured in the same run.\n{versions}."
    )
    for kernel, why in dict.fromkeys((item["kernel"], item["why"]) for item in result["absent"]):
        parts.append(f"Absent: {kernel}.\n`{why}`")
    if result["missed"]:
        parts.append(f"{result['missed']} measurements were missed: the time budget was over.")
    return "\n\n".join(parts)


def plot(name: str) -> str:
    return f"![Share of the roofline by tokens](../../../benchmarks/results/{name}.png)"


def against_autotuner(runs: list[dict]) -> str:
    """Our time over the autotuner's, each pair of one run, by tokens and workload."""
    ratios: dict[int, dict[str, float]] = {}
    for run in runs:
        for workload, _, rows in report.groups(run):
            for tokens, at in report.by_tokens(rows).items():
                us = {r["kernel"]: r["us"] for r in at}
                ratio = us["ours-flashinfer"] / us["flashinfer-autotuned"]
                ratios.setdefault(tokens, {})[workload] = ratio
    workloads = list(dict.fromkeys(workload for at in ratios.values() for workload in at))
    lines = heading(["M", *workloads])
    for tokens, at in sorted(ratios.items()):
        lines.append(row([str(tokens), *(f"{at[b]:.3f}" if b in at else "" for b in workloads)]))
    when = [run["about"]["when"] for run in runs]
    told = f"{len(runs)} runs on an H100, {min(when)} to {max(when)}."
    return (
        "### Our tactics against FlashInfer's autotuner\n\n"
        "Our `flashinfer` kernel's time over that of FlashInfer tuned for exactly that M.\n\n"
        + "\n".join(lines)
        + f"\n\n{told}"
    )


def page() -> str:
    def load(name: str) -> dict:
        return report.load(RESULTS / f"{name}.json")

    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text())

    parts = [INTRODUCTION, "## H200", OF_H200]
    for workload in WORKLOADS:
        parts += [section(load(f"bench-h200-{workload}")), plot(f"bench-h200-{workload}")]
    parts += ["## H100"]
    for workload in WORKLOADS:
        parts += [section(load(f"bench-h100-{workload}")), plot(f"bench-h100-{workload}")]
    parts += [against_autotuner(read("autotuned-h100")["runs"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
