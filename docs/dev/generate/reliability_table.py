#!/usr/bin/env python3
"""Write docs/dev/evidence/reliability.md from the recorded test runs (`pytest --results FILE`).

    python docs/dev/generate/reliability_table.py

The runs are in benchmarks/results; `make reliability` and `make gpu` write them anew.
"""

import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "dev" / "evidence" / "reliability.md"
RUNS = {"gpu-tests.json": "GPU", "core-tests.json": "CPU"}  # by file: where it ran

# What is listed: the point, what was tried, and the tests (parametrised or not) that tried it.
ROWS = (
    (
        "FlashInfer's race (its issue 5438)",
        "affected versions refused with the reason and what to install",
        "core/test_compat.py::test_versions",
    ),
    (
        "",
        "the issue's repro: equal calls compared byte for byte",
        "gpu/test_reliability.py::test_the_race_of_flashinfer_5438",
    ),
    (
        "Scale layout",
        "both known layouts told apart",
        "core/test_compat.py::test_known_scale_layouts",
    ),
    ("", "any other layout refused", "core/test_compat.py::test_unknown_scale_layouts"),
    (
        "",
        "weights laid out another way refused",
        "core/test_flashinfer_kernel.py::test_weights_laid_out_another_way",
    ),
    (
        "",
        "the installed FlashInfer's layout, place by place",
        "gpu/test_flashinfer.py::test_layouts_of_the_installed_flashinfer",
    ),
    ("Numerics", "random layers against float64", "core/test_numerics.py::test_random_layers"),
    (
        "",
        "random layers against the float32 reference",
        "gpu/test_reliability.py::test_random_layers",
    ),
    (
        "",
        "random calls of our own kernels beside FlashInfer's",
        "gpu/test_random_cases.py::test_errors_are_no_worse_than_flashinfers",
    ),
    ("", "scale bytes 0, 1, 253, 254", "core/test_numerics.py::test_scales_at_their_ends"),
    ("", "scale bytes 1, 253, 254", "gpu/test_reliability.py::test_scales_at_their_ends"),
    (
        "",
        "scale byte 255 refused with its place",
        "core/test_numerics.py::test_scale_byte_255_is_refused",
    ),
    (
        "",
        "scale bytes 255, and 0 over weights other than zero, refused",
        "gpu/test_reliability.py::test_scales_that_are_refused",
    ),
    (
        "",
        "scale bytes above 128, which narrow alone serves",
        "gpu/test_reliability.py::test_scales_that_only_narrow_takes",
    ),
    ("", "experts of zeros", "core/test_numerics.py::test_experts_of_zeros"),
    ("", "x of zeros, subnormals and very small numbers", "core/test_numerics.py::test_small_x"),
    (
        "",
        "experts of zeros; x of zeros and subnormals",
        "gpu/test_reliability.py::test_zeros_and_subnormals",
    ),
    (
        "",
        "values at the clamp limit and next to it",
        "core/test_numerics.py::test_values_at_the_clamp_limit",
    ),
    (
        "",
        "values at the clamp limit and next to it",
        "gpu/test_reliability.py::test_values_at_the_clamp_limit",
    ),
    ("", "NaN and Inf stay in their row", "core/test_numerics.py::test_a_broken_row_stays_alone"),
    ("", "NaN and Inf stay in their row", "gpu/test_reliability.py::test_a_broken_row_stays_alone"),
    ("", "the smallest layers", "gpu/test_reliability.py::test_the_smallest_layers"),
    ("Routing", "top-k 1 to 8", "core/test_fused_moe.py::test_top_k"),
    ("", "masked ids: < 0 or >= E", "core/test_fused_moe.py::test_holes"),
    ("", "no token", "core/test_fused_moe.py::test_no_tokens"),
    ("", "top-k 1 to 8, one expert, ids of no expert", "gpu/test_reliability.py::test_routing"),
    (
        "",
        "an expert twice in a row, which FlashInfer alone gets wrong",
        "gpu/test_reliability.py::test_an_expert_twice_in_a_row",
    ),
    (
        "",
        "what FlashInfer is handed, one launch against torch's operators",
        "gpu/test_reliability.py::test_what_flashinfer_is_handed",
    ),
    (
        "",
        "masked ids with garbage in their weights and rows",
        "gpu/test_flashinfer.py::test_holes_and_their_garbage_weights",
    ),
    ("", "more tokens than run at a time, to 65,536", "core/test_many_tokens.py::test_parts"),
    ("", "more tokens than run at a time, to 65,536", "gpu/test_reliability.py::test_many_tokens"),
    ("Memory", "peak of preparing", "gpu/test_reliability.py::test_peak_memory_of_preparing"),
    (
        "",
        "rounds of restoring and preparing",
        "gpu/test_reliability.py::test_fifty_rounds_of_restoring_and_preparing",
    ),
    (
        "Threads and processes",
        "two streams and two layers at once",
        "gpu/test_reliability.py::test_two_streams_and_two_layers_at_once",
    ),
    (
        "",
        "two processes with one cache folder",
        "core/test_processes.py::test_two_processes_prepare_and_tune_with_one_cache",
    ),
    (
        "Reload",
        "a captured graph, then other weights: the core",
        "gpu/test_reliability.py::test_a_captured_graph_runs_weights_loaded_later",
    ),
    (
        "",
        "the same inside vLLM",
        "gpu/test_vllm.py::test_a_captured_graph_runs_the_reloaded_weights",
    ),
    (
        "",
        "the same inside SGLang",
        "gpu/test_sglang_layers.py::test_a_captured_graph_runs_the_reloaded_weights",
    ),
    ("Fuzzing", "fused_moe", "core/test_fuzz_calls.py::test_fused_moe"),
    ("", "reference_moe", "core/test_fuzz_calls.py::test_reference_moe"),
    ("", "prepare_experts, restore_weights", "core/test_fuzz_weights.py::test_prepare_experts"),
    (
        "",
        "allocate_weights, family_for, SwiGLU.from_config",
        "core/test_fuzz_weights.py::test_allocate_weights_and_configs",
    ),
    (
        "Supply chain",
        "requirements pinned and hashed",
        "core/test_supply_chain.py::test_requirements_are_pinned_and_hashed",
    ),
    ("", "wheel and sdist, built twice", "core/test_supply_chain.py::test_builds_are_reproducible"),
    (
        "",
        "the wheel in a clean environment",
        "core/test_supply_chain.py::test_the_wheel_in_a_clean_environment",
    ),
    (
        "",
        "no network, nothing unpickled",
        "core/test_supply_chain.py::test_no_network_and_no_pickle_at_import_or_run_time",
    ),
    ("", "the cache is private", "core/test_processes.py::test_the_cache_is_the_users_alone"),
)


