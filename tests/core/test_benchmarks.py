"""The rigs under benchmarks/ need GPUs and frameworks; their imports are checked without either.

So is the comparison of two engines' tokens, which they share.
"""

import ast
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hopper_mxfp4 import LayerShape, env
from hopper_mxfp4.checkpoint.deepseek_v4 import deepseek_v4_config
from hopper_mxfp4.kernels.jit import nvrtc
from hopper_mxfp4.kernels.narrow import kernel as narrow
from hopper_mxfp4.kernels.narrow import launch, tiling
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8
from hopper_mxfp4.kernels.support import tokens_of
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide8.kernel import Wide8Kernel

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SHARED = BENCHMARKS / "engines" / "shared"
PYTHON = sorted(BENCHMARKS.rglob("*.py"))
SHELL = sorted(BENCHMARKS.rglob("*.sh"))
PACKAGE = "hopper_mxfp4"
RUN_AS_MODULE = re.compile(rf"{PACKAGE}(\.\w+)+")  # the argument of python -m


def name_of(path: Path) -> str:
    return str(path.relative_to(BENCHMARKS))


def test_the_rigs_are_there() -> None:
    """So that the tests below have something to look at."""
    names = {name_of(path) for path in [*PYTHON, *SHELL]}
    assert names >= {
        "accuracy/accuracy_compare.py",
        "accuracy/accuracy_smoke.py",
        "checks/expert_map.py",
        "checks/graphs_in_any_order.py",
        "checks/sanitizer_cases.py",
        "engines/deepseek_v4/prepare.sh",
        "engines/deepseek_v4/warm.py",
        "engines/deepseek_v4/run.sh",
        "engines/sglang/run.py",
        "engines/vllm/engine.py",
        "engines/vllm/run.py",
        "gpu_bench.sh",
    }


# What a rig asks of this package ------------------------------------------------------------------


def module_names(path: Path) -> set[str]:
    """Modules beside a file, and the rigs' shared ones: what it may import besides packages."""
    return {file.stem for folder in (path.parent, SHARED) for file in folder.glob("*.py")}


