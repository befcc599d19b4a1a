"""`hopper-mxfp4 check`: what it says of a machine, and when it exits with 1."""

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from packaging.version import Version

from hopper_mxfp4 import env
from hopper_mxfp4.bench.workloads import parse_workload
from hopper_mxfp4.cli import check
from hopper_mxfp4.cli.main import main
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer import kernel as flashinfer_kernel
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.plugin import hookimpl
from hopper_mxfp4.registry import Adapter
from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.cards import card_of


@pytest.fixture(autouse=True)
def no_framework(monkeypatch):
    """Whatever else is installed where the tests run, they see no framework."""
    version = check._version
    monkeypatch.setattr(
        check,
        "_version",
        lambda name: None if name.startswith(("vllm", "sglang")) else version(name),
    )


@pytest.fixture
def a_hopper_gpu(monkeypatch):
    """What torch says on a machine with two H100s."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(check, "driver_version", lambda: "580.1")


NO_NVRTC = "NVRTC can't be used (ImportError: none); install it"


@pytest.fixture
def no_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "problem", lambda: NO_NVRTC)


@pytest.fixture
def flashinfer(monkeypatch):
    """Install a FlashInfer of a version, whose kernels are not compiled yet."""

    def install(version):
        monkeypatch.setattr(compat, "flashinfer_version", lambda: Version(version))
        monkeypatch.setattr(compat, "compiled_module", lambda: None)
        monkeypatch.setattr(compat, "module_hash", lambda: "none")  # which would remember this one
        monkeypatch.setattr(flashinfer_kernel, "_import_problem", lambda: None)

    return install


def said(*arguments):
    """The exit status, and the whole answer as JSON."""
    result = CliRunner().invoke(main, ["check", "--json", *arguments], catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


def findings(*arguments):
    """The exit status, and the findings by topic."""
    status, answer = said(*arguments)
    return status, {line["topic"]: line for line in answer["findings"]}


def test_a_machine_without_a_gpu(monkeypatch) -> None:
    """Warnings, no problem: the reference kernel runs here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, lines = findings()
    assert status == 0
    assert lines["GPU"]["status"] == "warning"
    assert lines["FlashInfer"] == {
        "topic": "FlashInfer",
        "status": "ok",
        "seen": "not installed: only HOPPER_MXFP4_KERNEL=flashinfer needs it",
        "todo": "",
    }
    assert "NVRTC" not in lines, "which compiles for Hopper alone"
    assert lines["kernel"]["seen"].startswith("reference ")
    assert said()[1]["verdict"] == (
        "ready: kernel reference for GPT-OSS-20B's layer on cpu, with 1 warning"
    )


