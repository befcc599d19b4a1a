"""`hopper-mxfp4 tune`: measure tables for this GPU."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from hopper_mxfp4.cli.options import (
    budget_option,
    current_device,
    in_inference_mode,
    parse_workloads,
    progress,
    tokens_option,
    workloads_option,
)

if TYPE_CHECKING:
    from hopper_mxfp4.tuning.tables import Table as TacticTable


@click.command()
@workloads_option
@tokens_option
@budget_option
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
    workloads: list[str], tokens: list[int], budget: float, out: Path | None, cache: bool
) -> None:
    """Measure FlashInfer's fastest tactics on this GPU, for servers that run the flashinfer kernel
    to use without tuning.
    """
    from hopper_mxfp4 import KernelUnavailable
    from hopper_mxfp4.bench.tune import TOKENS
    from hopper_mxfp4.bench.tune import tune as run
    from hopper_mxfp4.tuning import tables as tactics

    begin, chosen, console = time.monotonic(), parse_workloads(workloads), Console()
    wanted = tokens or list(TOKENS)
    made: dict[str, TacticTable] = {}
    total, done = len(chosen) * (len(wanted) + 1), 0
    with progress(console) as step:
        for workload in chosen:

            def keep(table: "TacticTable", name: str = workload.name) -> None:
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
                table = in_inference_mode(
                    partial(run, workload, current_device(), deadline, wanted, keep, tell)
                )
            except KernelUnavailable as error:
                raise click.ClickException(str(error)) from None
            if table and cache:
                tactics.save(table)
        step("done", total, total)
    for name, found in made.items():
        console.print(_tuned(name, found))
    missing = [
        workload.name
        for workload in chosen
        if workload.name not in made or len(made[workload.name].buckets) < len(wanted)
    ]
    if missing:
        console.print(
            f"the time budget was over: incomplete are {', '.join(missing)}", style="yellow"
        )
    if not made:
        raise SystemExit(1)


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
    table.caption = f"one pair for all: {found.fixed}"
    return table
