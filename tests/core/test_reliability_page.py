"""The evidence pages are what their scripts make of the recorded runs, and name tests that
exist.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    path = ROOT / "docs" / "dev" / "generate" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("reliability_table")


def test_the_page_is_made_from_the_recorded_runs(script) -> None:
    assert script.PAGE.read_text() == script.page(script.runs(script.RESULTS)), (
        "run docs/dev/generate/reliability_table.py"
    )


def test_the_page_of_gpu_tests_is_made_from_the_recorded_run() -> None:
    gpu_tests = load("gpu_tests_table")
    made = gpu_tests.page(json.loads(gpu_tests.RESULT.read_text()))
    assert gpu_tests.PAGE.read_text() == made, "run docs/dev/generate/gpu_tests_table.py"


def test_the_bench_tables_are_made_from_the_recorded_runs() -> None:
    tables = load("bench_tables")
    assert tables.PAGE.read_text() == tables.page(), "run docs/dev/generate/bench_tables.py"


def test_every_row_names_a_test(script) -> None:
    for _, tried, name in script.ROWS:
        path, _, function = name.partition("::")
        assert re.search(
            rf"^def {function}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE
        ), tried
    assert len({name for _, _, name in script.ROWS}) == len(script.ROWS)


def test_rows(script) -> None:
    """Passed, failed and not run are told apart, and parametrised tests are summed.

    A test whose name begins with another's is not counted for it.
    """

    def test(name: str, outcome: str, **seen) -> dict:
        return {"test": f"tests/{name}", "outcome": outcome, "seen": seen}

    tests = [
        test("core/test_a.py::test_x[1]", "passed", times=20, worst_ulps=0.5, kind="a"),
        test("core/test_a.py::test_x[2]", "passed", times=30, worst_ulps=1.25, kind="b"),
        test("core/test_a.py::test_x_too", "failed"),
        test("gpu/test_a.py::test_x", "skipped"),
    ]
    found = {"CPU": {"tests": tests}}
    assert (
        script.row("P", "t", "core/test_a.py::test_x", found)
        == "| P | t | CPU | 50 | right | worst ulps 0.5 to 1.25, kind a to b |"
    )
    assert (
        script.row("", "t", "core/test_a.py::test_x_too", found)
        == "|  | t | CPU | 1 | **1 of 1 tests failed** |  |"
    )
    for name in ("gpu/test_a.py::test_x", "core/test_b.py::test_x"):
        assert "| not run yet |" in script.row("", "t", name, found)
