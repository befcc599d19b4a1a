"""The documentation keeps up: variables, commands, links, examples and the width of its lines."""

import ast
import importlib
import inspect
import re
import tomllib
import types
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name

import click
import pytest
from packaging.version import Version

from hopper_mxfp4.env import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
GENERATED = {"bench.md", "gpu-tests.md", "reliability.md"}
NAME = r"HOPPER_MXFP4(?:_[A-Z0-9]+)*"
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sections(page: Path, level: str = "##") -> dict[str, str]:
    """The text under each heading of a level, by heading."""
    _, *found = re.split(rf"^{level} (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


# --- Variables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_variable_is_described(variable) -> None:
    """It has a heading with its name, and under it its default and every choice."""
    described = sections(DOCS / "configuration.md")
    assert variable.name in described, "no heading of docs/configuration.md names it"
    for word in (variable.default, *(variable.choices or ())):
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", described[variable.name]), (
            f"its section does not mention {word!r}"
        )


def test_no_other_variable_is_described() -> None:
    found = {name for page in PAGES for name in re.findall(rf"\b{NAME}\b", page.read_text())}
    assert found == {variable.name for variable in VARIABLES}


def test_every_variable_in_the_sources_is_declared() -> None:
    """Any name of ours in core/ or adapters/, read or only mentioned, is one that env.py
    declares.
    """
    declared = {variable.name for variable in VARIABLES}
    sources = [
        path for folder in ("core", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = {name: path for path in sources for name in re.findall(NAME, path.read_text())}
    assert found.keys() >= declared, "the pattern finds less than there is"
    unknown = {name: page_id(path) for name, path in found.items() if name not in declared}
    assert not unknown


def test_variables_are_well_formed() -> None:
    for variable in VARIABLES:
        assert re.fullmatch(NAME, variable.name)
        assert variable.help
        assert variable.choices is None or variable.default in variable.choices
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)


# --- Commands -------------------------------------------------------------------------------------


def commands() -> dict[str, click.Command]:
    """The command line's own objects, by the name of the script that starts it."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    main = resolve_name(script["hopper-mxfp4"])
    context = click.Context(main)
    return {name: main.get_command(context, name) for name in main.list_commands(context)}


def options_of(command: click.Command) -> dict[str, click.Option]:
    return {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if isinstance(parameter, click.Option)
    }


def test_every_command_and_no_other_is_described() -> None:
    described = sections(DOCS / "cli.md").keys() - {"Layers"}
    assert described == commands().keys()


@pytest.mark.parametrize("name", commands())
def test_every_option_and_no_other_is_described(name) -> None:
    """In the command's table, with the default that its help shows."""
    rows = re.findall(r"^\| (`--.+?) \| (.*?) \|", sections(DOCS / "cli.md")[name], re.MULTILINE)
    defaults = {option: told for cell, told in rows for option in re.findall(r"`(--.+?)`", cell)}
    options = options_of(commands()[name])
    assert defaults.keys() == options.keys()
    for option, parameter in options.items():
        if parameter.show_default and not parameter.is_flag:
            shown = str(parameter.default).removesuffix(".0")
            assert defaults[option] == f"`{shown}`", option


# --- Log lines ------------------------------------------------------------------------------------

SGLANGS_OWN = (
    "Skipping plugin hopper_mxfp4 (not in SGLANG_PLUGINS)",
    "argument --moe-runner-backend: invalid choice: 'hopper_mxfp4'",
    "Rank 0 scheduler is dead",
)


def text_of(node: ast.AST) -> str:
    """What a string literal says, with `{}` for what an f-string fills in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


@pytest.fixture(scope="module")
def strings() -> str:
    """Every string in the core's and the adapters' sources."""
    paths = [path for folder in ("core", "adapters") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(
        text_of(node) for path in paths for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("name", ["vllm.md", "sglang.md"])
def test_log_lines_are_what_the_code_says(name, strings) -> None:
    """Those that the troubleshooting tables name, but for `..` and what stands for a value."""
    table = sections(DOCS / name)["Troubleshooting by log line"]
    lines = [line for line in re.findall(r"^\| `(.+?)` \|", table, re.M) if line not in SGLANGS_OWN]
    assert len(lines) >= 8
    pieces = {
        piece.strip(" :(),;") for line in lines for piece in re.split(r"\.\.|REASON|\bX\b", line)
    }
    assert not {piece for piece in pieces if piece not in strings}


# --- Links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        taken = sum(
            re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found
        )
        found.add(f"{anchor}-{taken}" if taken else anchor)
    return found


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "benchmarks").rglob("*.md"))], ids=page_id
)
def test_links_lead_somewhere(page) -> None:
    """To a file or folder that is in the repository, and to a heading that it has."""
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_that_are_named_exist(page) -> None:
    """In backticks, from the repository's root."""
    named = re.findall(
        r"`((?:core|adapters|benchmarks|docs|tests|requirements)/[\w./-]*)", page.read_text()
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_is_linked() -> None:
    """From the README, or from a page that is."""
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            path = (page.parent / target).resolve()
            if path.suffix == ".md" and path.exists():
                todo.append(path)
    assert not {page_id(page) for page in DOCS.rglob("*.md")} - {
        page_id(page) for page in seen if page.is_relative_to(DOCS)
    }


# --- Examples -------------------------------------------------------------------------------------


def test_the_examples_run(registered) -> None:
    """docs/extending.md's Python in its order; each hook is registered where it is defined."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "extending.md").read_text(), re.M | re.S)
    example = types.ModuleType("extending_example")
    hooks: list[str] = []
    with ExitStack() as stack:
        for number, block in enumerate(blocks, start=1):
            code = compile(block, f"docs/extending.md, example {number}", "exec")
            exec(code, example.__dict__)
            for hook in re.findall(r"^def (register_\w+)", block, re.MULTILINE):
                plugin = types.SimpleNamespace(**{hook: getattr(example, hook)})
                stack.enter_context(registered(plugin))
                hooks.append(hook)
    assert hooks == ["register_kernels", "register_families", "register_adapters"]


def test_the_readme_names_what_there_is() -> None:
    """Its library example imports public names and reads as Python."""
    import hopper_mxfp4

    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    compile(block, "README.md", "exec")
    (names,) = re.findall(r"from hopper_mxfp4 import (.+)", block)
    assert {name.strip() for name in names.split(",")} <= {*hopper_mxfp4.__all__}


PUBLIC = ("hopper_mxfp4", "hopper_mxfp4.plugin", "hopper_mxfp4.loading")


def arguments_of(item: object) -> str:
    """As docs/api.md writes them: `a, *, b=`, for what may be left out."""
    told = []
    by_name = False
    for p in inspect.signature(item).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not by_name:
            told.append("*")
            by_name = True
        told.append(p.name if p.default is p.empty else f"{p.name}=")
    return ", ".join(told)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_api_page_lists_every_public_name_and_no_other(name) -> None:
    """With how stable it is, and with the arguments that it has, where it shows any; it does for
    every function.
    """
    module = importlib.import_module(name)
    rows = re.findall(
        r"^\| (`.*?) \| .*\| (\w+) \|$", sections(DOCS / "api.md")[f"`{name}`"], re.MULTILINE
    )
    assert {stability for _, stability in rows} <= {"stable", "provisional"}
    listed = [entry for cell, _ in rows for entry in re.findall(r"`(\w+)(?:\((.*?)\))?`", cell)]
    assert sorted(entry for entry, _ in listed) == sorted(module.__all__)
    shown = dict(re.findall(r"`(\w+)\((.*?)\)`", " ".join(cell for cell, _ in rows)))
    assert shown == {entry: arguments_of(getattr(module, entry)) for entry in shown}
    functions = {n for n in module.__all__ if inspect.isfunction(getattr(module, n))}
    assert functions <= shown.keys()


def test_the_api_page_names_what_layers_and_kernels_have() -> None:
    """A prepared layer's stable fields and methods, and the whole of a kernel's protocol."""
    from hopper_mxfp4 import PreparedExperts
    from hopper_mxfp4.plugin import Kernel

    page = sections(DOCS / "api.md")
    told = re.search(r"^Of a `PreparedExperts`, (.*?)\. Its", page["`hopper_mxfp4`"], re.M | re.S)
    fields = {*re.findall(r"`(\w+)`", told[1])}
    assert fields <= {*PreparedExperts.__dataclass_fields__, *vars(PreparedExperts)}
    (kernel,) = re.findall(r"^\| `Kernel` \|.*", page["`hopper_mxfp4.plugin`"], re.MULTILINE)
    members = {*Kernel.__annotations__, *(n for n in vars(Kernel) if not n.startswith("_"))}
    assert members
    optional = {"takes_expert_map", "compilations"}
    assert {*re.findall(r"`(\w+)", kernel)} == {"Kernel", *optional, *members}
    assert all(re.search(rf"\b{name}\b", Kernel.__doc__) for name in optional)


# --- The package ----------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_changelog_begins_with_this_version() -> None:
    """Or with what is not released yet, and then with the version before it."""
    import hopper_mxfp4

    headings = re.findall(r"^## \[(.+?)\](.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [h for h in headings if h[0] != "Unreleased"]
    assert headings[-len(released) :] == released, "Unreleased comes first"
    assert released[0][0] == hopper_mxfp4.__version__
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released)
    assert [v for v, _ in released] == sorted((v for v, _ in released), key=Version, reverse=True)


def test_extras_that_pages_name_exist() -> None:
    """Where something is installed with them, and where a page says that it needs one."""
    named = {
        extra
        for page in PAGES
        for pattern in (r"(?:hopper-mxfp4|-e '?\.)\[([\w,]+)\]", r"[Tt]he `(\w+)` extra")
        for found in re.findall(pattern, page.read_text())
        for extra in found.split(",")
    }
    assert {"vllm", "sglang", "demo", "bench", "test"} <= named
    assert named <= PROJECT["optional-dependencies"].keys()
    (told,) = re.findall(r"^- The extras (.*?) are stable", (DOCS / "api.md").read_text(), re.M)
    assert {*re.findall(r"`(\w+)`", told)} == PROJECT["optional-dependencies"].keys() - {"test"}


def test_the_readme_asks_for_what_the_package_asks_for() -> None:
    """The least versions of its table of requirements."""
    extras = PROJECT["optional-dependencies"]
    asked = {
        "Python": PROJECT["requires-python"],
        "torch": PROJECT["dependencies"][0],
        "vLLM": extras["vllm"][0],
        "SGLang": extras["sglang"][0],
        "FlashInfer": extras["flashinfer"][0],
    }
    table = sections(ROOT / "README.md")["Requirements"]
    for name, requirement in asked.items():
        least = requirement.partition(">=")[2]
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", table, re.MULTILINE)
        assert re.search(rf"(?<![\d.]){re.escape(least)}(?![.\d])", row), (name, row)


# --- Manner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in GENERATED | {"wide-kernel.md"}],
    ids=page_id,
)
def test_lines_are_at_most_100_columns(page) -> None:
    """But for tables, images, and what a program says or is told in one line."""
    text = FENCE.sub("", page.read_text())
    long = [line for line in text.splitlines() if len(line) > 100]
    assert not [line for line in long if not line.startswith(("|", "!["))]
