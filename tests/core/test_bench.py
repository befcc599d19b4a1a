"""Bench on a CPU: the reference kernel at tiny sizes through the real command line; what is
measured, written, drawn and left out.
"""

import json
import math
from functools import partial
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from hopper_mxfp4 import GPT_OSS
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.bench import baselines, report
from hopper_mxfp4.bench.baselines import Baseline, Contender, Layer, contenders
from hopper_mxfp4.bench.run import bench, coarse_first, roofline
from hopper_mxfp4.bench.timing import Rates, time_beside, time_calls, time_host, timings_or_raise
from hopper_mxfp4.bench.workloads import (
    WORKLOADS,
    active_experts,
    copies_needed,
    make_batch,
    parse_workload,
    prepare_copies,
    random_weights,
    rotation,
    without_bias,
)
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.hookspecs import hookimpl

CPU = torch.device("cpu")
TINY = "8,64,32,2"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_line(tmp_path):
    """One run: every point in the JSON, a table on the terminal, a plot of it afterwards."""
    file = tmp_path / "new" / "bench.json"
    done = run(
        "--workloads",
        f"{TINY} 4,64,64,2,bias",
        "--tokens",
        "1,4",
        "--routing",
        "uniform skewed",
        "--budget",
        600,
        "--json",
        file,
    )
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    rows = result["rows"]
    points = {(row["workload"], row["routing"], row["tokens"]) for row in rows}
    assert points == {
        (workload, routing, m)
        for workload in (TINY, "4,64,64,2,bias")
        for routing in ("uniform", "skewed")
        for m in (1, 4)
    }
    for row in rows:
        assert row["kernel"] == "ours-reference"
        assert row["ours"] is True
        assert 0 < row["low"] <= row["us"] <= row["high"]
        assert row["samples"] >= 10
        assert row["roofline_us"] > 0
        assert row["relative_l2"] == 0
    assert result["missed"] == 0
    assert result["about"]["versions"]["torch"] == torch.__version__
    absent = {item["kernel"]: item["why"] for item in result["absent"]}
    assert absent.keys() == {
        "flashinfer-autotuned",
        "flashinfer-default",
        "vllm-marlin",
        "vllm-triton",
        "vllm-humming",
        "vllm-humming-fp8",
    }
    assert "needs a Hopper GPU" in absent["flashinfer-default"]
    for text in (
        TINY,
        "skewed routing",
        "best baseline / ours",
        "absent: flashinfer-autotuned",
        "ours-reference",
    ):
        assert text in done.output
    picture = tmp_path / "plot.svg"
    again = run("--from", file, "--plot", picture)
    assert again.exit_code == 0, again.output
    assert (
        again.output.splitlines()[1:]
        == done.output.splitlines()[-len(again.output.splitlines()) + 1 :]
    ), "the same tables"
    drawn = picture.read_text()
    assert drawn.count("<svg") == 1
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workloads", "gpt-oss-7b"], ["'gpt-oss-7b'", "gpt-oss-20b-tp4", "EXPERTS,HIDDEN"]),
        (["--workloads", "8,64,33,2"], ["'8,64,33,2'", "multiples of 32"]),
        (["--workloads", "2,64,32,3"], ["'2,64,32,3'"]),
        (["--tokens", "1 two"], ["'1 two'", "list of positive numbers"]),
        (["--tokens", "0"], ["'0'"]),
        (
            ["--workloads", TINY, "--kernels", "marlin"],
            ["'marlin'", "ours-reference", "flashinfer-default"],
        ),
        (["--workloads", TINY, "--routing", "round"], ["'round'", "uniform, skewed"]),
    ],
)
def test_what_it_cannot_do(arguments, parts):
    done = run(*arguments)
    assert done.exit_code != 0
    for part in parts:
        assert part in " ".join(done.output.replace("│", "").split())


def test_a_file_that_is_no_result(tmp_path):
    file = tmp_path / "x.json"
    for text in (
        "",
        "[]",
        '{"format": 7, "rows": []}',
        '{"format": 1, "rows": [{"workload": "x"}]}',
    ):
        file.write_text(text)
        done = run("--from", file)
        assert done.exit_code == 1
        assert "is not a result of `hopper-mxfp4 bench --json`" in " ".join(done.output.split())


def test_plots_need_measurements(tmp_path):
    with pytest.raises(ValueError, match="no measurement with uniform routing"):
        report.plot({"about": {}, "rows": []}, tmp_path / "x.png")


def test_host():
    done = run("--host", "--workloads", TINY)
    assert done.exit_code == 0, done.output
    assert "total_us" in done.output


