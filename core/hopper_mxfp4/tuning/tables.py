"""Tactic tables: which pair of FlashInfer's GEMM kernels is fastest for a shape and a number of
tokens.

`hopper-mxfp4 tune` measures them into JSON: the package ships what it measured (the files beside
this one), a user's own lie in the cache directory. Reading them costs no GPU work; a call then
costs one bisect. A tactic is a number in FlashInfer's own list, which is the same for one
FlashInfer version and number of tactics; its time also depends on the GPU and the compiled module,
so all four are kept with a table. Where this GPU has none, the nearest card's serves (see
cards.py), and a line says so.
"""

import json
import logging
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hopper_mxfp4 import env
from hopper_mxfp4.cache import folder as cache_folder
from hopper_mxfp4.cache import write_json
from hopper_mxfp4.tuning.cards import Card, apart, card_of

logger = logging.getLogger(__name__)

FORMAT = 1
DEFAULT = -1  # in a pair: whatever FlashInfer takes when it is told nothing
Pair = tuple[int, int]
UNKNOWN: Pair = (0, 0)


@dataclass(frozen=True)
class Build:
    """What a tactic's meaning (flashinfer, counts) and its time (gpu, module) depend on.

    gpu: torch's name of the device. flashinfer: its version. module: compat.module_hash().
    counts: how many tactics it has for the first and the second GEMM; UNKNOWN where it does not
        tell.
    """

    gpu: str
    flashinfer: str
    module: str
    counts: Pair


@dataclass(frozen=True)
class TunedShape:
    """One rank's layer as the kernel sees it: hidden and intermediate are the padded sizes.

    finalize: "fused" where the second GEMM's epilogue may sum a token's experts, else "separate".
    """

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    bias: bool
    finalize: str

    def __str__(self) -> str:
        bias = " bias" if self.bias else ""
        sizes = f"{self.hidden}x{self.intermediate}"
        return f"{self.experts} experts top-{self.top_k} {sizes}{bias} {self.finalize}"


@dataclass(frozen=True)
class Bucket:
    """The pair measured best at so many tokens, its time and that of FlashInfer's default pair, in
    microseconds a call.
    """

    tokens: int
    pair: Pair
    us: float
    default_us: float


@dataclass(frozen=True)
class Table:
    """Buckets by tokens.

    fixed: the one pair to use for every number of tokens; None if not measured.
    """

    build: Build
    shape: TunedShape
    buckets: tuple[Bucket, ...]
    fixed: Pair | None = None
    source: str = ""  # the file it came from


class Schedule(NamedTuple):
    """pairs[bisect_left(edges, tokens)] is the pair for a number of tokens."""

    edges: list[float]
    pairs: list[Pair]

    def pair(self, tokens: int) -> Pair:
        return self.pairs[bisect_left(self.edges, tokens)]


def schedule(
    table: Table, shape: TunedShape, valid: Callable[[int, int], bool], fixed: bool = False
) -> Schedule:
    """What a layer of that shape runs by that table, which may be another shape's.

    Buckets then stand for the same tokens an expert. valid(gemm, tactic), gemm 1 or 2: whether a
    tactic can run at this shape; one that can't becomes the default. fixed: one pair for every
    number of tokens.
    """

    def checked(pair: Pair) -> Pair:
        first, second = (
            t if t == DEFAULT or valid(gemm, t) else DEFAULT for gemm, t in enumerate(pair, start=1)
        )
        return first, second

    if fixed:
        pair = table.fixed or min(table.buckets, key=lambda b: abs(math.log(b.tokens / 256))).pair
        return Schedule([], [checked(pair)])
    per_expert = (shape.experts / shape.top_k) / (table.shape.experts / table.shape.top_k)
    tokens = [bucket.tokens * per_expert for bucket in table.buckets]
    edges = [math.sqrt(a * b) for a, b in pairwise(tokens)]
    return Schedule(edges, [checked(bucket.pair) for bucket in table.buckets])


def choose(shape: TunedShape, build: Build, card: Card | None = None) -> tuple[Table | None, str]:
    """The table to run a shape by, and where it is from in words; None where none is similar
    enough.

    A tactic's number means the same kernel in the same FlashInfer version. Another version's
    tables are taken where there are none of this one, if it has as many tactics: they are an
    enumeration, and what changes that nearly always changes how many there are. Then this GPU
    before another, the nearest shape, the nearest card, this compiled module before another, the
    user's table before a shipped one. The same files give the same answer on every rank.
    card: this GPU; left out, what is known by its name.
    """
    card = card or card_of(build.gpu)
    found = sorted(
        (
            (
                t.build.flashinfer != build.flashinfer,
                t.build.gpu != build.gpu,
                round(_distance(t.shape, shape), 6),
                t.shape.bias != shape.bias,
                round(apart(card, card_of(t.build.gpu)), 6),
                t.build.module != build.module,
                i,
            ),
            t,
        )
        for i, t in enumerate(tables())
        if t.shape.finalize == shape.finalize
        and _same_tactics(t.build, build)
        and _similar(t.shape, shape)
    )
    if not found:
        return None, (
            f"no table for FlashInfer {build.flashinfer}, or for one with as many tactics, "
            "has a shape like it"
        )
    table = found[0][1]
    return table, _where(table, shape, build, card)


def _same_tactics(there: Build, here: Build) -> bool:
    if there.flashinfer == here.flashinfer:
        return here.counts in (there.counts, UNKNOWN)
    return here.counts == there.counts


