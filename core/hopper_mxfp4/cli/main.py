"""The command line: hopper-mxfp4 check | demo | warmup | tune | bench."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hopper_mxfp4 import __version__

if TYPE_CHECKING:
    import torch

    from hopper_mxfp4.bench.bodies import Body
    from hopper_mxfp4.tuning.tables import Table as TacticTable

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="hopper-mxfp4")
def main() -> None:
    """MXFP4 mixture-of-experts layers on NVIDIA Hopper, for GPT-OSS and DeepSeek-V4."""


def _words(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    return [word for word in (value or "").split() if word]


bodies_option = click.option(
    "--bodies",
    callback=_words,
    help="Layers, apart by spaces: a name, one with -tp2, -tp4, -tp8 or -nobias, or E,H,I,K[,bias].",
)


@main.command()
@bodies_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(bodies: list[str], as_json: bool) -> None:
    """Look at GPU, FlashInfer and frameworks; exit with 1 if something stops the kernels or the plugins."""
    from hopper_mxfp4.bench.bodies import BODIES
    from hopper_mxfp4.cli.check import check as run

    chosen = _bodies(bodies or list(BODIES))
    console = Console(stderr=as_json)
    with console.status("looking; a framework's import takes some seconds"):
        lines = list(run(chosen))
    if as_json:
        click.echo(json.dumps([line.as_dict() for line in lines], indent=1))
    else:
        for line in lines:
            console.print(
                f"{MARKS[line.status]:<24} [bold]{escape(line.topic)}[/]: {escape(line.seen)}",
                soft_wrap=True,
                highlight=False,
            )
            if line.todo:
                console.print(f"           -> {escape(line.todo)}", soft_wrap=True, highlight=False)
    if any(line.status == "problem" for line in lines):
        raise SystemExit(1)


@main.command()
@click.option(
    "--framework", default="vllm", show_default=True, help="The framework whose engine generates."
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where to work.",
)
@click.option("--layers", default=2, show_default=True, help="Layers of the checkpoint.")
@click.option("--hidden", default=192, show_default=True, help="Hidden size, a multiple of 32.")
@click.option(
    "--intermediate",
    default=192,
    show_default=True,
    help="Intermediate size of an expert, a multiple of 32.",
)
@click.option("--experts", default=8, show_default=True, help="Experts of a layer.")
@click.option("--top-k", default=4, show_default=True, help="Experts of a token.")
def demo(
    framework: str,
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
) -> None:
    """Make a small GPT-OSS checkpoint, generate from it with a real engine, and compare with transformers."""
    from hopper_mxfp4.cli.demo import CheckpointSizes, DemoFailed, run

    console = Console()
    sizes = CheckpointSizes(layers, hidden, intermediate, experts, top_k)
    try:
        report = run(framework, folder, sizes, console)
    except DemoFailed as failed:
        console.print(f"[red]{escape(str(failed))}[/]", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    table = Table(
        title=f"greedy tokens, {report.engine} with kernel {report.kernel} against transformers {report.transformers}"
    )
    for column in ("prompt", report.engine, "transformers", "same"):
        table.add_column(column)
    for row in report.rows:
        table.add_row(row.prompt, str(row.engine), str(row.oracle), row.verdict)
    console.print(table)
    console.print(
        f"{report.layers} MXFP4 MoE layers taken over, kernel {report.kernel} called {report.calls} times; "
        f"engine ready in {report.load_s:.1f} s, generated in {report.generate_s:.1f} s; files in {folder}",
        soft_wrap=True,
        highlight=False,
    )
    if not report.same:
        raise SystemExit(1)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left; yields what to call with the text, and how much is done of how much."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, of: bar.update(task, description=text, completed=done, total=of)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        numbers = [int(word) for word in (value or "").replace(",", " ").split()]
    except ValueError:
        numbers = [0]
    if any(n < 1 for n in numbers):
        raise click.BadParameter(
            f"{value!r} is not a list of positive numbers; give for example '1 64 4096'"
        )
    return numbers


def _bodies(names: list[str]) -> "list[Body]":
    from hopper_mxfp4.bench.bodies import DEFAULT_BODIES, parse_body

    try:
        return [parse_body(name) for name in names or DEFAULT_BODIES]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--bodies") from None


def _device() -> "torch.device":
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


tokens_option = click.option(
    "--tokens", callback=_numbers, help="Numbers of tokens, apart by spaces."
)


@main.command()
@bodies_option
def warmup(bodies: list[str]) -> None:
    """Compile the decode kernel for these layers now, into the cache, so that no server waits for it. Needs no GPU."""
    from hopper_mxfp4.kernels.flashinfer import staging
    from hopper_mxfp4.kernels.jit import nvrtc
    from hopper_mxfp4.kernels.smallbatch.kernel import compile_all

    chosen = _bodies(bodies)
    if reason := nvrtc.problem():
        raise click.ClickException(reason)
    with _progress(Console()) as step:
        staging.compile_kernel()
        for done, body in enumerate(chosen):
            step(body.name, done, len(chosen))
            compile_all(body.shape)
        step("done", len(chosen), len(chosen))


@main.command()
@bodies_option
@tokens_option
@click.option(
    "--budget",
    default=600.0,
    show_default=True,
    help="Seconds for everything; what is measured by then is kept.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write all tables to this file, after every bucket.",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep them where this user's servers look for them.",
)
def tune(
    bodies: list[str], tokens: list[int], budget: float, out: Path | None, cache: bool
) -> None:
    """Measure the fastest FlashInfer tactics on this GPU and where smallbatch is faster, for servers to use without tuning."""
    from hopper_mxfp4 import KernelUnavailable
    from hopper_mxfp4.bench.tune import TOKENS
    from hopper_mxfp4.bench.tune import tune as run
    from hopper_mxfp4.tuning import tables as tactics

    begin, chosen, console = time.monotonic(), _bodies(bodies), Console()
    wanted = tokens or list(TOKENS)
    made: dict[str, TacticTable] = {}
    total, done = len(chosen) * (len(wanted) + 2), 0
    with _progress(console) as step:
        for body in chosen:

            def keep(table: "TacticTable", name: str = body.name) -> None:
                made[name] = table
                if out:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    tactics.write(out, made.values())

            def tell(text: str) -> None:
                nonlocal done
                step(text, done, total)
                done += 1

            try:
                deadline = begin + budget
                table = _inference(partial(run, body, _device(), deadline, wanted, keep, tell))
            except KernelUnavailable as error:
                raise click.ClickException(str(error)) from None
            if table and cache:
                tactics.save(table)
        step("done", total, total)
    for name, found in made.items():
        console.print(_tuned(name, found))
    missing = [
        body.name
        for body in chosen
        if body.name not in made or len(made[body.name].buckets) < len(wanted)
    ]
    if missing:
        console.print(
            f"the time budget was over: incomplete are {', '.join(missing)}", style="yellow"
        )
    if not made:
        raise SystemExit(1)


def _inference(run: Callable[[], Any]) -> Any:
    import torch

    with torch.inference_mode():  # as serving does
        return run()


def _tuned(name: str, found: "TacticTable") -> Table:
    table = Table(
        title=f"{name}: {found.shape} on {found.build.gpu}, FlashInfer {found.build.flashinfer}",
        title_justify="left",
    )
    for column in ("tokens", "pair", "us", "default us", "default / tuned"):
        table.add_column(column, justify="right")
    for b in found.buckets:
        table.add_row(
            str(b.tokens),
            str(b.pair),
            f"{b.us:.1f}",
            f"{b.default_us:.1f}",
            f"{b.default_us / b.us:.2f}",
        )
    table.caption = f"one pair for all: {found.fixed}; smallbatch: {_smallbatch(found)}"
    return table


def _smallbatch(found: "TacticTable") -> str:
    seen, most = found.smallbatch, found.buckets[-1].tokens
    if seen is None:
        return "not measured"
    faster = {None: f"faster at all up to {most} tokens", 0: "nowhere faster"}.get(
        seen.tokens, f"faster up to {seen.tokens} tokens"
    )
    return faster + ("" if seen.wide_from is None else f", tiles of 16 from {seen.wide_from}")


@main.command()
@bodies_option
@tokens_option
@click.option(
    "--routing",
    callback=_words,
    default="uniform",
    show_default=True,
    help="uniform, skewed or both, apart by spaces.",
)
@click.option(
    "--kernels",
    callback=_words,
    help="Beginnings of the kernels' names, apart by spaces. Default: all.",
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
    "--budget",
    default=600.0,
    show_default=True,
    help="Seconds for everything; what is measured by then is kept.",
)
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
    """Time one MoE layer: our kernels, stock FlashInfer and the frameworks' own, against what the GPU could do."""
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

    chosen = _bodies(bodies)
    if not bias:
        chosen += [without_bias(body) for body in chosen if body.family.bias]
    device = _device()
    found = contenders(device, deterministic)
    names = report.names_of(kernels, [c.name for c in found], "kernel")
    routings = report.names_of(routing, ROUTINGS, "routing")

    def keep(result: dict[str, Any]) -> None:
        if json_file:
            report.save(json_file, result)

    with _progress(console) as step:
        wanted = [c for c in found if c.name in names]
        sizes = tokens or [2**n for n in range(14)]
        return _inference(lambda: run(chosen, sizes, routings, wanted, device, budget, keep, step))


def _bench_host(bodies: list[str], kernels: list[str], console: Console) -> dict[str, Any]:
    from hopper_mxfp4.bench.bodies import random_weights
    from hopper_mxfp4.bench.host import host_overhead
    from hopper_mxfp4.bench.peers import Layer, contenders
    from hopper_mxfp4.bench.run import FORMAT, about

    device = _device()
    names = kernels or [c.name.removeprefix("ours-") for c in contenders(device) if c.ours]
    rows = [
        _inference(partial(host_overhead, body, Layer(body, random_weights(body, device)), name))
        for body in _bodies(bodies or ["gpt-oss-20b"])
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
