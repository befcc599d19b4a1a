#!/usr/bin/env python3
"""Draw docs/images/layers-h200.png from benchmarks/results/bench-*.json.

python docs/dev/generate/layers_chart.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from hopper_mxfp4.bench import report

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
CHART = ROOT / "docs" / "images" / "layers-h200.png"
WORKLOADS = {
    "gpt-oss-20b": ("gpt-oss-20b", "#3b6fb6"),
    "gpt-oss-120b": ("gpt-oss-120b", "#d98032"),
    "dsv4-flash": ("DeepSeek-V4-Flash", "#3a8f5c"),
}
OURS = {"bf16": "ours-native", "fp8": "ours-native8"}  # what `auto` runs


def speeds(card: str, workload: str, activations: str) -> tuple[list[int], list[float]]:
    """Tokens, and the time of the fastest baseline with those activations over ours."""
    result = report.load(RESULTS / f"bench-{card}-{workload}.json")
    rows = next(rows for _, routing, rows in report.groups(result) if routing == "uniform")
    ours = OURS[activations]
    tokens, ratios = [], []
    for m, at in report.by_tokens(rows).items():
        baseline = report.fastest(at, False, activations)
        if baseline:
            tokens.append(m)
            ratios.append(baseline["us"] / next(r["us"] for r in at if r["kernel"] == ours))
    return tokens, ratios


def draw() -> None:
    figure, axis = plt.subplots(figsize=(8.6, 4), dpi=150)
    for workload, (label, colour) in WORKLOADS.items():
        axis.plot(*speeds("h200", workload, "bf16"), marker="o", color=colour, label=label)
    axis.plot(
        *speeds("h200", "dsv4-flash", "fp8"),
        linestyle=":",
        marker=".",
        color=WORKLOADS["dsv4-flash"][1],
        label="DeepSeek-V4-Flash, both with 8-bit activations",
    )
    axis.axhline(1.0, color="#333333", linewidth=1, linestyle="--")
    axis.set_xscale("log", base=2)
    ticks = speeds("h200", "gpt-oss-20b", "bf16")[0]
    axis.set_xticks(ticks, map(str, ticks), fontsize=8)
    axis.set_ylim(0, 2.1)
    axis.set_xlabel("tokens of a step", fontsize=9)
    axis.set_ylabel("speed of a layer, best other backend = 1", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower left", fontsize=8, frameon=False)
    CHART.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(CHART)


if __name__ == "__main__":
    draw()