def baseline(name, factor=1.0, fails_at=None):
    """Ours again, with its output multiplied and failing at one size."""

    def build(layer):
        ours = contenders(CPU)[0].build(layer)

        def bind(call):
            if len(call.x) == fails_at:
                raise RuntimeError("too many\nlines")
            run_ours = ours(call)
            return lambda: run_ours() * factor

        return bind

    return Contender(name, False, build)


def absent_baseline(layer):
    raise ModuleNotFoundError("No module named 'nobody'")


@pytest.fixture(scope="module")
def measured():
    found = [
        contenders(CPU)[0],
        baseline("good"),
        baseline("wrong", 2.0),
        baseline("flaky", fails_at=4),
        Contender("nobody", False, absent_baseline),
    ]
    seen, steps = [], []
    result = bench(
        [parse_workload(TINY)],
        [1, 2, 4],
        ["uniform"],
        found,
        CPU,
        60,
        lambda r: seen.append(len(r["rows"])),
        lambda *s: steps.append(s),
    )
    return result, seen, steps


def test_a_peer_that_is_wrong_shows(measured):
    result, _, _ = measured
    errors = {row["kernel"]: row["relative_l2"] for row in result["rows"] if row["tokens"] == 2}
    assert errors["ours-reference"] == errors["good"] == 0
    assert errors["wrong"] == pytest.approx(1)


def test_a_peer_that_fails_or_is_absent_ends_nothing(measured):
    result, _, _ = measured
    failed = [row for row in result["rows"] if "failed" in row]
    assert [(row["kernel"], row["tokens"], row["failed"]) for row in failed] == [
        ("flaky", 4, "RuntimeError: too many")
    ]
    assert "us" not in failed[0]
    assert result["absent"] == [
        {
            "workload": TINY,
            "kernel": "nobody",
            "why": "ModuleNotFoundError: No module named 'nobody'",
        }
    ]
    assert len(result["rows"]) == 4 * 3


def test_one_that_fails_when_it_is_timed_ends_nothing():
    """Its first calls may go well, and a graph's replay fail for want of memory."""

    def failing_later(layer):
        run_ours, ran = contenders(CPU)[0].build(layer), []

        def bind(call):
            run = run_ours(call)

            def once():
                ran.append(call)
                if len(ran) > 2 * len({id(each) for each in ran}):
                    raise MemoryError("none left")
                return run()

            return once

        return bind

    found = [contenders(CPU)[0], Contender("late", False, failing_later), baseline("good")]
    rows = bench([parse_workload(TINY)], [1, 2], ["uniform"], found, CPU, 60)["rows"]
    assert {row["kernel"]: row.get("failed") for row in rows if row["tokens"] == 2} == {
        "ours-reference": None, "late": "MemoryError: none left", "good": None
    }  # fmt: skip
    assert all(("us" in row) == ("relative_l2" in row) == ("failed" not in row) for row in rows)
    assert len(rows) == 6


def test_the_result_is_kept_after_every_point(measured):
    _, seen, steps = measured
    assert seen == [4, 8, 12, 12]
    done, total = [s[1] for s in steps], {s[2] for s in steps}
    assert total == {15}
    assert done == sorted(done)
    assert done[-1] == 15


def test_the_best_peer_is_one_of_the_same_activations(measured):
    rows = [
        {"kernel": "a", "ours": False, "us": 5.0},  # a result of old, which had no other
        {"kernel": "b", "ours": False, "us": 4.0, "activations": "bf16"},
        {"kernel": "c", "ours": True, "us": 2.0, "activations": "bf16"},
    ]
    eight = {"kernel": "d", "ours": False, "us": 1.0, "activations": "fp8"}
    failed = {"kernel": "e", "ours": False, "failed": "x"}
    assert report.best_baselines(rows) == "2.00 b"
    assert report.best_baselines([*rows, eight]) == "2.00 b; 0.50 d (fp8 activations)"
    ours = {"kernel": "f", "ours": True, "us": 0.5, "activations": "fp8"}
    assert report.best_baselines([*rows, eight, ours]) == "2.00 b; 2.00 d"
    assert report.best_baselines([rows[2], failed]) == ""
    assert report.best_baselines([rows[0], failed]) == ""
    assert {row["activations"] for row in measured[0]["rows"]} == {"bf16"}


def test_a_budget_that_is_over():
    result = bench(
        [parse_workload(TINY)], [1, 2], ["uniform", "skewed"], [contenders(CPU)[0]], CPU, budget=-1
    )
    assert result["rows"] == []
    assert "time budget" in result["absent"][0]["why"]


