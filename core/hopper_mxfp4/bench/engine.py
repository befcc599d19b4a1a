"""`hopper-mxfp4 bench --engine`: whole models in a framework's own engine, a process a backend.

An adapter's module (`Adapter.engine`) is run with a job and answers with one backend's figures:

    engine, methods     the framework's name and version; what served the MoE layers of all ranks,
                        by how many
    gpus                over how many the model was spread
    import_s, ready_s   seconds from the process's start until the framework was imported; from
                        there until the engine stood
    kv_cache_tokens     for which there is room beside weights and graphs, in the whole engine
    decode_ms           [of each batch size] milliseconds a step, all requests decoding
    moe_ms              [of each batch size] of these, the MoE blocks' of all layers: router,
                        experts, shared experts and sums over ranks; where it was asked for
    prefill_tokens_s    tokens a second of `prompts` prompts of `prompt_tokens`

Backends are "ours", "ours-bf16" and "ours-fp8" (with those activations whatever the checkpoint
declares), "default" (what the framework takes when it is told nothing) and whatever else the
framework calls its own. A backend may be named several times: its first run compiles what later
ones find compiled.
"""

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hopper_mxfp4.bench.jobs import JobFailed, run_job
from hopper_mxfp4.bench.run import FORMAT, about
from hopper_mxfp4.checkpoint.deepseek_v4 import deepseek_v4_config
from hopper_mxfp4.checkpoint.random_gpt_oss import gpt_oss_config
from hopper_mxfp4.registry import adapters

OURS, DEFAULT = "ours", "default"
REPEATS = 3  # of each measurement, of which the median counts
DECODED = (8, 72)  # tokens a request: a step's time is the difference of both, over as many steps
Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A published model. layers: its own number, or what one GPU of 80 GB holds of it. config: its
    config.json for a number of layers. backends: those timed where none is named.
    """

    layers: int
    config: Callable[[int], dict[str, Any]]
    backends: tuple[str, ...] = (DEFAULT, OURS)


MODELS = {
    "gpt-oss-20b": Model(24, lambda layers: gpt_oss_config(layers=layers, experts=32)),
    "gpt-oss-120b": Model(36, lambda layers: gpt_oss_config(layers=layers, experts=128)),
    # 16 of 43 layers, 3.6 GB each, and without the compressed attention of most.
    "deepseek-v4-flash": Model(
        16,
        lambda layers: deepseek_v4_config(layers=layers, hash_layers=min(3, layers)),
        (DEFAULT, "marlin", f"{OURS}-bf16", f"{OURS}-fp8"),
    ),
}


@dataclass(frozen=True)
class Load:
    """What is timed. batches: requests decoding at once. prompts, prompt_tokens: of a prefill."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    prompts: int = 16
    prompt_tokens: int = 2048


ON_A_CPU = Load((1, 2), 2, 64)  # which only proves that it works


def activations_of(backend: str) -> str | None:
    """What HOPPER_MXFP4_ACTIVATIONS is for a backend of ours; None for others."""
    ours, _, activations = backend.partition("-")
    return (activations or "auto") if ours == OURS else None


def bench_engine(
    framework: str,
    models: Sequence[str],
    backends: Sequence[str],
    batches: Sequence[int],
    layers: int | None,
    console: Console,
    options: Mapping[str, Any] | None = None,
    moe_time: bool = False,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Time each model on each backend, in the order given. What fails is a row with its reason.

    models: names of MODELS, whose weights are then random, or folders with a checkpoint. backends:
    each model's own where there are none. layers: of models of MODELS, instead of their own number.
    batches: Load's where there are none. options: for the framework's engine, by its own names,
    such as {"tensor_parallel_size": 2}. moe_time: also `moe_ms`. keep: told the result after each
    row.
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
            usual = (DEFAULT, OURS) if given else MODELS[model].backends
            for backend in backends or usual:
                job = {
                    "model": str(path),
                    "random_weights": not given,
                    "backend": backend,
                    "batches": list(load.batches),
                    "prompts": load.prompts,
                    "prompt_tokens": load.prompt_tokens,
                    "decoded": DECODED,
                    "options": dict(options or {}),
                    "moe_time": moe_time,
                    "began": time.time(),
                }
                row = {
                    "model": model,
                    "backend": backend,
                    "layers": layers,
                    "options": dict(options or {}),
                }
                try:
                    row |= run_job(adapter.engine, job, Path(folder) / backend, console)
                except JobFailed as failed:
                    row["failed"] = str(failed)
                result["engines"].append(row)
                keep(result)
    return result


def time_engine(
    generate: Callable[[list[list[int]], int], None], vocabulary: int, job: Mapping[str, Any]
) -> Result:
    """decode_ms and prefill_tokens_s of an engine that stands.

    generate(prompts, tokens): have it make so many tokens for each of the prompts, which are token
    ids, all together. vocabulary: how many ids there are.
    """
    import torch

    def seconds(requests: int, prompt: int, tokens: int, seed: int) -> float:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary - 1, (requests, prompt), generator=g).tolist()
        began = time.perf_counter()
        generate(ids, tokens)
        return time.perf_counter() - began

    short, long = job["decoded"]
    decode_ms = {}
    seconds(2, 64, 4, 0)
    for batch in job["batches"]:
        seconds(batch, 64, 4, 0)  # captures and compiles whatever this size needs
        steps = [
            (seconds(batch, 64, long, seed) - seconds(batch, 64, short, seed)) / (long - short)
            for seed in range(REPEATS)
        ]
        decode_ms[str(batch)] = round(statistics.median(steps) * 1e3, 4)
    prompts, length = job["prompts"], job["prompt_tokens"]
    seconds(prompts, length, 1, 0)
    prefill_s = statistics.median(seconds(prompts, length, 1, seed) for seed in range(REPEATS))
    return {"decode_ms": decode_ms, "prefill_tokens_s": round(prompts * length / prefill_s, 1)}


