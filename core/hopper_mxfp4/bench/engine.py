"""`hopper-mxfp4 bench --engine`: whole models in a framework's own engine, a process a backend.

An adapter's module (`Adapter.engine`) is run with a job and answers with one backend's figures:

    engine, methods     the framework's name and version; what served the MoE layers, by how many
    import_s, ready_s   seconds until the framework was imported; from there until the engine stood
    kv_cache_tokens     for which there is room beside weights and graphs
    decode_ms           [of each batch size] milliseconds a step, all requests decoding
    prefill_tokens_s    tokens a second of `prompts` prompts of `prompt_tokens`

Backends are "ours", "default" (what the framework takes when it is told nothing) and whatever else
the framework calls its own.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hopper_mxfp4.bench.jobs import JobFailed, run_job
from hopper_mxfp4.bench.run import FORMAT, about
from hopper_mxfp4.checkpoint.random_gpt_oss import gpt_oss_config
from hopper_mxfp4.registry import adapters

OURS, DEFAULT = "ours", "default"
DECODED = (8, 72)  # tokens a request: a step's time is the difference of both, over as many steps
# Layers and experts of a published model.
MODELS = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}
Result = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What is timed. batches: requests decoding at once. prompts, prompt_tokens: of a prefill."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    prompts: int = 16
    prompt_tokens: int = 2048


ON_A_CPU = Load((1, 2), 2, 64)  # which only proves that it works


def bench_engine(
    framework: str,
    models: Sequence[str],
    backends: Sequence[str],
    batches: Sequence[int],
    layers: int | None,
    console: Console,
) -> Result:
    """Time each model on each backend. What fails is a row with its reason.

    models: names of MODELS, whose weights are then random, or folders with a checkpoint. layers: of
    the former, instead of their own number. batches: Load's where there are none.
    Raises ValueError for a framework or model that is not known.
    """
    import torch

    adapter = adapters().get(framework)
    if adapter is None or adapter.engine is None:
        known = ", ".join(a.framework for a in adapters().values() if a.engine)
        raise ValueError(f"no engine of {framework!r} can be timed; there are {known}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = Load() if device.type == "cuda" else ON_A_CPU
    if batches:
        load = replace(load, batches=tuple(batches))
    result: Result = {"format": FORMAT, "about": about(device), "engines": []}
    with tempfile.TemporaryDirectory(prefix="hopper-mxfp4-engines-") as folder:
        for model in models:
            given = Path(model).is_dir()
            path = Path(model).resolve() if given else _write_config(model, layers, Path(folder))
            for backend in backends:
                job = {
                    "model": str(path),
                    "random_weights": not given,
                    "backend": backend,
                    "batches": list(load.batches),
                    "prompts": load.prompts,
                    "prompt_tokens": load.prompt_tokens,
                    "decoded": DECODED,
                }
                row = {"model": model, "backend": backend, "layers": layers}
                try:
                    row |= run_job(adapter.engine, job, Path(folder) / backend, console)
                except JobFailed as failed:
                    row["failed"] = str(failed)
                result["engines"].append(row)
    return result


def _write_config(model: str, layers: int | None, folder: Path) -> Path:
    if model not in MODELS:
        raise ValueError(
            f"{model!r} is neither a folder with a checkpoint nor one of {', '.join(MODELS)}"
        )
    depth, experts = MODELS[model]
    path = folder / model
    path.mkdir(exist_ok=True)
    config = gpt_oss_config(layers=layers or depth, experts=experts)
    (path / "config.json").write_text(json.dumps(config))
    return path


def timed_rows(result: Result, model: str) -> list[Result]:
    """A model's rows that have figures."""
    return [r for r in result["engines"] if r["model"] == model and "failed" not in r]


def show(result: Result, console: Console) -> None:
    """A table a model, and what failed."""
    for model in dict.fromkeys(row["model"] for row in result["engines"]):
        rows = timed_rows(result, model)
        default = next((row for row in rows if row["backend"] == DEFAULT), None)
        batches = list(dict.fromkeys(b for row in rows for b in row["decode_ms"]))
        table = Table(
            title=f"{model}: decode step in ms by batch, and prefill; in brackets, speed with the "
            "default as 1",
            title_justify="left",
        )
        for column in ("backend", *batches, "prefill tokens/s", "ready s", "KV cache tokens"):
            table.add_column(column, justify="right")
        for row in rows:
            steps = [_beside(row, default, "decode_ms", batch) for batch in batches]
            prefill = f"{row['prefill_tokens_s']:,.0f}"
            if default:
                speed = row["prefill_tokens_s"] / default["prefill_tokens_s"]
                prefill += f" ({speed:.2f})"
            table.add_row(
                row["backend"],
                *steps,
                prefill,
                f"{row['ready_s']:.0f}",
                f"{row['kv_cache_tokens']:,}",
            )
        console.print(table)
        for row in rows:
            served = ", ".join(f"{count} x {name}" for name, count in row["methods"].items())
            console.print(f"{row['backend']}: {row['engine']}, {served}", highlight=False)
    for row in result["engines"]:
        if "failed" in row:
            console.print(f"[red]failed[/]: {row['model']} {row['backend']}", highlight=False)
            console.print(row["failed"], highlight=False, markup=False, soft_wrap=True)


def _beside(row: Result, default: Result | None, field: str, batch: str) -> str:
    ms = row[field].get(batch)
    if ms is None:
        return ""
    other = default and default[field].get(batch)
    return f"{ms:.2f}" + (f" ({other / ms:.2f})" if other else "")


def plot(result: Result, path: Path) -> None:
    """The frontier of each model: tokens a second of a GPU against those of one of its users, a
    line a backend, a point a batch size.

    Raises ImportError without matplotlib and ValueError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'hopper-mxfp4[bench]'") from error
    models = [
        model
        for model in dict.fromkeys(row["model"] for row in result["engines"])
        if timed_rows(result, model)
    ]
    if not models:
        raise ValueError("no engine was timed: there is nothing to plot")
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for row in timed_rows(result, model):
            steps = sorted((int(batch), ms) for batch, ms in row["decode_ms"].items())
            users = [1000 / ms for _, ms in steps]
            gpu = [1000 * batch / ms for batch, ms in steps]
            axis.plot(users, gpu, marker="o", label=row["backend"])
            for (batch, _), x, y in zip(steps, users, gpu, strict=True):
                axis.annotate(
                    str(batch), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        axis.set(
            xlabel="tokens a second of a user",
            ylabel="tokens a second of the GPU",
            yscale="log",
            title=f"{model}, decoding; numbers are requests at once",
        )
        axis.grid(alpha=0.25)
        axis.legend()
    told = result["about"]
    figure.suptitle(f"{told['device']}, {told['when']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
