"""Bench's JSON as tables and plots."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hopper_mxfp4.bench.run import FORMAT, Result
from hopper_mxfp4.cache import write_json

Rows = list[dict[str, Any]]


def save(path: Path, result: Result) -> None:
    """Write a result, all or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def load(path: Path) -> Result:
    """Read what `save` wrote. Raises ValueError naming what is wrong, and OSError."""
    try:
        result = json.loads(path.read_text())
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']!r}, and this release reads {FORMAT}")
        for row in result["rows"]:
            row["workload"], row["routing"], row["tokens"], row["kernel"], row["roofline_us"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a result of `hopper-mxfp4 bench --json` ({type(error).__name__}: "
            f"{error})"
        ) from error
    return dict(result)


def groups(result: Result) -> Iterator[tuple[str, str, Rows]]:
    """workload, routing and the rows of each table, in the order in which they were measured."""
    keys = dict.fromkeys((row["workload"], row["routing"]) for row in result["rows"])
    for workload, routing in keys:
        yield (
            workload,
            routing,
            [
                row
                for row in result["rows"]
                if (row["workload"], row["routing"]) == (workload, routing)
            ],
        )


def activations(row: dict[str, Any]) -> str:
    """What a row's kernel multiplies the weights with, see `baselines.Baseline`; results of old do
    not say.
    """
    return str(row.get("activations", "bf16"))


def fastest(rows: Rows, ours: bool, precision: str) -> dict[str, Any] | None:
    """The fastest of our kernels, or of the baselines, with such activations among the rows of one
    point.
    """
    found = [
        row for row in rows if row["ours"] is ours and "us" in row and activations(row) == precision
    ]
    return min(found, key=lambda row: row["us"], default=None)


def best_baselines(rows: Rows) -> str:
    """How many times as long as ours the best baseline takes, in words for a table's cell.

    A baseline is compared with our kernels of the same activations. One that rounds activations to
    8 bits where none of ours does computes something else: it is set beside our fastest, and
    marked.
    """
    told = []
    for precision in ("bf16", "fp8"):
        baseline = fastest(rows, False, precision)
        mine = fastest(rows, True, precision)
        beside = mine or fastest(rows, True, "bf16")
        if baseline and beside:
            mark = "" if mine else f" ({precision} activations)"
            told.append(f"{baseline['us'] / beside['us']:.2f} {baseline['kernel']}{mark}")
    return "; ".join(told)


def by_tokens(rows: Rows) -> dict[int, Rows]:
    return {
        m: [row for row in rows if row["tokens"] == m]
        for m in sorted({row["tokens"] for row in rows})
    }


def share(row: dict[str, Any]) -> float:
    """Roofline over time: 1 is a kernel that can't be faster here."""
    return row["roofline_us"] / row["us"]


def show(result: Result, console: Console) -> None:
    """Print a table a workload and routing, what is absent and what was missed."""
    told = result["about"]
    rates = (
        f"; measured {told['bytes_per_s'] / 1e12:.3g} TB/s and {told['flops_per_s'] / 1e12:.4g} "
        "TFLOP/s"
        if "bytes_per_s" in told
        else ""
    )
    console.print(f"{told['device']}, {told['when']}{rates}", highlight=False)
    for workload, routing, rows in groups(result):
        console.print(
            _table(f"{workload}, {routing} routing: us a call, and its share of the roofline", rows)
        )
    _print_errors(result, console)
    for kernel, why in dict.fromkeys((item["kernel"], item["why"]) for item in result["absent"]):
        workloads = [
            item["workload"]
            for item in result["absent"]
            if (item["kernel"], item["why"]) == (kernel, why)
        ]
        console.print(
            f"absent: {kernel} for {', '.join(workloads)}: {escape(why)}",
            highlight=False,
            soft_wrap=True,
        )
    if result["missed"]:
        console.print(
            f"{result['missed']} measurements were missed: the time budget was over", style="yellow"
        )


def _table(title: str, rows: Rows) -> Table:
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    table = Table(title=title, title_justify="left")
    for column in ("M", "experts", "roofline", *names, "best baseline / ours"):
        table.add_column(column, justify="right")
    for m, at in by_tokens(rows).items():
        cells = {
            row["kernel"]: f"{row['us']:.1f} {share(row):4.0%}" if "us" in row else "[red]failed[/]"
            for row in at
        }
        table.add_row(
            str(m),
            f"{at[0]['active_experts']:g}",
            f"{at[0]['roofline_us']:.1f}",
            *(cells.get(n, "") for n in names),
            best_baselines(at),
        )
    return table


def _print_errors(result: Result, console: Console) -> None:
    """A fast wrong kernel is no baseline: the largest difference from our first kernel, and what
    failed.
    """
    for name in dict.fromkeys(row["kernel"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kernel"] == name]
        errors = [row["relative_l2"] for row in rows if "relative_l2" in row]
        spread = [(row["high"] - row["low"]) / row["us"] for row in rows if "us" in row]
        if errors:
            console.print(
                f"{name}: relative L2 from ours at most {max(errors):.2g}, spread at most "
                f"{max(spread):.0%}",
                highlight=False,
            )
        for why in dict.fromkeys(row["failed"] for row in rows if "failed" in row):
            where = sorted({row["tokens"] for row in rows if row.get("failed") == why})
            console.print(
                f"[red]failed[/]: {name} at M={where}: {escape(why)}",
                highlight=False,
                soft_wrap=True,
            )


# --- Plots ---------------------------------------------------------------------------------------


def plot(result: Result, path: Path, routing: str = "uniform") -> None:
    """Time and share of the roofline against M, a row of two plots a workload; the file's suffix
    says the format.

    Raises ImportError without matplotlib and ValueError where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; pip install 'hopper-mxfp4[bench]', here or where you copy the "
            "JSON to"
        ) from error
    drawn = [
        (workload, rows)
        for workload, r, rows in groups(result)
        if r == routing and any("us" in row for row in rows)
    ]
    if not drawn:
        raise ValueError(f"there is no measurement with {routing} routing to plot")
    figure = Figure(figsize=(15, 5.2 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 2, squeeze=False)
    for (workload, rows), (times, shares) in zip(drawn, axes, strict=True):
        rooflines = {m: at[0]["roofline_us"] for m, at in by_tokens(rows).items()}
        times.plot(
            list(rooflines), list(rooflines.values()), color="black", linestyle=":", linewidth=1
        )
        ends: dict[str, tuple[float, float, str]] = {
            "roofline": (max(rooflines), rooflines[max(rooflines)], "black")
        }
        share_ends: dict[str, tuple[float, float, str]] = {}
        names = list(dict.fromkeys(row["kernel"] for row in rows if "us" in row))
        for i, name in enumerate(names):
            mine = sorted(
                (row for row in rows if row["kernel"] == name and "us" in row),
                key=lambda row: row["tokens"],
            )
            style: dict[str, Any] = {
                "color": f"C{i % 10}",
                "linewidth": 2.4 if mine[0]["ours"] else 1.2,
                "marker": "o",
                "markersize": 3,
            }
            m = [row["tokens"] for row in mine]
            times.plot(m, [row["us"] for row in mine], **style)
            times.fill_between(
                m,
                [row["low"] for row in mine],
                [row["high"] for row in mine],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
            shares.plot(m, [100 * share(row) for row in mine], **style)
            ends[name] = (m[-1], mine[-1]["us"], style["color"])
            share_ends[name] = (m[-1], 100 * share(mine[-1]), style["color"])
        times.set(
            xscale="log",
            yscale="log",
            xlabel="tokens M",
            ylabel="microseconds a call",
            title=f"{workload}: time",
        )
        shares.set(
            xscale="log",
            ylim=(0, 100),
            xlabel="tokens M",
            ylabel="roofline / time, %",
            title=f"{workload}: share of the roofline",
        )
        for axis, labels, log in ((times, ends, True), (shares, share_ends, False)):
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(rooflines), [str(m) for m in rooflines], fontsize=7)
            axis.grid(alpha=0.25)
            _label_ends(axis, labels, log)
    told = result["about"]
    figure.suptitle(
        f"{told['device']}, {told['when']}, {routing} routing, CUDA-graph replay", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _label_ends(axis: Any, labels: dict[str, tuple[float, float, str]], log: bool) -> None:
    """Each line's name at its right end, in its colour, moved apart where they would overlap."""
    to_display, from_display = axis.transData.transform, axis.transData.inverted().transform
    axis.figure.canvas.draw()
    placed = -1e9
    for name, (x, y, colour) in sorted(labels.items(), key=lambda item: item[1][1]):
        placed = max(to_display((x, y))[1], placed + 11)  # pixels from one label to the next
        text_y = from_display((to_display((x, y))[0], placed))[1]
        axis.annotate(
            name,
            (x, y),
            xytext=(max(v[0] for v in labels.values()) * 1.15, text_y),
            color=colour,
            fontsize=8,
            va="center",
        )
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.3)  # room for the names


def names_of(values: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Those of the known names that begin with one of the values (all for none). Raises ValueError
    for a value that matches none.
    """
    for value in values:
        if not any(name.startswith(value) for name in known):
            raise ValueError(f"no {what} begins with {value!r}; there are {', '.join(known)}")
    return [name for name in known if not values or any(name.startswith(value) for value in values)]
