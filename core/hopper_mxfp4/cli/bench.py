"""`hopper-mxfp4 bench`: time one layer beside every peer."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hopper_mxfp4.cli.options import (
    bodies_option,
    budget_option,
    current_device,
    in_inference_mode,
    parse_bodies,
    progress,
    tokens_option,
    words,
)


@click.command()
@bodies_option
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
    bodies: list[str],
    tokens: list[int],
    routing: list[str],
    kernels: list[str],
    bias: bool,
    deterministic: bool,
    host: bool,
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
        if from_file:
            result = report.load(from_file)
        elif host:
            result = _bench_host(bodies, kernels, console)
        else:
            result = _bench(
                bodies, tokens, routing, kernels, bias, deterministic, budget, json_file, console
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
    bodies: list[str],
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
    from hopper_mxfp4.bench.bodies import ROUTINGS, without_bias
    from hopper_mxfp4.bench.peers import contenders
    from hopper_mxfp4.bench.run import bench as run

    chosen = parse_bodies(bodies)
    if not bias:
        chosen += [without_bias(body) for body in chosen if body.family.bias]
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


def _bench_host(bodies: list[str], kernels: list[str], console: Console) -> dict[str, Any]:
    from hopper_mxfp4.bench.bodies import random_weights
    from hopper_mxfp4.bench.host import host_overhead
    from hopper_mxfp4.bench.peers import Layer, contenders
    from hopper_mxfp4.bench.run import FORMAT, about

    device = current_device()
    names = kernels or [c.name.removeprefix("ours-") for c in contenders(device) if c.ours]
    rows = [
        in_inference_mode(
            partial(host_overhead, body, Layer(body, random_weights(body, device)), name)
        )
        for body in parse_bodies(bodies or ["gpt-oss-20b"])
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
