#!/usr/bin/env python3
"""Draw docs/images/models-h200.png from benchmarks/results/vllm-models-h200.json.

python docs/dev/generate/models_chart.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmarks" / "results" / "vllm-models-h200.json"
CHART = ROOT / "docs" / "images" / "models-h200.png"
OURS, DEFAULT = "hopper-mxfp4", "vLLM's default (triton)"
DECODE, PREFILL, TEXT = "#3b6fb6", "#d98032", "#333333"


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def speeds(backends: dict, batches: list[int]) -> list[tuple[str, float, str, str]]:
    """One bar each: its label, speed over vLLM's default, both figures, and colour."""
    ours, default = backends[OURS], backends[DEFAULT]
    bars = [
        (f"{batch}", theirs / us, f"{ms(us)}\n{ms(theirs)} ms", DECODE)
        for batch, us, theirs in zip(batches, ours["decode_ms"], default["decode_ms"], strict=True)
        if us is not None
    ]
    us, theirs = (side["prefill_tokens_per_s"] for side in (ours, default))
    told = f"{us / 1000:.0f}k\n{theirs / 1000:.0f}k/s"
    return [*bars, ("prefill", us / theirs, told, PREFILL)]


def draw(result: dict) -> None:
    models = result["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(9, 3.9), sharey=True, dpi=150)
    for axis, (model, backends) in zip(axes, models.items(), strict=True):
        labels, heights, told, colours = zip(*speeds(backends, result["batch"]), strict=True)
        places = range(len(labels))
        axis.bar(places, heights, color=colours, width=0.68)
        axis.axhline(1.0, color=TEXT, linewidth=1, linestyle="--")
        for place, height, text in zip(places, heights, told, strict=True):
            axis.text(place, height + 0.015, text, ha="center", va="bottom", fontsize=7)
        axis.set_xticks(places, labels)
        axis.set_title(model, fontsize=11)
        axis.set_xlabel("requests decoding at once, and prefill", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.5)
    axes[0].set_ylabel("speed, vLLM's default = 1", fontsize=9)
    figure.legend(
        handles=[Patch(color=DECODE, label="decode step"), Patch(color=PREFILL, label="prefill")],
        loc="upper right",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(
        f"hopper-mxfp4 in vLLM {result['vllm']}, {result['device']}", x=0.02, ha="left", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(CHART, metadata={"Software": None})


if __name__ == "__main__":
    draw(json.loads(RESULT.read_text()))