INTRODUCTION = """\
# What was tried to make it go wrong

Made by `make reliability` and `make gpu` from the recorded test runs in
[benchmarks/results](../../../benchmarks/results), not written by hand. Each line says what was
tried, how often, and what happened. An ulp is bfloat16's, of the largest element of a row; 4 are
allowed.
"""
NOTES = """
## Limits that these tests show or rest on

- Every kernel but `reference` takes scale byte 0 (2**-127) for zero. Over weights that are all
  zero, as quantisers leave dead groups, that is exact. Over others the layer is refused when it is
  prepared, with the expert and the place. `reference` multiplies by it.
- `wide` can't turn weights with scale bytes above 128 into BF16: `native` runs `narrow` alone for a
  layer that has any, at every number of tokens.
- FlashInfer 0.7.2's kernel computes a row that names an expert twice wrongly, by up to 270 ulps in
  random layers. A top-k never does that. The `flashinfer` kernel merges such experts into one, with
  the sum of their weights, before it calls FlashInfer.
- Where SwiGLU has a limit, FlashInfer's clamp turns a NaN into the limit, so that a broken row of x
  can come out finite. Other rows are not affected.
- More than 16,384 tokens run in parts of 16,384, so that scratch memory stops growing there.

## compute-sanitizer on our own kernels

`benchmarks/checks/sanitizer_cases.py` runs `narrow`, both cuts of `wide` and what stages
FlashInfer's inputs on odd shapes of both families with masked rows, int64 ids and odd strides. What
is recorded so far is of 2026-11-26, on an H200 and an H100, when `smallbatch` stood in the place of
`narrow` and `wide`: memcheck, synccheck and initcheck reported nothing, and so did racecheck once
every lane arrived at the mbarriers. As shipped, one lane arrives for its warp after a `__syncwarp`,
which racecheck does not follow. `narrow` and `wide` have not been run in this form yet.

## A benchmark that hung

Seen on 2026-11-24, explained on 2026-11-26. With CUDA graphs of all kernels alive and replayed in
random order, GPT-OSS hung at 8192 tokens on an H100. The GPU's core dump shows vLLM's Marlin
kernel, with 260 of its 264 blocks waiting for a lock that is never released. The fault was the
benchmark's, neither Marlin's nor one of our kernels': all graphs had been captured into one memory
pool. vLLM creates Marlin's locks at the first call on a stream, which was within the capture. They
came to lie in memory that a graph captured earlier had used and freed, and were overwritten
whenever that graph ran again; torch requires that graphs which share a pool are replayed in the
order of their capture.

Each graph now has memory of its own, and calls run once on the capturing stream before. With that,
all seven kernels ran in random order at 1 and 8192 tokens with equal results; with the old way of
capturing the hang is back (`benchmarks/checks/graphs_in_any_order.py`). The plugin shares no pool
with others: its scratch memory is vLLM's workspace, or allocated for each call.
"""


