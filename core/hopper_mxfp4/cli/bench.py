"""`hopper-mxfp4 bench`: time one layer beside every baseline."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hopper_mxfp4.cli.options import (
    budget_option,
    current_device,
    engine_options,
    in_inference_mode,
    parse_workloads,
    progress,
    tokens_option,
    words,
    workloads_option,
)


@click.command()
@workloads_option
@tokens_option
@click.option(
    "--routing",
    callback=words,
    default="uniform",
    show_default=True,
    help="uniform, skewed or both, separated by spaces.",
)
@click.option(
    "--kernels",
    callback=words,
    help="Only kernels whose names begin with one of these, separated by spaces.",
)
@click.option(
    "--bias/--no-bias",
    default=True,
    show_default=True,
    help="With their biases, or also without for those that have some.",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="Also our kernels' deterministic and batch-invariant modes.",
)
@click.option(
    "--host",
    is_flag=True,
    help="Only what a call costs the host at one token, outside of a CUDA graph.",
)
@click.option(
    "--engine",
    help="Whole models in this framework's engine instead: vllm or sglang. --workloads are then "
    "models (gpt-oss-20b, gpt-oss-120b, deepseek-v4-flash, or a folder with a checkpoint), "
    "--tokens the numbers of requests that decode at once, and --kernels backends, run in this "
    "order: ours, ours-bf16, ours-fp8, default, or one of the framework's names.",
)
@click.option("--layers", type=int, help="With --engine: another number of layers.")
@click.option(
    "--engine-option",
    "engine_options",
    multiple=True,
    callback=engine_options,
    help="With --engine: NAME=VALUE for the framework's engine, such as tensor_parallel_size=2. "
    "Values are JSON, or else text. May be given several times.",
)
@click.option(
    "--moe-time", is_flag=True, help="With --engine: also the MoE blocks' part of a decode step."
)
@budget_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the result here, after every point.",
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it here; .png, .svg or .pdf.",
)
@click.option(
    "--from",
    "from_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure nothing: read --json's file.",
)
def bench(
    workloads: list[str],
    tokens: list[int],
    routing: list[str],
    kernels: list[str],
    bias: bool,
    deterministic: bool,
    host: bool,
    engine: str | None,
    layers: int | None,
    engine_options: dict[str, Any],
    moe_time: bool,
    budget: float,
    json_file: Path | None,
    plot_file: Path | None,
    from_file: Path | None,
) -> None:
    """Time one MoE layer: our kernels, stock FlashInfer and the frameworks' own, against what the
    GPU could do.
    """
    from hopper_mxfp4.bench import report

    console = Console()
    try:
        if engine:
            _bench_engine(
                engine,
                workloads,
                tokens,
                kernels,
                layers,
                engine_options,
                moe_time,
                json_file,
                plot_file,
                console,
            )
            return
        if from_file:
            result = report.load(from_file)
        elif host:
            result = _bench_host(workloads, kernels, console)
        else:
            result = _bench(
                workloads, tokens, routing, kernels, bias, deterministic, budget, json_file, console
            )
        if json_file and not from_file:
            report.save(json_file, result)
        if host and not from_file:
            return
        report.show(result, console)
        if plot_file:
            report.plot(result, plot_file)
    except (ValueError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _bench(
    workloads: list[str],
    tokens: list[int],
    routing: list[str],
    kernels: list[str],
    bias: bool,
    deterministic: bool,
    budget: float,
    json_file: Path | None,
    console: Console,
) -> dict[str, Any]:
    from hopper_mxfp4.bench import report
    from hopper_mxfp4.bench.baselines import contenders
    from hopper_mxfp4.bench.run import bench as run
    from hopper_mxfp4.bench.workloads import ROUTINGS, without_bias

    chosen = parse_workloads(workloads)
    if not bias:
        chosen += [without_bias(workload) for workload in chosen if workload.family.bias]
    device = current_device()
    found = contenders(device, deterministic)
    names = report.names_of(kernels, [c.name for c in found], "kernel")
    routings = report.names_of(routing, ROUTINGS, "routing")

    def keep(result: dict[str, Any]) -> None:
        if json_file:
            report.save(json_file, result)

    with progress(console) as step:
        wanted = [c for c in found if c.name in names]
        sizes = tokens or [2**n for n in range(14)]
        return in_inference_mode(
            lambda: run(chosen, sizes, routings, wanted, device, budget, keep, step)
        )


def _bench_engine(
    framework: str,
    models: list[str],
    batches: list[int],
    backends: list[str],
    layers: int | None,
    options: dict[str, Any],
    moe_time: bool,
    json_file: Path | None,
    plot_file: Path | None,
    console: Console,
) -> None:
    from hopper_mxfp4.bench import report
    from hopper_mxfp4.bench.engine import MODELS, bench_engine, plot, show

    def keep(result: dict[str, Any]) -> None:
        if json_file:
            report.save(json_file, result)

    result = bench_engine(
        framework,
        models or [*MODELS][:1],
        backends,
        batches,
        layers,
        console,
        options,
        moe_time,
        keep,
    )
    show(result, console)
    if plot_file:
        plot(result, plot_file)
    if any("failed" in row for row in result["engines"]):
        raise SystemExit(1)


def _bench_host(workloads: list[str], kernels: list[str], console: Console) -> dict[str, Any]:
    from hopper_mxfp4.bench.baselines import Layer, contenders
    from hopper_mxfp4.bench.host import host_overhead
    from hopper_mxfp4.bench.run import FORMAT, about
    from hopper_mxfp4.bench.workloads import random_weights

    device = current_device()
    names = kernels or [c.name.removeprefix("ours-") for c in contenders(device) if c.ours]
    rows = [
        in_inference_mode(
            partial(
                host_overhead, workload, Layer(workload, random_weights(workload, device)), name
            )
        )
        for workload in parse_workloads(workloads or ["gpt-oss-20b"])
        for name in names
    ]
    for row in rows:
        console.print(", ".join(f"{key} {value}" for key, value in row.items()), highlight=False)
    return {
        "format": FORMAT,
        "about": about(device),
        "rows": [],
        "absent": [],
        "missed": 0,
        "host": rows,
    }
