"""Calling FlashInfer's runner without its wrapper: what is recorded, that it is the same call, and
what happens where it can't be.

The stand-in is built as FlashInfer's wrapper is: keyword arguments in, a runner from a class's
dict, positional arguments out.
"""

import enum
import threading
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from packaging.version import Version

from hopper_mxfp4 import (
    GPT_OSS,
    KernelUnavailable,
    SwiGLU,
    env,
    fused_moe,
    prepare_experts,
    reference_moe,
)
from hopper_mxfp4.bench import host, tune
from hopper_mxfp4.bench.baselines import Layer
from hopper_mxfp4.bench.workloads import parse_workload
from hopper_mxfp4.bench.workloads import random_weights as random_weights_of
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer import kernel as flashinfer
from hopper_mxfp4.kernels.flashinfer.direct import NotRecorded, record, tactic_counts, valid_tactics
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.tables import DEFAULT, Bucket, Table
from random_layers import random_weights
from sm90 import Plugin
from test_flashinfer_kernel import OnCpu, StandIn, reference_input

pytestmark = pytest.mark.usefixtures("one_thread")
KEYWORDS = (
    "fc1_expert_weights",
    "fc1_expert_biases",
    "fc2_expert_weights",
    "fc2_expert_biases",
    "quant_scales",
)
ACTIVATION = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


class Activation(enum.IntEnum):
    SWIGLU = 3


class Runner:
    """FlashInfer's compiled object: three tactics for the first GEMM, `extra` more for the second;
    computes with the stand-in.
    """

    def __init__(self, moe, fused):
        self.moe, self.fused, self.pairs = moe, fused, []

    def get_gemm1_tactic_count(self):
        return 3

    def get_gemm2_tactic_count(self):
        return 3 + (self.moe.extra if self.fused else 0)

    def get_valid_tactics_for_shape(self, gemm, n, k):
        self.moe.asked.append((gemm, n, k))
        return [0, 1, 2] if gemm == 1 else [3, 5]

    def get_tactic_occupancy(self, tactic):
        return int(tactic != 1)

    def run_moe(
        self, output, x, ids, weights, w13, b13, w2, b2, scales, none, alpha, beta, limit, *rest
    ):
        assert none is None
        *parallel, pair, pdl, activation, workspace = rest
        assert parallel == [True, 1, 0, 1, 0]
        assert pdl is True
        assert activation == 3
        self.pairs.append(tuple(pair))
        arguments = (w13, b13, w2, b2, scales)
        StandIn.cutlass_fused_moe(
            self.moe,
            output=output,
            input=x,
            token_selected_experts=ids,
            token_final_scales=weights,
            workspace_buffer=workspace,
            **dict(zip(KEYWORDS, arguments, strict=True)),
            **dict(zip(ACTIVATION, (alpha, beta, limit), strict=True)),
        )


class Wrapped(StandIn):
    """StandIn behind a wrapper; `wrapper_calls` counts the calls that come through it."""

    def __init__(self):
        super().__init__()
        self.wrapper_calls, self.asked, self.extra = 0, [], 0

        self.MoERunner = MoERunner = type("MoERunner", (), {"runner_dict": {}})
        self.core = SimpleNamespace(
            get_cutlass_fused_moe_module=lambda architecture: {
                "90": SimpleNamespace(MoERunner=MoERunner)
            }[architecture]
        )

    def cutlass_fused_moe(self, *, profile_ids=None, use_fused_finalize=True, **call):
        self.wrapper_calls += 1
        runners = self.MoERunner.runner_dict
        if use_fused_finalize not in runners:
            runners[use_fused_finalize] = Runner(self, use_fused_finalize)
        first, second = profile_ids or (DEFAULT, DEFAULT)
        runners[use_fused_finalize].run_moe(
            call["output"],
            call["input"],
            call["token_selected_experts"],
            call["token_final_scales"],
            *(call[name] for name in KEYWORDS),
            None,
            *(call[name] for name in ACTIVATION),
            True,
            call["tp_size"],
            call["tp_rank"],
            call["ep_size"],
            call["ep_rank"],
            [first, second],
            True,
            Activation.SWIGLU,
            call["workspace_buffer"],
        )

    def runner(self, fused=True):
        return self.MoERunner.runner_dict[fused]


