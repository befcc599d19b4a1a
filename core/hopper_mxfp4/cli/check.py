"""`hopper-mxfp4 check`: what it looks at, one function a topic."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Literal

import click
import torch
from rich.console import Console
from rich.markup import escape

from hopper_mxfp4 import __version__, env
from hopper_mxfp4.bench.run import driver_version
from hopper_mxfp4.bench.workloads import WORKLOADS, Workload
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.cli.options import parse_workloads, workloads_option
from hopper_mxfp4.contract import KernelUnavailable, LayerShape
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer.kernel import MULTIPLE, build_of, card_on
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.select import choose_kernel
from hopper_mxfp4.registry import Adapter, adapters
from hopper_mxfp4.tuning.cards import Card
from hopper_mxfp4.tuning.tables import Build, TunedShape, choose

TUNE_S = 150  # that `tune` takes for a layer; 120 for the largest of them on an H100
GPT_OSS_20B = LayerShape(num_experts=32, hidden_size=2880, intermediate_size=2880)
# Of HOPPER_MXFP4_KERNEL: what NVRTC compiles.
OURS = ("auto", "native", "narrow", "wide", "native8", "narrow8", "wide8")
FLASHINFER = f"{env.KERNEL.name}=flashinfer"


@dataclass(frozen=True)
class Line:
    """One finding. todo: what to do about it, empty if nothing."""

    topic: str
    status: Literal["ok", "warning", "problem"]
    seen: str
    todo: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def findings(workloads: Sequence[Workload] = tuple(WORKLOADS.values())) -> Iterator[Line]:
    """Every finding on this machine, in the order in which one would look.

    workloads: the layers whose tables are looked for.
    """
    yield Line("hopper-mxfp4", "ok", f"{__version__} on Python {platform.python_version()}")
    yield Line("torch", "ok", torch.__version__)
    yield from _environment()
    yield _gpu()
    if on_hopper():
        yield _nvrtc()
    yield from _flashinfer()
    yield _kernel()
    if on_hopper() and runs_flashinfer() and not compat.flashinfer_problem():
        device = torch.device("cuda", torch.cuda.current_device())
        yield tables(workloads, build_of(device), card_on(device))
    for adapter in adapters().values():
        yield _adapter(adapter)


def on_hopper() -> bool:
    return (
        torch.cuda.is_available()
        and not torch.version.hip
        and torch.cuda.get_device_capability() == (9, 0)
    )


def runs_flashinfer() -> bool:
    """Whether layers run FlashInfer's kernel here: asked for, or in the place of ours, which `auto`
    can't compile without NVRTC.
    """
    asked = env.KERNEL.read()
    in_our_place = asked == "auto" and on_hopper() and nvrtc.problem() is not None
    return asked == "flashinfer" or (in_our_place and not compat.flashinfer_problem())


def _environment() -> Iterator[Line]:
    for variable in env.VARIABLES:
        if variable.name not in os.environ:
            continue
        try:
            yield Line(variable.name, "ok", variable.read())
        except ValueError as error:
            yield Line(variable.name, "problem", os.environ[variable.name], str(error))


def _gpu() -> Line:
    if not torch.cuda.is_available():
        todo = (
            ""
            if not shutil.which("nvidia-smi")
            else "there is a driver, but this torch sees no GPU: install a CUDA build of torch"
        )
        return Line(
            "GPU",
            "warning",
            "none: only the reference kernel runs, slowly",
            todo or "use a machine with an H100, H200, H20 or GH200",
        )
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    seen = (
        f"{torch.cuda.device_count()} x {name}, compute capability {major}.{minor}, "
        f"driver {driver_version()}, CUDA {torch.version.cuda}"
    )
    if not on_hopper():
        return Line(
            "GPU",
            "problem",
            seen,
            "the kernels need compute capability 9.0 (Hopper); serve this GPU with the stock "
            "backends",
        )
    return Line("GPU", "ok", seen)


def _nvrtc() -> Line:
    reason, _, todo = (nvrtc.problem() or "").partition("; ")
    if not reason:
        return Line("NVRTC", "ok", "compiles our kernels")
    asked = env.KERNEL.read()
    if runs_flashinfer():
        without = (
            "torch's operators stage FlashInfer's inputs, in more launches"
            if asked == "flashinfer"
            else "layers run FlashInfer's kernel instead of ours"
        )
        return Line("NVRTC", "warning", f"{reason}: {without}", todo)
    if asked not in OURS:
        return Line("NVRTC", "ok", f"{reason}: only our own kernels need it")
    return Line("NVRTC", "problem", f"{reason}: our own kernels can't be compiled", todo)


def _flashinfer() -> Iterator[Line]:
    """What is not needed is neither a problem nor anything to do."""
    for line in _flashinfer_and_module():
        if line.status == "ok" or runs_flashinfer():
            yield line
        else:
            yield Line(line.topic, "ok", f"{line.seen}: only {FLASHINFER} needs it")


def _flashinfer_and_module() -> Iterator[Line]:
    version, problem = compat.flashinfer_version(), compat.flashinfer_problem()
    if version is None:
        yield Line("FlashInfer", "problem", "not installed", compat.INSTALL)
        return
    if problem:
        reason, _, todo = problem.partition("; ")
        yield Line("FlashInfer", "problem", reason, todo)
        return
    if compat.is_unsafe(version):
        yield Line(
            "FlashInfer",
            "warning",
            f"{version}, unsafe, allowed by {env.ALLOW_UNSAFE_FLASHINFER.name}",
            compat.INSTALL,
        )
    else:
        yield Line("FlashInfer", "ok", f"{version}, safe on Hopper")
    try:
        module = compat.compiled_module()
    except Exception as error:  # whatever a broken install raises is what to show
        yield Line(
            "FlashInfer module",
            "problem",
            f"importing FlashInfer failed: {type(error).__name__}: {error}",
            f"{compat.INSTALL} anew",
        )
        return
    if module is None:
        todo = (
            "install flashinfer-jit-cache of the same version, or let the first start build it, "
            "which can take an hour"
        )
        yield Line(
            "FlashInfer module", "warning", "the SM90 MoE kernels are not compiled yet", todo
        )
    else:
        yield Line("FlashInfer module", "ok", str(module))


def _kernel() -> Line:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kernel = choose_kernel("auto", GPT_OSS_20B, device)
    except (KernelUnavailable, ValueError) as error:
        return Line("kernel", "problem", f"none for GPT-OSS-20B's layer on {device}", str(error))
    return Line("kernel", "ok", f"{kernel.name} for GPT-OSS-20B's layer on {device}")


def tables(workloads: Sequence[Workload], build: Build, card: Card | None = None) -> Line:
    """Which layers were measured on this kind of GPU with this FlashInfer, and what others run by.

    build: of this GPU and FlashInfer; how many tactics it has may be UNKNOWN.
    """
    by_words: dict[str, list[str]] = {}
    for workload in workloads:
        by_words.setdefault(_table(workload, build, card), []).append(workload.name)
    measured, todo = by_words.pop("", []), [name for names in by_words.values() for name in names]
    seen = f"{len(measured)} of {len(workloads)} layers measured on {build.gpu}"
    seen += f" with FlashInfer {build.flashinfer}"
    seen += "".join(f"; {', '.join(names)}: {words}" for words, names in by_words.items())
    if not todo:
        return Line("tables", "ok", seen)
    command = f'hopper-mxfp4 tune --workloads "{" ".join(todo)}" --budget {TUNE_S * len(todo)}'
    return Line("tables", "warning", seen, f"measure them once, {TUNE_S} s each at most: {command}")


def _table(workload: Workload, build: Build, card: Card | None) -> str:
    """What a layer runs by in words; empty where that was measured here."""
    shape = TunedShape(
        workload.experts,
        round_up(workload.hidden, MULTIPLE),
        round_up(workload.intermediate, MULTIPLE),
        workload.top_k,
        workload.family.bias,
        "separate",  # as SM90's kernels for these layers are, see docs/dev/benchmarking.md
    )
    table, where = choose(shape, build, card)
    if table is None:
        return f"FlashInfer's own choice of tactics ({where})"
    measured = (table.shape, table.build.gpu, table.build.flashinfer)
    return "" if measured == (shape, build.gpu, build.flashinfer) else f"tactics {where}"


def _adapter(adapter: Adapter) -> Line:
    topic = f"{adapter.framework} plugin"
    installed = {d: _version(d) for d in adapter.distributions if _version(d)}
    if not installed and find_spec(adapter.framework) is None:
        return Line(topic, "ok", f"{adapter.framework} is not installed here")
    seen = (
        ", ".join(f"{name} {version}" for name, version in installed.items()) or adapter.framework
    )
    points = metadata.entry_points(group=adapter.group, name=adapter.entry_point)
    if not points:
        return Line(
            topic,
            "problem",
            f"{seen}, but no entry point {adapter.group}:{adapter.entry_point}",
            "reinstall hopper-mxfp4 with pip",
        )
    allowed = os.environ.get(adapter.allowlist)
    if allowed not in adapter.all_allowed and adapter.entry_point not in (
        name.strip() for name in (allowed or "").split(",")
    ):
        todo = (
            f"add {adapter.entry_point} to {adapter.allowlist} or unset it: "
            f"{adapter.framework} would quietly serve with its stock kernels"
        )
        return Line(
            topic,
            "problem",
            f"{seen}, but {adapter.allowlist}={allowed!r} leaves this plugin out",
            todo,
        )
    try:
        plugin = next(iter(points)).load()
        said = (resolve_name(adapter.check) if adapter.check else plugin)()
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever the plugin raises at start-up is what to show
        return Line(
            topic,
            "problem",
            f"{seen}, but the plugin fails: {type(error).__name__}: {error}",
            "fix this before starting a server",
        )
    return Line(
        topic, "ok", f"{seen}, {said or f'plugin loads; switch it on with {adapter.switch}'}"
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


def verdict(lines: Sequence[Line]) -> str:
    """All findings in one line: "ready: .." or "not ready: .." with the first thing to do."""
    first = next((line for line in lines if line.status == "problem"), None)
    if first:
        return f"not ready: {first.todo or f'{first.topic}: {first.seen}'}"
    serves = next(line.seen for line in lines if line.topic == "kernel")
    warnings = sum(line.status == "warning" for line in lines)
    told = f", with {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
    return f"ready: kernel {serves}{told}"


@click.command()
@workloads_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(workloads: list[str], as_json: bool) -> None:
    """Look at GPU, compiler, FlashInfer and frameworks; say in one line whether a server can start;
    exit with 1 if something stops the kernels or the plugins.
    """
    chosen = parse_workloads(workloads or list(WORKLOADS))
    console = Console(stderr=as_json)
    with console.status("looking; a framework's import takes some seconds"):
        lines = list(findings(chosen))
    ready = all(line.status != "problem" for line in lines)
    if as_json:
        found = [line.as_dict() for line in lines]
        said = {"ready": ready, "verdict": verdict(lines), "findings": found}
        click.echo(json.dumps(said, indent=1))
    else:
        for line in lines:
            console.print(
                f"{MARKS[line.status]:<24} [bold]{escape(line.topic)}[/]: {escape(line.seen)}",
                soft_wrap=True,
                highlight=False,
            )
            if line.todo:
                console.print(f"           -> {escape(line.todo)}", soft_wrap=True, highlight=False)
        console.print(escape(verdict(lines)), soft_wrap=True, highlight=False, style="bold")
    if not ready:
        raise SystemExit(1)
