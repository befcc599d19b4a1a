"""What the commands share: options, a progress bar, the device."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    import torch

    from hopper_mxfp4.bench.workloads import Workload


def words(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    return [word for word in (value or "").split() if word]


workloads_option = click.option(
    "--workloads",
    callback=words,
    help="Layers, separated by spaces: a name, one with -tp2, -tp4, -tp8 or -nobias, or "
    "E,H,I,K[,bias].",
)


def numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        found = [int(word) for word in (value or "").replace(",", " ").split()]
    except ValueError:
        found = [0]
    if any(n < 1 for n in found):
        raise click.BadParameter(
            f"{value!r} is not a list of positive numbers; give for example '1 64 4096'"
        )
    return found


def engine_options(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[str, Any]:
    """NAME=VALUE each; a value that is no JSON is text."""
    found: dict[str, Any] = {}
    for given in value:
        name, equals, text = given.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{given!r} is not NAME=VALUE, such as tensor_parallel_size=2")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def parse_workloads(names: list[str]) -> "list[Workload]":
    from hopper_mxfp4.bench.workloads import DEFAULT_WORKLOADS, parse_workload

    try:
        return [parse_workload(name) for name in names or DEFAULT_WORKLOADS]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--workloads") from None


def current_device() -> "torch.device":
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


tokens_option = click.option(
    "--tokens", callback=numbers, help="Numbers of tokens, separated by spaces."
)

budget_option = click.option(
    "--budget",
    default=600.0,
    show_default=True,
    help="Seconds for everything; what is measured by then is kept.",
)


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left; yields what to call with the text, and how much is done of how
    much.
    """
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


def in_inference_mode(run: Callable[[], Any]) -> Any:
    import torch

    with torch.inference_mode():  # as serving does
        return run()