def test_the_text_says_the_same(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["check"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "FlashInfer: not installed: only HOPPER_MXFP4_KERNEL=flashinfer" in result.output
    assert result.output.splitlines()[-1] == said()[1]["verdict"]
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
    result = CliRunner().invoke(main, ["check"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "-> install flashinfer-python>=0.6.18" in result.output
    assert result.output.splitlines()[-1] == "not ready: install flashinfer-python>=0.6.18"


def test_hopper_needs_nothing_but_nvrtc(a_hopper_gpu, monkeypatch) -> None:
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    status, answer = said()
    lines = {line["topic"]: line for line in answer["findings"]}
    assert status == 0
    assert lines["GPU"]["status"] == "ok"
    assert "2 x NVIDIA H100 80GB HBM3, compute capability 9.0, driver 580.1" in lines["GPU"]["seen"]
    assert lines["NVRTC"]["seen"] == "compiles our kernels"
    assert lines["FlashInfer"]["status"] == "ok"
    assert lines["kernel"]["seen"] == "native for GPT-OSS-20B's layer on cuda"
    assert "tables" not in lines, "they are of FlashInfer's kernel"
    assert answer["ready"]
    assert answer["verdict"] == "ready: kernel native for GPT-OSS-20B's layer on cuda"


@pytest.mark.parametrize("version", ["0.6.17", "0.6.14", "0.5.0", "0.7.2.post1"])
def test_no_flashinfer_is_in_the_way_of_ours(a_hopper_gpu, flashinfer, monkeypatch, version):
    """Nor one that is unsafe, too old, not compiled, or can't be imported."""
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    flashinfer(version)
    status, lines = findings()
    assert status == 0
    about = [line for topic, line in lines.items() if topic.startswith("FlashInfer")]
    assert {(line["status"], line["todo"]) for line in about} == {("ok", "")}
    assert version in about[0]["seen"]
    needless = "only HOPPER_MXFP4_KERNEL=flashinfer needs it"
    if version == "0.7.2.post1":
        assert about[0]["seen"] == "0.7.2.post1, safe on Hopper"
        assert about[1]["seen"] == f"the SM90 MoE kernels are not compiled yet: {needless}"
    else:
        (line,) = about
        assert line["seen"].endswith(f": {needless}")
    assert "tables" not in lines

    def broken() -> None:
        raise ImportError("no libcudart")

    flashinfer("0.7.2.post1")
    monkeypatch.setattr(compat, "compiled_module", broken)
    status, lines = findings()
    assert status == 0
    assert "ImportError: no libcudart: only" in lines["FlashInfer module"]["seen"]


@pytest.mark.usefixtures("no_nvrtc")
def test_without_nvrtc_flashinfer_serves(a_hopper_gpu, flashinfer) -> None:
    """So what it lacks counts."""
    flashinfer("0.7.2.post1")
    status, answer = said()
    lines = {line["topic"]: line for line in answer["findings"]}
    assert status == 0
    assert lines["NVRTC"] == {
        "topic": "NVRTC",
        "status": "warning",
        "seen": "NVRTC can't be used (ImportError: none): layers run FlashInfer's kernel instead "
        "of ours",
        "todo": "install it",
    }
    assert lines["FlashInfer module"]["status"] == "warning"
    assert "tables" in lines
    assert lines["kernel"]["seen"].startswith("flashinfer ")
    assert answer["verdict"].startswith("ready: kernel flashinfer for ")


@pytest.mark.usefixtures("no_nvrtc")
@pytest.mark.parametrize("version", [None, "0.6.17"])
def test_without_nvrtc_and_flashinfer_nothing_serves(a_hopper_gpu, flashinfer, version) -> None:
    if version:
        flashinfer(version)
    status, answer = said()
    lines = {line["topic"]: line for line in answer["findings"]}
    assert status == 1
    assert lines["NVRTC"]["status"] == lines["kernel"]["status"] == "problem"
    assert lines["FlashInfer"]["status"] == "ok"
    assert not answer["ready"]
    assert answer["verdict"] == "not ready: install it", "NVRTC: it is all that is needed"


@pytest.mark.usefixtures("no_nvrtc")
@pytest.mark.parametrize(
    ("kernel", "status", "seen"),
    [
        ("native", "problem", "our own kernels can't be compiled"),
        ("wide", "problem", "our own kernels can't be compiled"),
        ("flashinfer", "warning", "torch's operators stage FlashInfer's inputs"),
        ("reference", "ok", "only our own kernels need it"),
    ],
)
def test_nvrtc_counts_for_the_kernel_that_is_asked_for(
    a_hopper_gpu, flashinfer, monkeypatch, kernel, status, seen
) -> None:
    flashinfer("0.7.2.post1")
    monkeypatch.setenv(env.KERNEL.name, kernel)
    exit_status, lines = findings()
    assert lines["NVRTC"]["status"] == status
    assert seen in lines["NVRTC"]["seen"]
    assert exit_status == (status == "problem")


@pytest.mark.parametrize(
    ("version", "status"), [("0.6.17", "problem"), ("0.6.14", "problem"), ("0.7.2.post1", "ok")]
)
def test_flashinfer_where_it_is_asked_for(
    a_hopper_gpu, flashinfer, monkeypatch, version, status
) -> None:
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
    flashinfer(version)
    exit_status, answer = said()
    lines = {line["topic"]: line for line in answer["findings"]}
    assert lines["FlashInfer"]["status"] == status
    assert version in lines["FlashInfer"]["seen"]
    assert exit_status == (status == "problem")
    if status == "ok":
        assert lines["FlashInfer module"]["status"] == "warning"
        assert "flashinfer-jit-cache" in lines["FlashInfer module"]["todo"]
    else:
        assert answer["verdict"].startswith("not ready: install flashinfer-python>=0.6.18, or set ")


def test_flashinfer_asked_for_and_missing(a_hopper_gpu, monkeypatch) -> None:
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
    status, answer = said()
    lines = {line["topic"]: line for line in answer["findings"]}
    assert status == 1
    assert lines["FlashInfer"]["status"] == lines["kernel"]["status"] == "problem"
    assert lines["FlashInfer"]["seen"] == "not installed"
    assert answer["verdict"] == "not ready: install flashinfer-python>=0.6.18"
    assert "tables" not in lines


def test_an_unsafe_release_allowed_is_still_said(a_hopper_gpu, flashinfer, monkeypatch) -> None:
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
    monkeypatch.setenv("HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER", "1")
    flashinfer("0.6.17")
    _, lines = findings()
    assert lines["FlashInfer"]["status"] == "warning"
    assert "0.6.17, unsafe" in lines["FlashInfer"]["seen"]


def test_another_gpu_is_a_problem(a_hopper_gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (10, 0))
    status, lines = findings()
    assert status == 1
    assert lines["GPU"]["status"] == "problem"
    assert "9.0 (Hopper)" in lines["kernel"]["todo"]
    assert "NVRTC" not in lines
    assert said()[1]["verdict"].startswith("not ready: the kernels need compute capability 9.0")


def test_a_bad_variable_is_a_problem(monkeypatch) -> None:
    monkeypatch.setenv("HOPPER_MXFP4", "perhaps")
    status, lines = findings()
    assert status == 1
    assert (
        lines["HOPPER_MXFP4"]["todo"]
        == "HOPPER_MXFP4='perhaps' is not one of off, auto, on; set one of them or unset it"
    )


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """The shipped tables of H100s alone, no cache of the user's: more may be shipped some day."""
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    found = [t for path in tactics._shipped_files() for t in tactics.read(path)]
    h100 = tuple(t for t in found if t.build.gpu == "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tactics, "tables", lambda: h100)
    return h100


BODIES_AND_SHARDS = [
    workload + shard
    for workload in ("gpt-oss-20b", "gpt-oss-120b", "dsv4-flash")
    for shard in ("", "-tp2", "-tp4", "-tp8")
]


def tables_of(gpu, flashinfer="0.7.2.post1", workloads=BODIES_AND_SHARDS, counts=(0, 0)):
    """What check says of tables on a machine with that GPU and FlashInfer."""
    build = tactics.Build(gpu, flashinfer, "0" * 16, counts)
    return check.tables([parse_workload(workload) for workload in workloads], build, card_of(gpu))


def test_layers_that_were_measured_here(shipped) -> None:
    line = tables_of("NVIDIA H100 80GB HBM3")
    assert (line.topic, line.status, line.todo) == ("tables", "ok", "")
    assert (
        line.seen == "12 of 12 layers measured on NVIDIA H100 80GB HBM3 with FlashInfer 0.7.2.post1"
    )


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_layers_measured_on_another_card(shipped, gpu) -> None:
    line = tables_of(gpu)
    assert line.status == "warning"
    assert line.seen.startswith(f"0 of 12 layers measured on {gpu} with FlashInfer 0.7.2.post1; ")
    assert (
        f"{', '.join(BODIES_AND_SHARDS)}: tactics measured for this shape on another GPU"
        in line.seen
    )
    assert (
        f'hopper-mxfp4 tune --workloads "{" ".join(BODIES_AND_SHARDS)}" --budget 1800' in line.todo
    )


def test_another_flashinfer_and_another_layer(shipped) -> None:
    """Only those that were not measured are asked for."""
    line = tables_of("NVIDIA H100 80GB HBM3", workloads=["gpt-oss-20b", "64,2880,2880,4,bias"])
    assert line.seen.startswith("1 of 2 layers measured on NVIDIA H100 80GB HBM3")
    assert (
        "; 64,2880,2880,4,bias: tactics measured for 32 experts top-4 2944x2944 bias separate, "
        "the nearest shape, on this kind of GPU" in line.seen
    )
    assert '--workloads "64,2880,2880,4,bias"' in line.todo
    line = tables_of("NVIDIA H100 80GB HBM3", "9.9", ["dsv4-flash"])
    assert "0 of 1 layers measured" in line.seen
    assert (
        "dsv4-flash: FlashInfer's own choice of tactics (no table for FlashInfer 9.9" in line.seen
    )
    assert "of as many tactics" in tables_of("NVIDIA H100 80GB HBM3", "9.9", counts=(116, 116)).seen


def test_tables_are_looked_for_where_flashinfer_serves(
    a_hopper_gpu, shipped, flashinfer, monkeypatch
) -> None:
    """By the name that torch has of the GPU, for all workloads or those that are asked for."""
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    flashinfer("0.7.2.post1")
    assert "tables" not in findings()[1]
    monkeypatch.setenv(env.KERNEL.name, "flashinfer")
    assert findings()[1]["tables"]["status"] == "ok"
    assert findings("--workloads", "dsv4-flash")[1]["tables"]["seen"].startswith("1 of 1 layers")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    _, lines = findings()
    assert "0 of 12 layers measured on NVIDIA H200" in lines["tables"]["seen"]
    assert lines["tables"]["status"] == "warning"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tables" not in findings()[1]


@pytest.mark.parametrize(
    ("points", "allowed", "status", "said"),
    [
        (["good"], None, "ok", "plugin loads; switch it on with --on"),
        (["good"], "other,ours", "ok", "plugin loads"),
        ([], None, "problem", "no entry point some.group:ours"),
        (["good"], "other", "problem", "PLUGINS='other' leaves this plugin out"),
        (["raises"], None, "problem", "the plugin fails: RuntimeError: broken"),
        (["exits"], None, "problem", "the plugin fails: SystemExit: no GPU"),
    ],
)
def test_a_framework_and_its_entry_point(
    registered, monkeypatch, points, allowed, status, said
) -> None:
    def good() -> None:
        pass

    def raises() -> None:
        raise RuntimeError("broken")

    def exits() -> None:
        raise SystemExit("no GPU")

    plugins = {"good": good, "raises": raises, "exits": exits}
    found = [SimpleNamespace(load=lambda point=point: plugins[point]) for point in points]
    monkeypatch.setattr(
        check.metadata,
        "entry_points",
        lambda group, name: found if (group, name) == ("some.group", "ours") else [],
    )
    if allowed is not None:
        monkeypatch.setenv("PLUGINS", allowed)

    class Framework:
        @hookimpl
        def register_adapters(self, register) -> None:
            register(Adapter("pytest", ("pytest",), "some.group", "ours", "PLUGINS", "--on"))

    with registered(Framework()):
        exit_status, lines = findings()
    assert lines["pytest plugin"]["status"] == status
    assert said in lines["pytest plugin"]["seen"]
    assert exit_status == (status == "problem")


def good_news() -> str:
    return "all hooks in place"


def bad_news() -> str:
    raise RuntimeError("a hook is missing")


@pytest.mark.parametrize(
    ("function", "allowed", "status", "said"),
    [
        ("good_news", None, "ok", "all hooks in place"),
        ("good_news", "", "ok", "all hooks in place"),
        ("good_news", "other, ours", "ok", "all hooks in place"),
        ("good_news", "other", "problem", "PLUGINS='other' leaves this plugin out"),
        ("bad_news", None, "problem", "the plugin fails: RuntimeError: a hook is missing"),
    ],
)
def test_an_adapter_with_a_check_of_its_own(
    registered, monkeypatch, function, allowed, status, said
) -> None:
    """It loads the plugin as its framework does, instead of a call of the entry point; and knows
    what an empty list allows.
    """
    point = SimpleNamespace(load=lambda: pytest.fail)
    monkeypatch.setattr(
        check.metadata, "entry_points", lambda group, name: [point] if group == "some.group" else []
    )
    if allowed is not None:
        monkeypatch.setenv("PLUGINS", allowed)

    class Framework:
        @hookimpl
        def register_adapters(self, register) -> None:
            ours = f"{__name__}:{function}"
            register(
                Adapter(
                    "pytest",
                    ("pytest",),
                    "some.group",
                    "ours",
                    "PLUGINS",
                    "--on",
                    check=ours,
                    all_allowed=(None, ""),
                )
            )

    with registered(Framework()):
        exit_status, lines = findings()
    assert lines["pytest plugin"]["status"] == status
    assert said in lines["pytest plugin"]["seen"]
    assert exit_status == (status == "problem")
