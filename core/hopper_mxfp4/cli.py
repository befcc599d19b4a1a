"""The command line: hopper-mxfp4 check | demo."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="hopper-mxfp4")
def main() -> None:
    """MXFP4 mixture-of-experts layers on NVIDIA Hopper, for GPT-OSS and DeepSeek-V4."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(as_json: bool) -> None:
    """Look at GPU, FlashInfer and frameworks; exit with 1 if something stops the kernels or the plugins."""
    from .check import check as run

    console = Console(stderr=as_json)
    with console.status("looking; a framework's import takes some seconds"):
        lines = list(run())
    if as_json:
        click.echo(json.dumps([line.as_dict() for line in lines], indent=1))
    else:
        for line in lines:
            console.print(f"{MARKS[line.status]:<24} [bold]{escape(line.topic)}[/]: {escape(line.seen)}", soft_wrap=True, highlight=False)
            if line.todo:
                console.print(f"           -> {escape(line.todo)}", soft_wrap=True, highlight=False)
    if any(line.status == "problem" for line in lines):
        raise SystemExit(1)


@main.command()
@click.option("--framework", default="vllm", show_default=True, help="The framework whose engine generates.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path(".demo"), show_default=True, help="Where to work.")
@click.option("--layers", default=2, show_default=True, help="Layers of the checkpoint.")
@click.option("--hidden", default=192, show_default=True, help="Hidden size, a multiple of 32.")
@click.option("--intermediate", default=192, show_default=True, help="Intermediate size of an expert, a multiple of 32.")
@click.option("--experts", default=8, show_default=True, help="Experts of a layer.")
@click.option("--top-k", default=4, show_default=True, help="Experts of a token.")
def demo(framework: str, folder: Path, layers: int, hidden: int, intermediate: int, experts: int, top_k: int) -> None:
    """Make a small GPT-OSS checkpoint, generate from it with a real engine, and compare with transformers."""
    from .demo import CheckpointSizes, DemoFailed, run

    console = Console()
    sizes = CheckpointSizes(layers, hidden, intermediate, experts, top_k)
    try:
        report = run(framework, folder, sizes, console)
    except DemoFailed as failed:
        console.print(f"[red]{escape(str(failed))}[/]", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    table = Table(title=f"greedy tokens, {report.engine} with kernel {report.kernel} against transformers {report.transformers}")
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
