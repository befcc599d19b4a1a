#!/usr/bin/env python3
"""Draw docs/images/layers-h200.png from benchmarks/results/bench-h200-*.json.

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
OURS = "ours-native"  # what `auto` runs


def speeds(workload: str, activations: str) -> tuple[list[int], list[float]]:
    """Tokens, and the fastest baseline's time over ours."""
    rows = report.load(RESULTS / f"bench-h200-{workload}.json")["rows"]
    tokens, ratios = [], []
    for m, at in report.by_tokens(rows).items():
        baseline = report.fastest(at, False, activations)
        if baseline:
            tokens.append(m)
            ratios.append(baseline["us"] / next(r["us"] for r in at if r["kernel"] == OURS))
    return tokens, ratios


def draw() -> None:
    figure, axis = plt.subplots(figsize=(8.6, 4), dpi=150)
    for workload, (label, colour) in WORKLOADS.items():
        axis.plot(*speeds(workload, "bf16"), marker="o", color=colour, label=label)
    axis.plot(
        *speeds("dsv4-flash", "fp8"),
        linestyle=":",
        color=WORKLOADS["dsv4-flash"][1],
        label="DeepSeek-V4-Flash: vLLM's 8-bit activations over our BF16 ones",
    )
    axis.axhline(1.0, color="#333333", linewidth=1, linestyle="--")
    axis.set_xscale("log", base=2)
    ticks = speeds("gpt-oss-20b", "bf16")[0]
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