@pytest.fixture
def moe(monkeypatch, registered, tmp_path):
    """FlashInfer's stand-in behind a wrapper, kernel "flashinfer-cpu" on it, an empty cache."""
    stand_in = Wrapped()
    monkeypatch.setattr(compat, "flashinfer_moe", lambda: stand_in)
    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version("9.9"))
    monkeypatch.setattr(compat, "module_hash", lambda: "0" * 16)
    monkeypatch.setattr(compat, "compiled_module", lambda: tmp_path)
    monkeypatch.setenv("HOPPER_MXFP4_CACHE_DIR", str(tmp_path))

    def forget():
        for cached in (flashinfer._flashinfer_bytes, log_once, tactics.tables):
            cached.cache_clear()

    forget()
    with registered(Plugin(OnCpu())):
        yield stand_in
    forget()


def layer(hidden=160):
    return random_weights(GPT_OSS, 3, hidden, 96)


def prepared(w):
    return prepare_experts(
        w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0), kernel="flashinfer-cpu"
    )


def keep(p, buckets, fixed=None):
    """What tune would have measured for this layer."""
    plan = flashinfer.make_plan(p, 4)
    tactics.save(Table(plan.build, plan.shape, buckets, fixed))
    p.plans.clear()
    p.launch_plans.clear()


BUCKETS = (Bucket(1, (0, 3), 1.0, 2.0), Bucket(64, (2, 5), 1.0, 2.0))


@pytest.mark.parametrize("hidden", [160, 256], ids=["padded", "unpadded"])
def test_the_same_call(moe, hidden) -> None:
    """One wrapper call to record, none to run; the result is the reference's."""
    w, call = layer(hidden), reference_input(hidden)
    wanted = reference_moe(*call, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0))
    p = prepared(w)
    keep(p, BUCKETS)
    before = moe.wrapper_calls
    for _ in range(3):
        y = fused_moe(*call, p)
        assert (y.float() - wanted).norm() / wanted.norm() < 5e-3
    assert moe.wrapper_calls == before + 1
    assert moe.runner().pairs == [(0, 3)] * 3
    assert type(moe.MoERunner.runner_dict) is dict, "put back"
    assert type(moe.runner()) is Runner


def test_the_bucket_of_each_call(moe) -> None:
    p = prepared(layer())
    keep(p, BUCKETS)
    x, ids, weights = reference_input(160)
    for m in (1, 7, 9, 70):
        repeat = -(-m // 7)
        fused_moe(
            x.repeat(repeat, 1)[:m], ids.repeat(repeat, 1)[:m], weights.repeat(repeat, 1)[:m], p
        )
    assert moe.runner().pairs == [(0, 3), (0, 3), (2, 5), (2, 5)]


def test_batch_invariant(moe, monkeypatch) -> None:
    """One pair whatever the batch; with no table FlashInfer's default, never its autotuner."""
    monkeypatch.setenv("HOPPER_MXFP4_BATCH_INVARIANT", "1")
    p = prepared(layer())
    assert p.deterministic
    x, ids, weights = reference_input(160)
    fused_moe(x, ids, weights, p)
    fused_moe(x[:1], ids[:1], weights[:1], p)
    keep(p, BUCKETS, fixed=(2, 3))
    fused_moe(x, ids, weights, p)
    fused_moe(x[:1], ids[:1], weights[:1], p)
    assert moe.runner(fused=False).pairs == [(DEFAULT, DEFAULT)] * 2 + [(2, 3)] * 2
    assert list(moe.MoERunner.runner_dict) == [False]


def test_without_a_table_flashinfer_chooses(moe, caplog) -> None:
    """Through its wrapper, which asks its autotuner; one line says so, whatever the number of
    layers.
    """
    call = reference_input(160)
    with caplog.at_level("INFO", "hopper_mxfp4.kernels.flashinfer"):
        for _ in range(2):
            p = prepared(layer())
            fused_moe(*call, p)
    assert moe.wrapper_calls == 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert "FlashInfer's own autotuner" in line
    assert "hopper-mxfp4 tune" in line


def test_a_line_says_which_table(moe, caplog) -> None:
    p = prepared(layer())
    keep(p, BUCKETS)
    with caplog.at_level("INFO", "hopper_mxfp4.kernels.flashinfer"):
        fused_moe(*reference_input(160), p)
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        "MoE 3 experts top-4 256x128 bias separate runs tactics measured for this shape on this "
        "kind of GPU (" in line
    )


