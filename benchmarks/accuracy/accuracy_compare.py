#!/usr/bin/env python3
"""Compare two sides' answers to the same questions: accuracy_compare.py FOLDER FOLDER.

Each folder is an lm-eval --output_path with --log_samples, one per side. Several runs in a folder
are repeats and are averaged question by question. Needs nothing but Python.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

# (task, filter) -> question -> (score, text) of each run
Side = dict[tuple[str, str], dict[tuple[int, str], list[tuple[float, str]]]]


def read(folder: Path) -> Side:
    side: Side = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.stem.removeprefix("samples_").rsplit("_", 1)[0]
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            score = float(sample[sample["metrics"][0]])
            side[task, sample["filter"]][sample["doc_id"], sample["doc_hash"]].append(
                (score, sample["resps"][0][0])
            )
    if not side:
        raise SystemExit(
            f"no samples_*.jsonl under {folder}: "
            f"run lm_eval with --output_path {folder} --log_samples"
        )
    return side


def table(first: Path, second: Path) -> str:
    a, b = read(first), read(second)
    lines = [
        f"| task, filter | questions x runs | {first.name} | {second.name} | difference "
        f"| its standard error | {first.name} better | {second.name} better "
        "| same text | empty |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted(a.keys() & b.keys()):
        both = sorted(a[key].keys() & b[key].keys())
        if len(both) < max(len(a[key]), len(b[key]), 2):
            raise SystemExit(
                f"{key[0]}: {len(a[key])} and {len(b[key])} questions, "
                f"{len(both)} of them the same; run both sides alike"
            )
        runs = {len(samples) for side in (a, b) for samples in side[key].values()}
        if len(runs) > 1:
            raise SystemExit(
                f"{key[0]}: {min(runs)} to {max(runs)} runs of a question; "
                "run both sides as often, each into its own folder"
            )
        scores = [(fmean(s for s, _ in a[key][q]), fmean(s for s, _ in b[key][q])) for q in both]
        change = [y - x for x, y in scores]
        same = sum(x[1] == y[1] for q in both for x, y in zip(a[key][q], b[key][q], strict=True))
        empty = [
            sum(not text for samples in side[key].values() for _, text in samples)
            for side in (a, b)
        ]
        lines.append(
            f"| {', '.join(key)} | {len(both)} x {runs.pop()} "
            f"| {fmean(x for x, _ in scores):.2%} | {fmean(y for _, y in scores):.2%} "
            f"| {fmean(change):+.2%} | {stdev(change) / len(both) ** 0.5:.2%} "
            f"| {sum(d < 0 for d in change)} | {sum(d > 0 for d in change)} "
            f"| {same} | {empty[0]}, {empty[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(table(Path(sys.argv[1]), Path(sys.argv[2])))