def test_an_adapter_brings_baselines(registered, monkeypatch):
    class MoreBaselines:
        @hookimpl
        def register_adapters(self, register):
            register(
                plugins.Adapter(
                    "mine", (), "g", "e", "A", "s", baselines="test_bench_peers_of_mine"
                )
            )

    import sys

    monkeypatch.setitem(
        sys.modules,
        "test_bench_peers_of_mine",
        SimpleNamespace(BASELINES={"mine-fast": Baseline(absent_baseline, "fp8")}),
    )
    with registered(MoreBaselines()):
        assert ("mine-fast", "fp8") in [(c.name, c.activations) for c in contenders(CPU)]
    assert "mine-fast" not in [c.name for c in contenders(CPU)]


def test_a_kernel_of_8_bit_activations_is_measured_with_them(monkeypatch) -> None:
    """And set beside baselines of that precision."""
    kernels = baselines.kernels() | {
        "eight": SimpleNamespace(
            name="eight", auto_devices=frozenset({"cpu"}), activations=frozenset({"fp8"})
        )
    }
    monkeypatch.setattr(baselines, "kernels", lambda: kernels)
    ours = {c.name: c.activations for c in contenders(CPU) if c.ours}
    assert ours == {"ours-reference": "bf16", "ours-eight": "fp8"}
    asked = []
    monkeypatch.setattr(
        baselines, "prepare_experts", lambda w, **options: asked.append(options["activations"])
    )
    layer = Layer(parse_workload(TINY), random_weights(parse_workload(TINY), CPU))
    for name in ("reference", "eight"):
        layer.prepared(name)
    assert asked == ["bf16", "fp8"]


def test_modes():
    assert [c.name for c in contenders(CPU, deterministic=True) if c.ours] == [
        "ours-reference",
        "ours-reference-deterministic",
        "ours-reference-batch-invariant",
    ]


def test_coarse_first():
    assert coarse_first([1, 2, 4, 8, 16, 32, 64]) == [1, 64, 8, 2, 16, 4, 32]
    assert coarse_first([5]) == [5]
    assert coarse_first([7, 3, 7]) == [3, 7]
    assert coarse_first([]) == []
    assert sorted(coarse_first(range(1, 100))) == list(range(1, 100))


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name):
    """Every shard can be prepared, and together the ranks hold the layer (the largest is what is
    measured).
    """
    workload = WORKLOADS[name]
    whole = WORKLOADS[name.partition("-tp")[0]]
    assert workload.intermediate % 32 == 0
    assert (
        whole.intermediate
        <= workload.tp * workload.intermediate
        < whole.intermediate + 32 * workload.tp
    )


def test_bytes_of_an_expert():
    """What the tensors of a checkpoint weigh."""
    for name in ("4,64,32,2,bias", TINY):
        workload = parse_workload(name)
        tensors = random_weights(workload, CPU).tensors().values()
        assert workload.expert_bytes * workload.experts == sum(t.nbytes for t in tensors)


def test_without_bias():
    workload = without_bias(parse_workload("4,64,32,2,bias"))
    assert workload.family.rows == GPT_OSS.rows
    assert random_weights(workload, CPU).w13_bias is None
    assert parse_workload("gpt-oss-20b-tp2-nobias") == without_bias(WORKLOADS["gpt-oss-20b-tp2"])
    assert parse_workload("dsv4-flash-nobias") == WORKLOADS["dsv4-flash"]
    (p,) = prepare_copies(workload, CPU, 1)
    assert p.w13_bias is None


def test_floor():
    """By hand: 2 of 8 experts for one token; then compute-bound where the rate is low."""
    workload = parse_workload(TINY)
    call = make_batch(workload, 1, "uniform", CPU, 0)
    weights = 3 * 64 * 32
    wanted = (2 * (weights / 2 + weights / 32) + 4 * 64) / 1e9 * 1e6
    assert roofline(workload, [call], Rates(1e9, 1e15)) == {
        "active_experts": 2.0,
        "roofline_us": round(wanted, 3),
        "bound": "memory",
    }
    assert roofline(workload, [call], Rates(1e15, 1e9)) == {
        "active_experts": 2.0,
        "roofline_us": round(2 * 2 * weights / 1e3, 3),
        "bound": "compute",
    }


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_calls(routing):
    workload = parse_workload("64,64,32,4")
    call = make_batch(workload, 500, routing, CPU, seed=3)
    assert (call.x.dtype, call.ids.dtype, call.weights.dtype, call.logits.dtype) == (
        torch.bfloat16,
        torch.int32,
        torch.float32,
        torch.bfloat16,
    )
    assert all(len(set(row)) == 4 for row in call.ids.tolist()), "no expert twice in a row"
    assert all(len(set(row)) == 64 for row in call.logits.tolist()), (
        "no tie that two kernels could break differently"
    )
    assert torch.allclose(call.weights.sum(1), torch.ones(500))
    best = call.logits.float().topk(4).indices
    assert torch.equal(best.int(), call.ids)
    assert torch.equal(make_batch(workload, 500, routing, CPU, seed=3).x, call.x)
    assert not torch.equal(make_batch(workload, 500, routing, CPU, seed=4).ids, call.ids)