def runs(folder: Path) -> dict[str, dict]:
    """Where it ran: the JSON of the run, for those that there are."""
    return {
        place: json.loads((folder / name).read_text())
        for name, place in RUNS.items()
        if (folder / name).exists()
    }


def value(v: object) -> str:
    return f"{v:.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)


def seen(tests: list[dict]) -> tuple[int, str]:
    """How often it was tried, and every figure: of several tests the sum, for numbers the range."""
    times = sum(test["seen"].get("times", 1) for test in tests)
    figures: dict[str, list] = {}
    for test in tests:
        for name, v in test["seen"].items():
            if name != "times":
                figures.setdefault(name.replace("_", " "), []).append(v)
    texts = []
    for name, values in figures.items():
        ends = (
            [min(values), max(values)]
            if all(isinstance(v, int | float) for v in values)
            else sorted(set(values))
        )
        texts.append(f"{name} {' to '.join(dict.fromkeys(map(value, ends)))}")
    return times, ", ".join(texts)


def row(point: str, tried: str, name: str, found: dict[str, dict]) -> str:
    place = "GPU" if name.startswith("gpu/") else "CPU"
    pattern = re.compile(re.escape(f"tests/{name}") + r"(\[.*)?$")
    tests = [
        test
        for test in found.get(place, {"tests": []})["tests"]
        if pattern.match(test["test"]) and test["outcome"] != "skipped"
    ]
    if not tests:
        return f"| {point} | {tried} | {place} | | not run yet | |"
    failed = sum(test["outcome"] == "failed" for test in tests)
    times, figures = seen(tests)
    outcome = f"**{failed} of {len(tests)} tests failed**" if failed else "right"
    return f"| {point} | {tried} | {place} | {times:,} | {outcome} | {figures} |"


def page(found: dict[str, dict]) -> str:
    lines = [INTRODUCTION]
    for place, result in found.items():
        gpu = f", {result['gpu']['name']}" if result["gpu"] else ""
        versions = ", ".join(
            f"{n} {v}"
            for n, v in result["versions"].items()
            if v and n in ("hopper-mxfp4", "python", "torch", "flashinfer-python")
        )
        note = f". {result['note']}" if result.get("note") else ""
        told = f"- {place}: {result['when']}{gpu}, {versions}{note}"
        lines += textwrap.wrap(told, 100, subsequent_indent="  ")
    lines += ["", "| | tried | on | times | result | seen |", "|---|---|---|---|---|---|"]
    lines += [row(*entry, found) for entry in ROWS]
    return "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    PAGE.write_text(page(runs(RESULTS)))