def _where(table: Table, shape: TunedShape, build: Build, card: Card | None) -> str:
    there = table.build
    of = "this shape" if table.shape == shape else f"{table.shape}, the nearest shape,"
    words = f"measured for {of}"
    if there.gpu == build.gpu:
        words += " on this kind of GPU"
    else:
        known = card and card_of(there.gpu)
        why = "the nearest to this one" if known else "which this one can't be compared with"
        words += f" on another GPU, {there.gpu}, {why},"
    if there.flashinfer != build.flashinfer:
        words += f" with another FlashInfer, {there.flashinfer}"
        words += " of as many tactics" if there.counts == build.counts else ""
    elif there.module != build.module:
        words += " with another build of FlashInfer's module"
    return f"{words.removesuffix(',')} ({table.source})"


def _similar(a: TunedShape, b: TunedShape) -> bool:
    return (
        abs(math.log2(a.hidden / b.hidden)) <= 1
        and abs(math.log2(a.intermediate / b.intermediate)) <= 2
    )


def _distance(a: TunedShape, b: TunedShape) -> float:
    """Tiles see the GEMMs' sizes; the number of experts mostly through tokens an expert, which
    `schedule` allows for.
    """

    def apart(x: int, y: int) -> float:
        return abs(math.log2(x / y))

    sizes = apart(a.hidden, b.hidden) + apart(a.intermediate, b.intermediate)
    return sizes + (apart(a.experts, b.experts) + apart(a.top_k, b.top_k)) / 4


# --- Files ---------------------------------------------------------------------------------------


@cache
def tables() -> tuple[Table, ...]:
    """Every readable table, the user's first. Read once a process; `tables.cache_clear` makes it
    look again.
    """
    return tuple(_read_all(_cache_files())) + tuple(_read_all(_shipped_files()))


def save(table: Table) -> Path | None:
    """Keep a table in the user's cache; returns the file, or None, with one warning, where that
    can't be written.
    """
    s, b = table.shape, table.build
    sizes = f"{s.experts} {s.hidden} {s.intermediate} {s.top_k} {int(s.bias)} {s.finalize}"
    name = f"{b.gpu} {b.flashinfer} {b.module} {sizes}"
    try:
        path = cache_folder("tactics", make=True) / (
            re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json"
        )
        write(path, [table])
    except (OSError, ImportError) as error:
        logger.warning(
            "tactics can't be kept in the cache: %s; set %s to a folder of yours",
            error,
            env.CACHE_DIR.name,
        )
        return None
    tables.cache_clear()
    return path


def write(path: Path, found: Iterable[Table]) -> None:
    """Write tables to a file, all or nothing. Raises OSError."""
    items = []
    for table in found:
        item = asdict(table)
        del item["source"]
        items.append(item)
    write_json(path, {"format": FORMAT, "tables": items})


def read(path: Path) -> list[Table]:
    """The tables of a file. Raises ValueError, saying what is wrong, for anything but what `write`
    writes, and OSError.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, and this release reads {FORMAT}")
        return [_table(item, str(path)) for item in content["tables"]]
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:  # JSON's and Unicode's errors are ValueErrors
        raise ValueError(
            f"{path} is not a tactic table of this release ({type(error).__name__}: {error})"
        ) from error


def _table(item: Any, source: str) -> Table:
    build, shape = Build(**item["build"]), TunedShape(**item["shape"])
    build = Build(
        str(build.gpu),
        str(build.flashinfer),
        str(build.module),
        _pair(build.counts, (1, 1), (1 << 16, 1 << 16)),
    )
    sizes = (shape.experts, shape.hidden, shape.intermediate, shape.top_k, *build.counts)
    if (
        not all(type(n) is int and n > 0 for n in sizes)
        or type(shape.bias) is not bool
        or shape.finalize not in ("fused", "separate")
    ):
        raise ValueError(f"build {item['build']}, shape {item['shape']}")
    # FlashInfer numbers the second GEMM's tactics on from the first's; -1 is its default.
    first, second = build.counts
    low, high = (0, first), (first - 1, first + second - 1)
    buckets = tuple(
        Bucket(b["tokens"], _pair(b["pair"], low, high), float(b["us"]), float(b["default_us"]))
        for b in item["buckets"]
    )
    if not all(0 < us < math.inf for b in buckets for us in (b.us, b.default_us)):
        raise ValueError(f"buckets {item['buckets']}")
    tokens = [bucket.tokens for bucket in buckets]
    if (
        not tokens
        or any(type(n) is not int or n < 1 for n in tokens)
        or tokens != sorted(set(tokens))
    ):
        raise ValueError(f"buckets at {tokens} tokens")
    fixed = None if item["fixed"] is None else _pair(item["fixed"], low, high)
    return Table(build, shape, buckets, fixed, source)


def _pair(value: Any, low: Pair, high: Pair) -> Pair:
    a, b = value
    for n, least, most in zip((a, b), low, high, strict=True):
        if type(n) is not int or not (n == DEFAULT or least <= n <= most):
            raise ValueError(f"pair {value}")
    return a, b


def _read_all(files: Iterable[Path]) -> Iterator[Table]:
    for path in files:
        try:
            yield from read(path)
        except (ValueError, OSError) as error:
            logger.warning("ignored: %s", error)


def _shipped_files() -> list[Path]:
    return sorted(
        Path(str(p)) for p in resources.files(__package__).iterdir() if p.name.endswith(".json")
    )


def _cache_files() -> list[Path]:
    try:
        return sorted(cache_folder("tactics").glob("*.json"))
    except (OSError, ImportError) as error:
        logger.warning("the cache of tactics is ignored: %s", error)
        return []