def test_skew():
    """Uniform: every expert near its share. Skewed: a few have most, and they are the same in
    another call.
    """
    workload = parse_workload("64,64,32,4")

    def counts(routing, seed):
        return torch.bincount(
            make_batch(workload, 4000, routing, CPU, seed).ids.flatten(), minlength=64
        )

    even = counts("uniform", 0)
    assert even.min() > 150
    assert even.max() < 350
    skewed = counts("skewed", 0)
    assert skewed.topk(8).values.sum() > 0.4 * skewed.sum()
    assert (
        len({*skewed.topk(4).indices.tolist()} & {*counts("skewed", 1).topk(4).indices.tolist()})
        >= 3
    )
    with pytest.raises(ValueError, match="routing is 'odd'"):
        make_batch(workload, 1, "odd", CPU, 0)


def test_rotation_exceeds_the_cache():
    """What the calls and copies of a rotation read, from one read of a byte to the next, is more
    than the cache holds.
    """
    l2 = 50 << 20
    for name in ("gpt-oss-20b", "gpt-oss-20b-tp8", "dsv4-flash-tp8"):
        workload = WORKLOADS[name]
        assert copies_needed(workload, l2) * workload.experts * workload.expert_bytes >= 3 * l2
    workload = parse_workload("8,64,32,2")
    calls = rotation(workload, 4, "uniform", CPU, 100_000)
    assert sum(active_experts(call) for call in calls) * workload.expert_bytes > 100_000
    assert len(rotation(workload, 1, "uniform", CPU, 0)) == 8
    assert len({tuple(call.ids.flatten().tolist()) for call in calls}) > 1


def test_timing_counts_calls():
    ran = []
    timing = time_calls([lambda: ran.append(1), lambda: ran.append(2)], CPU, 0.0)
    assert timing.samples == 10
    assert ran == [1, 2] * 21, (
        "one round to see how long it takes, then ten turns of one to warm up and one to measure"
    )
    assert 0 < timing.low <= timing.us <= timing.high
    assert math.isfinite(time_host(lambda: None, CPU, calls=40))


def test_rounds_take_turns():
    """What changes the clock while one is timed changes it for the others too, and no one always
    comes after the same other.
    """
    ran = []
    timings = time_beside([partial(ran.append, "a"), partial(ran.append, "b")], 1, CPU, 0.0)
    assert set(ran[:2]) == {"a", "b"}
    turns = ["".join(ran[i : i + 4]) for i in range(2, len(ran), 4)]
    assert len(turns) == 10
    assert set(turns) == {"aabb", "bbaa"}
    assert [timing.samples for timing in timings] == [10, 10]
    assert time_beside([], 0, CPU, 1.0) == []


def test_one_that_raises_ends_no_others_turns():
    ran = []

    def fails_later():
        ran.append("b")
        if len(ran) > 12:
            raise MemoryError("none left")

    rounds = [partial(ran.append, "a"), fails_later]
    timing, error = time_beside(rounds, 1, CPU, 0.0)
    assert timing.samples == 10
    assert isinstance(error, MemoryError)
    assert ran.count("a") == 21
    assert ran.count("b") < 12
    with pytest.raises(MemoryError, match="none left"):
        timings_or_raise([timing, error])
    assert timings_or_raise([timing]) == [timing]


def order_of(ours):
    """Which of two contenders runs when, at one point."""
    ran = []

    def noted(name):
        return Contender(
            name, ours, lambda layer: lambda call: lambda: (ran.append(name), call.x)[1]
        )

    bench([parse_workload(TINY)], [1], ["uniform"], [noted("a"), noted("b")], CPU, 60)
    return "".join(ran)


@pytest.mark.parametrize("ours", [True, False])
def test_all_run_before_one_is_timed(ours):
    """What they share has grown to its size before the first graph is captured; then they take
    turns.
    """
    ran = order_of(ours)
    calls = ran.index("b")
    assert ran.startswith("a" * calls + "b" * calls)
    assert len(list(groupby(ran))) >= 10


def test_a_layer_is_prepared_once_and_its_weights_stay():
    workload = parse_workload("4,64,32,2,bias")
    layer = Layer(workload, random_weights(workload, CPU))
    p = layer.prepared("reference")
    assert layer.prepared("reference") is p
    assert not layer.weights.consumed
    assert torch.equal(layer.weights.w13, random_weights(workload, CPU).w13)