def sum_counts(of_ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts by name over all ranks."""
    total: Counter[str] = Counter()
    for counts in of_ranks:
        total.update(counts)
    return dict(total)


def _write_config(model: str, layers: int | None, folder: Path) -> Path:
    if model not in MODELS:
        raise ValueError(
            f"{model!r} is neither a folder with a checkpoint nor one of {', '.join(MODELS)}"
        )
    known = MODELS[model]
    path = folder / model
    path.mkdir(exist_ok=True)
    config = known.config(layers or known.layers)
    (path / "config.json").write_text(json.dumps(config))
    return path


def load(paths: Sequence[Path]) -> Result:
    """Results that `bench --engine --json` wrote, as one: what ran side by side is compared so.

    Raises ValueError naming a file that is none, and OSError.
    """
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
            if result["format"] != FORMAT:
                raise ValueError(f"format {result['format']!r}, and this release reads {FORMAT}")
            results.append(result | {"engines": list(result["engines"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a result of `hopper-mxfp4 bench --engine --json` "
                f"({type(error).__name__}: {error})"
            ) from error
    return results[0] | {"engines": [row for result in results for row in result["engines"]]}


def _setup(row: Result) -> str:
    """What is compared with each other: a model, and the engine's options that were given."""
    options = row.get("options") or {}
    named = ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
    layers = f" of {row['layers']} layers" if row.get("layers") else ""
    return f"{row['model']}{layers}" + (f" with {named}" if named else "")


def _setups(result: Result) -> dict[str, list[Result]]:
    """The rows of each that have figures."""
    found: dict[str, list[Result]] = {}
    for row in result["engines"]:
        if "failed" not in row:
            found.setdefault(_setup(row), []).append(row)
    return found


def show(result: Result, console: Console) -> None:
    """A table for each model and each choice of options, and what failed."""
    for setup, rows in _setups(result).items():
        default = next((row for row in rows if row["backend"] == DEFAULT), None)
        batches = list(dict.fromkeys(b for row in rows for b in row["decode_ms"]))
        moe = [b for b in batches if any(b in row.get("moe_ms", {}) for row in rows)]
        table = Table(
            title=f"{setup}: decode step in ms by batch, "
            + ("its MoE part, " if moe else "")
            + "and prefill; in brackets, speed with the first default as 1",
            title_justify="left",
        )
        columns = ("backend", *batches, *(f"MoE {batch}" for batch in moe))
        for column in (*columns, "prefill tokens/s", "import s", "ready s", "KV cache tokens"):
            table.add_column(column, justify="right")
        for row in rows:
            steps = [_beside(row, default, "decode_ms", batch) for batch in batches]
            steps += [_beside(row, default, "moe_ms", batch) for batch in moe]
            prefill = f"{row['prefill_tokens_s']:,.0f}"
            if default:
                speed = row["prefill_tokens_s"] / default["prefill_tokens_s"]
                prefill += f" ({speed:.2f})"
            table.add_row(
                row["backend"],
                *steps,
                prefill,
                f"{row['import_s']:.0f}",
                f"{row['ready_s']:.0f}",
                f"{row['kv_cache_tokens']:,}",
            )
        console.print(table)
        for row in rows:
            served = ", ".join(f"{count} x {name}" for name, count in row["methods"].items())
            console.print(f"{row['backend']}: {row['engine']}, {served}", highlight=False)
    for row in result["engines"]:
        if "failed" in row:
            console.print(f"[red]failed[/]: {_setup(row)} {row['backend']}", highlight=False)
            console.print(row["failed"], highlight=False, markup=False, soft_wrap=True)


def _beside(row: Result, default: Result | None, field: str, batch: str) -> str:
    ms = row.get(field, {}).get(batch)
    if ms is None:
        return ""
    other = default and default.get(field, {}).get(batch)
    return f"{ms:.2f}" + (f" ({other / ms:.2f})" if other else "")


def plot(result: Result, path: Path) -> None:
    """The frontier of each model and each choice of options: tokens a second of a GPU against those
    of one of its users, a line a backend, a point a batch size. Of a backend that ran several times
    it is the last run, which found everything compiled.

    Raises ImportError without matplotlib and ValueError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'hopper-mxfp4[bench]'") from error
    setups = _setups(result)
    if not setups:
        raise ValueError("no engine was timed: there is nothing to plot")
    figure = Figure(figsize=(7 * len(setups), 5), layout="constrained")
    axes = figure.subplots(1, len(setups), squeeze=False)[0]
    backends = sorted({row["backend"] for rows in setups.values() for row in rows})
    for axis, (setup, rows) in zip(axes, setups.items(), strict=True):
        for row in {row["backend"]: row for row in rows}.values():
            steps = sorted((int(batch), ms) for batch, ms in row["decode_ms"].items())
            users = [1000 / ms for _, ms in steps]
            gpu = [1000 * batch / ms / row.get("gpus", 1) for batch, ms in steps]
            colour = f"C{backends.index(row['backend'])}"
            axis.plot(users, gpu, marker="o", label=row["backend"], color=colour)
            for (batch, _), x, y in zip(steps, users, gpu, strict=True):
                axis.annotate(
                    str(batch), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        axis.set(
            xlabel="tokens a second of a user",
            ylabel="tokens a second of a GPU",
            yscale="log",
            title=f"{setup}, decoding;\nnumbers are requests at once",
        )
        axis.grid(alpha=0.25)
        axis.legend()
    told = result["about"]
    figure.suptitle(f"{told['device']}, {told['when']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
