#!/usr/bin/env python3
"""Write docs/dev/evidence/imports.md: which module of the core imports which, before and after.

    python docs/dev/generate/import_graph.py [BEFORE]

BEFORE is a commit, by default the last one before the core was cut into layers. Both graphs are
read from the sources; imports for type checkers alone are left out.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "dev" / "evidence" / "imports.md"
CORE = "core/hopper_mxfp4"
PACKAGE = "hopper_mxfp4"
BEFORE = "10dec64"
INTRODUCTION = """\
# The core's imports

Made by `docs/dev/generate/import_graph.py`, not written by hand. An arrow says that something in
one room imports something in another; a kernel's wing is a room of its own. Imports for type
checkers alone are left out, and so is, where there is no circle, an arrow that a longer way says
too. `make lint` holds the layers."""
Graph = dict[str, set[str]]


def sources_at(commit: str) -> dict[str, str]:
    """Every Python file of the core, by its path below core/, as a commit has it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    paths = git("ls-tree", "-r", "--name-only", commit, CORE).splitlines()
    return {
        path.removeprefix("core/"): git("show", f"{commit}:{path}")
        for path in paths
        if path.endswith(".py")
    }


def sources_now() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT / "core")): path.read_text()
        for path in sorted((ROOT / CORE).rglob("*.py"))
    }


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Imports(ast.NodeVisitor):
    """What a module imports, within functions too, but not what only a type checker sees."""

    def __init__(self, package: list[str], known: set[str]) -> None:
        self.package, self.known, self.found = package, known, set[str]()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names} & self.known

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self.package[: len(self.package) - node.level + 1] if node.level else []
        base = ".".join([*parts, *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            self.found |= {inner if inner in self.known else base} & self.known


def graph_of(sources: dict[str, str]) -> Graph:
    known = {module_of(path) for path in sources}
    graph: Graph = {}
    for path, text in sources.items():
        module = module_of(path)
        package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
        visitor = Imports(package, known)
        visitor.visit(ast.parse(text))
        graph[module] = visitor.found - {module}
    return graph


def reached_from(graph: Graph, starts: set[str]) -> set[str]:
    """What one gets to from there by one import or more."""
    seen: set[str] = set()
    todo = [*starts]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def circles(graph: Graph) -> list[list[str]]:
    """The sets of modules each of which reaches every other, largest first."""
    reached = {module: reached_from(graph, {module}) for module in graph}
    found = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }
    return sorted((sorted(circle) for circle in found), key=len, reverse=True)


def thinned(graph: Graph) -> Graph:
    """Without the imports that a longer way says too. Only for a graph without circles."""
    return {
        name: imported - {o for other in imported for o in reached_from(graph, {other})}
        for name, imported in graph.items()
    }


def room(module: str) -> str:
    """A module's room: what stands directly under the package, but a kernel's wing for itself."""
    parts = module.split(".")[1:]
    return "/".join(parts[:2] if parts[:1] == ["kernels"] else parts[:1]) or "the package's top"


def rooms(graph: Graph) -> Graph:
    found: Graph = {}
    for module, imported in graph.items():
        into = found.setdefault(room(module), set())
        into |= {room(other) for other in imported} - {room(module)}
    return found


def drawing(graph: Graph) -> str:
    """In Mermaid's words, without the package's top and __main__, which import everything."""
    hidden = {"the package's top", "__main__"}
    shown = {
        name: imported - hidden
        for name, imported in graph.items()
        if name not in hidden and (imported or any(name in others for others in graph.values()))
    }
    shown = shown if circles(shown) else thinned(shown)
    numbers = {name: f"n{n}" for n, name in enumerate(sorted(shown))}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {number}[{name}]" for name, number in numbers.items()]
    lines += [
        f"  {numbers[name]} --> {numbers[other]}"
        for name in sorted(shown)
        for other in sorted(shown[name])
    ]
    return "\n".join([*lines, "```"])


def told(circle: list[str]) -> str:
    names = (module.removeprefix(f"{PACKAGE}.") for module in circle)
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 98, subsequent_indent="  ")


def section(title: str, graph: Graph) -> list[str]:
    found, edges = circles(graph), sum(map(len, graph.values()))
    sizes = ", ".join(f"a circle of {len(circle)} modules" for circle in found) or "no circle"
    counted = f"{len(graph)} modules, {edges} imports between them, {sizes}."
    parts = [f"## {title}", counted]
    parts += [f"- {told(circle)}" for circle in found]
    return [*parts, drawing(rooms(graph))]


def page(before: str) -> str:
    parts = [INTRODUCTION]
    parts += section("As it is", graph_of(sources_now()))
    parts += section(f"Before it was cut into layers ({before})", graph_of(sources_at(before)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(*sys.argv[1:2] or [BEFORE]))