def test_finalize_mode_is_what_the_runner_offers(moe, monkeypatch) -> None:
    """More tactics for the second GEMM than for the first are those that sum in its epilogue."""
    assert flashinfer.make_plan(prepared(layer()), 4).shape.finalize == "separate"
    moe.extra = 3
    plan = flashinfer.make_plan(prepared(layer()), 4)
    assert (plan.shape.finalize, plan.build.counts) == ("fused", (3, 6))
    monkeypatch.setenv("HOPPER_MXFP4_DETERMINISTIC", "1")
    plan = flashinfer.make_plan(prepared(layer()), 4)
    assert (plan.shape.finalize, plan.build.counts) == ("separate", (3, 3))


def test_tactics_of_a_layer(moe) -> None:
    """Those that fit the shape and the device, of each GEMM's own sizes."""
    p = prepared(layer())
    plan = flashinfer.make_plan(p, 4)
    assert flashinfer.layer_tactics(plan, p) == ([0, 2], [3, 5])
    assert moe.asked == [(1, 256, 256), (2, 256, 128)]
    with pytest.raises(KernelUnavailable, match="does not tell its tactics; install"):
        flashinfer.layer_tactics(plan._replace(direct=None), p)


def arguments():
    names = (
        "output",
        "input",
        "token_selected_experts",
        "token_final_scales",
        "workspace_buffer",
        *KEYWORDS[:4],
        *ACTIVATION,
    )
    return {name: torch.zeros(1) for name in names} | {
        "quant_scales": [torch.zeros(4), torch.zeros(4)],
        "tp_size": 1,
        "tp_rank": 0,
        "ep_size": 1,
        "ep_rank": 0,
    }


def test_record(moe) -> None:
    given = arguments()
    direct = record(moe, given)
    assert [
        direct.arguments[i] is given[name] for i, name in zip(direct.places, given, strict=False)
    ] == [True] * 5 + [False]
    assert direct.arguments[direct.places[5]] == [-81, -82]
    assert type(direct.arguments[-2]) is int, "an enum is handed over as a number"
    assert direct.runner is moe.runner()
    assert moe.runner().pairs == [], "nothing has run"
    assert tactic_counts(direct.runner) == (3, 3)
    assert valid_tactics(direct.runner, 1, 64, 64) == [0, 2]


def test_other_threads_are_served_meanwhile(moe) -> None:
    """A call of another thread during recording runs on the real runner."""
    wrapper, seen = moe.cutlass_fused_moe, []
    w, call = layer(), reference_input(160)
    p = prepared(w)
    fused_moe(*call, p)
    runs = len(moe.runner().pairs)

    def slow(**keywords):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: seen.append(fused_moe(*call, p)))
            other.start()
            other.join()
        wrapper(**keywords)

    object.__setattr__(moe, "cutlass_fused_moe", slow)
    record(moe, arguments())
    assert len(moe.runner().pairs) == runs + 1
    wanted = reference_moe(*call, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0))
    assert (seen[0].float() - wanted).norm() / wanted.norm() < 5e-3


def no_core(moe):
    del moe.core


def no_runner_dict(moe):
    moe.core = SimpleNamespace(
        get_cutlass_fused_moe_module=lambda architecture: SimpleNamespace(MoERunner=object())
    )


def copied_inputs(moe):
    wrapper = moe.cutlass_fused_moe
    moe.cutlass_fused_moe = lambda **keywords: wrapper(
        **keywords | {"input": keywords["input"].clone()}
    )


def two_calls(moe):
    wrapper = moe.cutlass_fused_moe

    def twice(**keywords):
        wrapper(**keywords)
        wrapper(**keywords)

    moe.cutlass_fused_moe = twice


def other_runners(moe):
    class Registry(dict):
        pass

    moe.MoERunner.runner_dict = Registry()