def missing_names(source: str) -> list[str]:
    """What the text of a rig asks of the package and the package does not have."""
    tree = ast.parse(source)
    modules: dict[str, ModuleType] = {}  # by the name that the rig has for them
    missing = []

    def module(name: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except ImportError:
            missing.append(name)
            return None

    def ours(name: str) -> bool:
        return name.partition(".")[0] == PACKAGE

    def is_module(owner: ModuleType, full: str) -> bool:
        """One that nobody has imported yet."""
        return hasattr(owner, "__path__") and importlib.util.find_spec(full) is not None

    def look_up(name: str, owner: ModuleType) -> None:
        full = f"{owner.__name__}.{name}"
        if name.startswith("_") and not name.startswith("__"):
            missing.append(f"{full}, which is private")
        elif not hasattr(owner, name) and not is_module(owner, full):
            missing.append(full)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and ours(node.module or ""):
            if (owner := module(node.module)) is None:
                continue
            for alias in node.names:
                look_up(alias.name, owner)
                found = getattr(owner, alias.name, None)
                if isinstance(found, ModuleType):
                    modules[alias.asname or alias.name] = found
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if ours(alias.name) and (found := module(alias.name)) is not None:
                    modules[alias.asname or PACKAGE] = (
                        found if alias.asname else sys.modules[PACKAGE]
                    )
        elif isinstance(node, ast.Constant) and RUN_AS_MODULE.fullmatch(str(node.value)):
            module(node.value)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ):
            look_up(node.attr, modules[node.value.id])
    return missing


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_what_a_rig_imports_is_there(path) -> None:
    """Public names of this package, from modules that exist."""
    source = path.read_text()
    compile(source, str(path), "exec")
    assert missing_names(source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from hopper_mxfp4 import fused_moe", []),
        ("from hopper_mxfp4 import fused_mole", ["hopper_mxfp4.fused_mole"]),
        ("def later():\n  from hopper_mxfp4.nowhere import x", ["hopper_mxfp4.nowhere"]),
        ("import hopper_mxfp4.nowhere", ["hopper_mxfp4.nowhere"]),
        ("import hopper_mxfp4 as h\nh.fused_mole(1)", ["hopper_mxfp4.fused_mole"]),
        ("from hopper_mxfp4.bench import workloads\nworkloads.parse_workload('')", []),
        (
            "from hopper_mxfp4.bench import workloads\nworkloads.x",
            ["hopper_mxfp4.bench.workloads.x"],
        ),
        ("from hopper_mxfp4 import _x", ["hopper_mxfp4._x, which is private"]),
        ("run('-m', 'hopper_mxfp4.nowhere')", ["hopper_mxfp4.nowhere"]),
        ("import os\nos.nowhere", []),
    ],
)
def test_that_check_notices(source, found) -> None:
    assert missing_names(source) == found


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "engines").rglob("*.py")), ids=name_of)
def test_what_rigs_import_of_each_other_is_there(path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module not in module_names(path):
            continue
        places = (folder / f"{node.module}.py" for folder in (path.parent, SHARED))
        text = next(place for place in places if place.exists()).read_text()
        defined = {
            name
            for top in ast.parse(text).body
            for name in (
                [top.name]
                if isinstance(top, ast.FunctionDef | ast.ClassDef)
                else [t.id for t in top.targets if isinstance(t, ast.Name)]
                if isinstance(top, ast.Assign)
                else [top.target.id]
                if isinstance(top, ast.AnnAssign)
                else []
            )
        }
        assert {alias.name for alias in node.names} <= defined


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts(path) -> None:
    """They parse, and a line fits a screen."""
    subprocess.run(["bash", "-n", path], check=True)
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize(
    "path", [*PYTHON, *SHELL, *sorted(BENCHMARKS.rglob("README.md"))], ids=name_of
)
def test_paths_that_the_rigs_name_exist(path) -> None:
    text = path.read_text()
    named = re.findall(r"(?:benchmarks|tests)/[\w/.-]+\.(?:py|sh|md)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert "scripts/" not in text


@pytest.fixture(scope="module")
def sanitizer_cases() -> ModuleType:
    return load(BENCHMARKS / "checks" / "sanitizer_cases.py")


@pytest.mark.parametrize("kind", [tiling.Gemm, Gemm8])
def test_the_sanitizer_cases_fit_narrow(kind, sanitizer_cases, tmp_path, monkeypatch) -> None:
    """Compiling it with an arrival of every lane is a replacement in its text, which may change."""

    def count(text: str, of) -> int:
        return sum(part.count(text) for part in (of.text, *of.headers.values()))

    was = launch.source(kind)
    changed = sanitizer_cases.every_lane_arrives(was)
    assert count("lane == 0) mbarrier_arrive(", was) == 2
    assert count("lane == 0) mbarrier_arrive(", changed) == 0
    assert count("mbarrier_arrive(", changed) == count("mbarrier_arrive(", was)
    assert count("32 * N", changed) == count("32 * N", was) + 2
    assert count("mbarrier_init(", was) == 3, "its function, full and empty: no barrier is left out"
    assert changed.headers.keys() == was.headers.keys()
    if nvrtc.problem() is None:
        monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
        fc1, _ = tiling.cut_layer(LayerShape(5, 96, 160), 16, kind)
        compiled = [nvrtc.compile_cubin(source, fc1.macros()) for source in (was, changed)]
        assert compiled[0] != compiled[1]


@pytest.mark.parametrize("kernel", [WideKernel, Wide8Kernel])
def test_the_sanitizer_cases_fit_wide_and_wide8(sanitizer_cases, kernel) -> None:
    """Their cuts say it by a macro; and what the rig sets is what the kernel reads."""
    shape = LayerShape(5, 96, 160)
    as_shipped = kernel.cut_layer(shape)
    changed = sanitizer_cases.with_every_lane(kernel.cut_layer).__func__(shape)
    for one, other in zip(as_shipped, changed, strict=True):
        assert {*one.macros().items()} ^ {*other.macros().items()} == {
            ("EVERY_LANE_ARRIVES", 0),
            ("EVERY_LANE_ARRIVES", 1),
        }


def test_the_sanitizer_cases_run_every_way_of_our_kernels(sanitizer_cases) -> None:
    """Both cuts of wide and wide8 whatever the number of tokens, and among the cases both of
    narrow's and narrow8's segments.
    """
    assert {kernel for kernel, _ in sanitizer_cases.WAYS.values()} == {
        "narrow", "narrow8", "wide", "wide8"
    }  # fmt: skip
    segments = set()
    for _, e, h, i, top_k, tokens in sanitizer_cases.CASES:
        p = SimpleNamespace(shape=LayerShape(e, h, i), ep_size=1)
        for way, (kernel, pairs) in sanitizer_cases.WAYS.items():
            few_serve = tokens <= tokens_of(p, pairs, top_k)
            assert few_serve is (kernel.startswith("narrow") or "few" in way)
        small = tokens <= tokens_of(p, narrow.SMALL_SEGMENT_PAIRS, top_k)
        for kind in (tiling.Gemm, Gemm8):
            segments.add((kind, tiling.segments(p.shape, kind)[0 if small else -1]))
    assert segments == {(kind, size) for kind in (tiling.Gemm, Gemm8) for size in (8, 16)}
    for kernel in (WideKernel, Wide8Kernel):
        assert {"few_pairs", "cut_layer"} <= vars(kernel).keys(), "what the rig sets is read"


# Several engines at once --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_rig() -> Iterator[ModuleType]:
    folder = BENCHMARKS / "engines" / "vllm"
    sys.path.insert(0, str(folder))
    try:
        yield load(folder / "run.py")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("engine", None)  # another rig has one of that name


def test_modes_are_compared_with_modes_of_their_checkpoint(vllm_rig) -> None:
    for name, mode in vllm_rig.MODES.items():
        assert mode.gpus in (1, 2, 4)
        assert name not in mode.against
        assert set(mode.environment) <= {variable.name for variable in env.VARIABLES}
        for other in mode.against:
            assert vllm_rig.MODES[other].checkpoint == mode.checkpoint
            assert vllm_rig.MODES[other].gpus <= mode.gpus


def test_a_report_says_which_checkpoints_ran(vllm_rig, tmp_path) -> None:
    """By their own config.json, whoever wrote them: DeepSeek-V4's is not made by the rig."""
    given = {"layers": 2, "hidden": 64, "intermediate": 96, "experts": 4, "top_k": 2}
    (tmp_path / "deepseek-v4").mkdir()
    config = deepseek_v4_config(layers=2, hash_layers=1)
    (tmp_path / "deepseek-v4" / "config.json").write_text(json.dumps(config))
    modes = ["ours", "qwen_ours", "dsv4_ours"]
    assert vllm_rig.write_checkpoints(tmp_path, modes, given) == {
        "gpt-oss": given,
        "qwen3-moe": {"layers": 2, "hidden": 256, "intermediate": 384, "experts": 8, "top_k": 2},
        "deepseek-v4": {
            "layers": 2,
            "hidden": 4096,
            "intermediate": 2048,
            "experts": 256,
            "top_k": 6,
            "hash_layers": 1,
            "compress_ratios": [0, 0],
        },
    }


def test_engines_share_gpus_as_far_as_there_is_room(vllm_rig) -> None:
    """An engine's ranks have different GPUs, those with most room; one that finds none waits."""
    gpus = vllm_rig.Gpus(["0", "1", "2"], at_once=2)
    assert gpus.take(2, 0) == ["0", "1"]
    assert gpus.take(2, 0) == ["0", "2"]
    assert gpus.take(2, 0) == ["1", "2"]
    assert gpus.take(1, 0.01) == []
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(gpus.take, 1, 10)
        assert not waits.done()
        gpus.give_back(["1"])
        assert waits.result(10) == ["1"]


SLEEPER = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
)


@pytest.mark.parametrize(
    ("others", "limit", "why"),
    [(["pass"], 10, None), ([SLEEPER, "exit(3)"], 30, "status 3"), ([SLEEPER], 0.5, "longer")],
)
def test_a_mode_ends_when_one_of_its_processes_fails(vllm_rig, others, limit, why) -> None:
    """With what the others started, and not only after the limit."""
    began = time.monotonic()
    started = [
        subprocess.Popen([sys.executable, "-c", text], start_new_session=True) for text in others
    ]
    found = vllm_rig.wait_for(started, lambda: max(0, began + limit - time.monotonic()))
    assert found is None if why is None else why in found
    assert all(process.returncode is not None for process in started)
    assert time.monotonic() - began < 25


def test_answers_of_data_parallel_engines_are_put_together(vllm_rig) -> None:
    parts = [
        {"mode": "m", "answers": answers, "layers": [rank], "calls": [rank]}
        for rank, answers in enumerate((["a", "c"], ["b", "d"]))
    ]
    assert vllm_rig.merged(parts) == {
        "mode": "m",
        "answers": ["a", "b", "c", "d"],
        "layers": [0, 1],
        "calls": [0, 1],
        "engines": 2,
    }


# The comparison of tokens -------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def tokens() -> Iterator[ModuleType]:
    return load(SHARED / "tokens.py")


def answer(*steps: dict[int, float], tokens: list[int] | None = None) -> dict:
    """An answer whose token at each step is the likeliest, unless others are given."""
    chosen = [max(step, key=step.get) for step in steps] if tokens is None else tokens
    return {"tokens": chosen, "logprobs": [{str(t): p for t, p in s.items()} for s in steps]}


SURE = {1: -0.1, 2: -3.0}
CLOSE = {4: -0.7, 5: -0.75}
OTHERWISE = {5: -0.69, 4: -0.71}


def test_where_they_part(tokens) -> None:
    assert tokens.where_they_part([1, 2, 3], [1, 2, 3]) is None
    assert tokens.where_they_part([1, 2, 3], [1, 5, 3]) == 1
    assert tokens.where_they_part([4], [5]) == 0
    assert tokens.where_they_part([1, 2], [1, 2, 3]) is None
    assert tokens.where_they_part([], [1]) is None


def test_equal_answers(tokens) -> None:
    found = tokens.compare([answer(SURE, CLOSE)], [answer(SURE, CLOSE)], "stock")
    assert found == {
        "tokens": ["equal"],
        "largest_logprob_difference": 0.0,
        "distinct_tokens": 2,
    }


def test_answers_that_part(tokens) -> None:
    """The margin is the first's, at the token where they part."""
    first, other = answer(SURE, CLOSE, SURE), answer(SURE, OTHERWISE, SURE)
    assert tokens.compare([first], [other], "stock")["tokens"] == [
        "part at token 1, where stock chose by 0.0500 nats"
    ]
    assert tokens.compare([other], [first], "ours")["tokens"] == [
        "part at token 1, where ours chose by 0.0200 nats"
    ]


def test_a_tie(tokens) -> None:
    """Either of two equally likely tokens may have been chosen, whichever is listed first."""
    tie = {4: -0.7, 5: -0.7, 6: -2.0}
    for chosen in (4, 5):
        assert tokens.margin(answer(tie, tokens=[chosen]), 0) == 0
    first, other = answer(tie, tokens=[4]), answer(tie, tokens=[5])
    assert tokens.verdict(first, other, "stock") == (
        "part at token 0, where stock chose by 0.0000 nats"
    )


def test_a_token_that_was_not_the_likeliest(tokens) -> None:
    assert tokens.margin(answer(CLOSE, tokens=[5]), 0) == pytest.approx(-0.05)


@pytest.mark.parametrize(("step", "chosen"), [({4: -0.7}, 4), ({4: -0.7, 5: -0.7}, 6)])
def test_a_margin_that_is_not_known(tokens, step, chosen) -> None:
    """A single log-probability was reported, or none for the token that was chosen."""
    first, other = answer(step, tokens=[chosen]), answer(step, tokens=[9])
    assert tokens.margin(first, 0) is None
    assert tokens.verdict(first, other, "stock") == (
        "part at token 0, where stock chose by an unknown margin"
    )


def test_different_lengths(tokens) -> None:
    """Not equal, though neither says otherwise as far as both go."""
    short, long = answer(SURE), answer(SURE, CLOSE)
    assert tokens.verdict(long, short, "stock") == "2 and 1 tokens"
    assert tokens.verdict(answer(CLOSE), long, "stock").startswith("part at token 0")
    with pytest.raises(ValueError, match="shorter"):
        tokens.compare([short, short], [short], "stock")


def test_logprobs_are_compared_while_the_texts_are_the_same(tokens) -> None:
    """At the step where they part both have the same text before them; after it no longer."""
    far = {7: -0.2, 8: -9.0}
    moved = {7: -0.2, 8: -1.0}
    assert tokens.largest_logprob_difference(
        answer(SURE, CLOSE, far), answer(SURE, OTHERWISE, moved)
    ) == pytest.approx(0.06)
    assert tokens.largest_logprob_difference(
        answer(SURE, CLOSE, far), answer(SURE, CLOSE, moved)
    ) == pytest.approx(8.0)
    # A token that only one of them reported has nothing to be compared with.
    assert tokens.largest_logprob_difference(answer({1: -0.1}), answer({2: -0.1})) == 0


def test_distinct_tokens(tokens) -> None:
    assert tokens.distinct_tokens([answer(SURE, SURE), answer(SURE, CLOSE)]) == 2


def test_prompts_fit_the_made_checkpoints(tokens) -> None:
    assert max(map(max, tokens.PROMPTS)) < 1003
    assert min(map(min, tokens.PROMPTS)) >= 3  # below are the special tokens
    assert max(map(len, tokens.PROMPTS)) + tokens.NEW_TOKENS <= 1024  # the rigs' longest context


def test_results_with_their_logits(tokens, tmp_path) -> None:
    """Two result files; logits only count where both modes left theirs."""
    paths = []
    for mode, step in (("stock", CLOSE), ("ours", OTHERWISE)):
        paths.append(tmp_path / f"{mode}.json")
        paths[-1].write_text(json.dumps({"mode": mode, "answers": [answer(step)]}))
    found = tokens.compare_results(*paths)
    assert found["tokens"] == ["part at token 0, where stock chose by 0.0500 nats"]
    assert "max_logit_difference" not in found
    first = [torch.tensor([[0.0, 1.0], [3.0, -4.0]]), torch.tensor([[1.0, 2.0]])]
    other = [first[0] + torch.tensor([[2.0, 0.0], [0.0, 0.0]]), first[1]]
    for path, logits in zip(paths, (first, other), strict=True):
        torch.save(logits, tokens.logits_beside(path))
    found = tokens.compare_results(*paths)
    assert found["max_logit_difference"] == 2
    assert found["relative_l2"] == pytest.approx(2 / math.sqrt(31))
    assert found["mean_logit_difference"] == pytest.approx(0.25)
    assert found["largest_logit"] == 4
    assert found["same_argmax"] == ["1/2", "1/1"]


def test_recorded_servers_compare_as_they_did() -> None:
    """On answers that three SGLang servers gave on H100s, among them a tie and a close choice."""
    recorded = json.loads((BENCHMARKS / "results" / "sglang-four-gpus-h100.json").read_text())
    full = {"stock", "ours", "stock_ep2"}  # of the others the log-probabilities were not kept
    modes = {mode["mode"]: dict(mode) for mode in recorded["modes"] if mode["mode"] in full}
    then = {name: mode.pop("against_stock", None) for name, mode in modes.items()}
    load(BENCHMARKS / "engines" / "sglang" / "run.py").compare_all(modes)
    assert {name for name, was in then.items() if was} == full - {"stock"}
    for name in full - {"stock"}:
        assert modes[name]["against_stock"] == then[name]