@pytest.mark.parametrize(
    "change", [no_core, no_runner_dict, copied_inputs, two_calls, other_runners]
)
def test_another_flashinfer_is_called_through_its_wrapper(moe, change, caplog) -> None:
    """Built in a way that is not known: slower, and just as right. A table of its version still
    serves, for its wrapper takes pairs.
    """
    w, call = layer(), reference_input(160)
    p = prepared(w)
    keep(p, BUCKETS)
    change(moe)
    with pytest.raises((NotRecorded, AttributeError)):
        record(moe, arguments())
    with caplog.at_level("WARNING", "hopper_mxfp4.kernels.flashinfer"):
        y = fused_moe(*call, p)
    wanted = reference_moe(*call, w, family=GPT_OSS, swiglu=SwiGLU(1.702, 1.0, 7.0))
    assert (y.float() - wanted).norm() / wanted.norm() < 5e-3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "called through its own Python" in line
    assert moe.runner().pairs[-1] == (0, 3)


def test_tune_from_end_to_end(moe, monkeypatch, tmp_path) -> None:
    """The command on the stand-in: a table in a file and in the cache, which the next layer then
    runs by.
    """
    monkeypatch.setattr(flashinfer.FlashInferKernel, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(
        flashinfer.FlashInferKernel,
        "layout",
        lambda self, device: flashinfer._layout.__wrapped__(device),
    )
    calls = tune.rotation
    monkeypatch.setattr(
        tune, "rotation", lambda *arguments: calls(*arguments)[:1]
    )  # the stand-in is slow
    out = tmp_path / "out" / "tables.json"
    done = CliRunner().invoke(
        main,
        [
            "tune",
            "--workloads",
            "4,160,96,4,bias",
            "--tokens",
            "1 4",
            "--budget",
            "600",
            "--out",
            str(out),
        ],
    )
    assert done.exit_code == 0, done.output
    (table,) = tactics.read(out)
    assert [bucket.tokens for bucket in table.buckets] == [1, 4]
    for bucket in table.buckets:
        assert bucket.pair[0] in (DEFAULT, 0, 2)
        assert bucket.pair[1] in (DEFAULT, 3, 5)
        assert 0 < bucket.us <= bucket.default_us
    assert table.fixed in {bucket.pair for bucket in table.buckets}
    assert {pair[0] for pair in moe.runner().pairs} == {DEFAULT, 0, 2}, (
        "1 does not run on this device"
    )
    assert "4 experts top-4 256x128 bias separate" in done.output
    moe.runner().pairs.clear()
    fused_moe(*reference_input(160), prepared(random_weights(GPT_OSS, 4, 160, 96)))
    assert moe.runner().pairs == [table.buckets[1].pair]


def test_tune_with_no_time_or_no_gpu(moe, monkeypatch, tmp_path) -> None:
    before = tactics.tables()
    done = CliRunner().invoke(main, ["tune", "--workloads", "4,160,96,4"])
    assert done.exit_code == 1
    assert "needs a Hopper GPU" in done.output
    monkeypatch.setattr(flashinfer.FlashInferKernel, "unsupported_reason", lambda *args: None)
    monkeypatch.setattr(
        flashinfer.FlashInferKernel,
        "layout",
        lambda self, device: flashinfer._layout.__wrapped__(device),
    )
    done = CliRunner().invoke(main, ["tune", "--workloads", "4,160,96,4", "--budget", "-1"])
    assert done.exit_code == 1
    assert "the time budget was over" in done.output
    assert tactics.tables() == before


@pytest.mark.parametrize("hidden", [160, 256], ids=["padded", "unpadded"])
def test_the_parts_of_a_calls_host_time(moe, monkeypatch, hidden) -> None:
    """Python's part is of a call that reaches FlashInfer's runner no more, less the copy that
    trims. The clock is made up.
    """
    clock = iter((10.0, 7.0, 2.0))
    computed = []

    def time_host(run, device):
        before = len(moe.calls)
        run()
        computed.append(len(moe.calls) - before)
        return next(clock)

    monkeypatch.setattr(host, "time_host", time_host)
    monkeypatch.setenv(env.BATCH_INVARIANT.name, "1")  # tactics without a table
    workload = parse_workload(f"4,{hidden},96,4,bias")
    seen = host.host_overhead(
        workload,
        Layer(workload, random_weights_of(workload, torch.device("cpu"))),
        "flashinfer-cpu",
    )
    copy = 2.0 if hidden % 128 else 0.0
    assert (seen["total_us"], seen["python_us"]) == (10.0, 7.0 - copy)
    assert computed[:2] == [1, 0]
    assert seen["kernel"] == "flashinfer-cpu"
