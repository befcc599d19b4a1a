"""What is built and installed is what is here, and nothing else is fetched, run or unpickled."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from packaging.metadata import Metadata

import hopper_mxfp4

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])


def run(*command, **options) -> str:
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=900, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["core", "vllm", "vllm-0.29.0", "vllm-0.33.0"])
def test_requirements_are_pinned_and_hashed(name) -> None:
    """Every one by version and at least one SHA-256; torch, whose builds differ, by version in
    constraints.txt.
    """
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    entries = re.sub(r"#.*", "", text).replace("\\\n", " ").split("\n")
    entries = [entry.strip() for entry in entries if entry.strip()]
    assert entries
    for entry in entries:
        assert re.fullmatch(
            r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ;]+( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+",
            entry,
        ), entry
    assert not re.search(r"^(torch|nvidia-(?!cuda-nvrtc|cuda-nvdisasm)\S+)==", text, re.MULTILINE)
    assert re.search(
        r"^torch==", (ROOT / "requirements" / "constraints.txt").read_text(), re.MULTILINE
    )


def test_hashed_requirements_hold_what_pyproject_asks_for() -> None:
    """By name, with torch; and the versions are those of constraints.txt."""
    from packaging.requirements import Requirement

    asked = {
        Requirement(text).name
        for text in metadata.requires("hopper-mxfp4")
        if not re.search(r"extra == .(vllm|sglang|flashinfer)", text)
    }
    builds = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    asked |= {Requirement(text).name for text in builds}
    for name in ("core", "vllm"):
        pinned = dict(
            re.findall(
                r"^([A-Za-z0-9._-]+)==([^ ;]+)",
                (ROOT / "requirements" / f"{name}.txt").read_text(),
                re.MULTILINE,
            )
        )
        assert {"torch", *pinned} >= asked
        constraints = dict(
            re.findall(
                r"^(\S+)==(\S+)",
                (ROOT / "requirements" / "constraints.txt").read_text(),
                re.MULTILINE,
            )
        )
        assert {n: v for n, v in pinned.items() if n in constraints} == {
            n: v for n, v in constraints.items() if n in pinned
        }


def _not_sources(folder: str, names: list[str]) -> set[str]:
    """What git does not hold."""
    return {
        n
        for n in names
        if (n.startswith(".") and n not in (".gitignore", ".ci"))
        or n in ("dist", "build", "__pycache__")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Path]:
    """Two folders with a wheel and an sdist each, from copies of the sources that differ in all but
    their content.
    """
    folders = []
    for n, (mask, seed) in enumerate(((0o022, "1"), (0o077, "2"))):
        top = tmp_path_factory.mktemp(f"built{n}")
        source = top / ("a" if n else "quite/another/place")
        shutil.copytree(ROOT, source, ignore=_not_sources)
        for path in source.rglob("*"):
            os.utime(path, (10**9 + n, 10**9 + 7 * n))
            path.chmod((0o755 if path.is_dir() else 0o644) & ~mask)
        environment = {
            **os.environ,
            "SOURCE_DATE_EPOCH": "1700000000",
            "PYTHONHASHSEED": seed,
            "TZ": ("UTC", "Asia/Tokyo")[n],
        }
        run(
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            top / "dist",
            source,
            env=environment,
            cwd=top,
        )
        folders.append(top / "dist")
    return folders


def test_builds_are_reproducible(built, record_property) -> None:
    """Byte for byte, whatever the folder, times, modes, time zone and hash seed."""
    first, second = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
        for folder in built
    )
    record_property("times", 2)
    record_property("files", ", ".join(sorted(first)))
    assert first == second
    assert {name.rpartition(".")[2] for name in first} == {"whl", "gz"}


def sources_of_the_wheel() -> dict[str, Path]:
    """Where a file lies once it is installed, and where it lies here."""
    folders = (ROOT / "core", ROOT / "adapters/vllm", ROOT / "adapters/sglang")
    return {
        str(path.relative_to(folder)): path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".typed", ".json", ".cu", ".cuh")
    }


def test_what_is_in_them(built) -> None:
    """The wheel holds the three packages and nothing beside, kernels' sources and licence included;
    the sdist holds all that git does.
    """
    (wheel,) = built[0].glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"hopper_mxfp4-{hopper_mxfp4.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {
        "hopper_mxfp4",
        "hopper_mxfp4_vllm",
        "hopper_mxfp4_sglang",
        info,
    }
    wanted = {*sources_of_the_wheel()}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", *wanted} <= {*names}
    assert all(name in wanted for name in names if not name.startswith(f"{info}/"))
    assert "hopper_mxfp4/py.typed" in wanted
    kernels = {name.split("/")[2] for name in wanted if name.endswith((".cu", ".cuh"))}
    assert {"cuda", "narrow", "narrow8", "wide", "wide8"} <= kernels
    with tarfile.open(next(built[0].glob("*.tar.gz"))) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    if (ROOT / ".git").exists():
        assert {*run("git", "ls-files", cwd=ROOT).splitlines()} <= sdist
    wanted = [
        "CHANGELOG.md",
        "Makefile",
        "LICENSE",
        "pyproject.toml",
        "requirements/core.txt",
        "tests/core/test_supply_chain.py",
        "docs/configuration.md",
        "benchmarks/engines/shared/tokens.py",
    ]
    assert {*wanted} <= sdist


def test_the_sdist_can_be_tested(built, tmp_path) -> None:
    """Its tests of the documentation pass: all pages are there, and every link leads somewhere."""
    with tarfile.open(next(built[0].glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    path = os.pathsep.join(str(source / f) for f in ("core", "adapters/vllm", "adapters/sglang"))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core")
    run(*command, "-k", "test_docs", cwd=source, env=os.environ | {"PYTHONPATH": path})


def test_what_a_package_index_shows(built) -> None:
    """Valid metadata, the same in both, that say what pyproject.toml does; and the README as
    Markdown without a link or an image that only works beside the sources.
    """
    (wheel,) = built[0].glob("*.whl")
    (info,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(info)
    with tarfile.open(next(built[0].glob("*.tar.gz"))) as archive:
        (member,) = (
            m for m in archive.getmembers() if m.name.count("/") == 1 and "PKG-INFO" in m.name
        )
        assert archive.extractfile(member).read() == text
    shown = Metadata.from_email(text, validate=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (shown.name, str(shown.version)) == ("hopper-mxfp4", hopper_mxfp4.__version__)
    assert shown.summary == project["description"]
    assert str(shown.requires_python) == project["requires-python"]
    assert (shown.license_expression, shown.license_files) == ("Apache-2.0", ["LICENSE"])
    assert {*shown.provides_extra} == project["optional-dependencies"].keys()
    assert {*shown.classifiers} == {*project["classifiers"]}
    assert all(address.startswith("https://") for address in (shown.project_urls or {}).values())

    assert shown.description_content_type == "text/markdown"
    tokens = MarkdownIt("commonmark").enable("table").parse(shown.description)
    inline = [child for token in tokens for child in token.children or ()]
    addresses = [t.attrs.get("href", t.attrs.get("src")) for t in inline if t.attrs]
    assert all(str(address).startswith("https://") for address in addresses), addresses
    written = " ".join(t.content for t in inline if t.type == "text")
    assert "](" not in written
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    readme = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert headings == re.findall(r"^#+ (.+)$", readme, re.MULTILINE)
    tables = sum(token.type == "table_open" for token in tokens)
    assert tables == len(re.findall(r"^\|[-|]+\|$", readme, re.MULTILINE)) > 0


NO_NETWORK = """
    import sys

    def audit(event, arguments):
        if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
            raise AssertionError(f"network: {event} {arguments}")
        if event in ("pickle.find_class", "marshal.load"):
            raise AssertionError(f"unpickled: {event} {arguments}")

    import torch
    sys.addaudithook(audit)
"""

USE = """
    import hopper_mxfp4
    from hopper_mxfp4 import *
    from hopper_mxfp4 import registry
    from hopper_mxfp4.cli.main import main
    from hopper_mxfp4.tuning import tables

    w = allocate_weights(LayerShape(2, 64, 32), family=GPT_OSS, device="cpu")
    p = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU.from_config({"model_type": "gpt_oss"}))
    x, ids = torch.ones(3, 64, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    call = x, ids, torch.ones(3, 1)
    assert not fused_moe(*call, p).any()
    reference_moe(*call, restore_weights(p), family=GPT_OSS, swiglu=SwiGLU())
    tables.tables()
    registry.adapters()
    try:
        main(["check", "--json"])
    except SystemExit as end:
        print("exit", end.code)
    print(hopper_mxfp4.__file__)
"""


def use(python, folder: Path, code: str = NO_NETWORK + USE) -> str:
    """Run it away from the sources, with an empty cache that holds a hostile pickle."""
    tactics = folder / "tactics"
    tactics.mkdir(mode=0o700)
    (tactics / "tables.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (tactics / "tables.json").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
    } | {"HOPPER_MXFP4_CACHE_DIR": str(folder)}
    out = run(python, "-c", textwrap.dedent(code), cwd=folder, env=environment)
    assert not list(folder.rglob("pwned"))
    return out


def test_no_network_and_no_pickle_at_import_or_run_time(tmp_path) -> None:
    assert use(sys.executable, tmp_path).splitlines()[-1].endswith("__init__.py")


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    ],
)
def test_that_guard_notices(tmp_path, attempt) -> None:
    with pytest.raises(AssertionError, match=r"AssertionError: (network|unpickled)"):
        use(sys.executable, tmp_path, NO_NETWORK + f"    {attempt}\n")


def test_the_sources_do_not_load_code_or_open_connections() -> None:
    """No module of ours imports what unpickles or reaches out, nor calls what loads either."""
    modules = {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "joblib",
        "cloudpickle",
        "socket",
        "http",
        "ftplib",
        "requests",
        "httpx",
        "aiohttp",
    }
    calls = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("urllib", "request")}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            found += [f"{path.name}: imports {n}" for n in names if n.partition(".")[0] in modules]
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in calls
            ):
                found.append(f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("eval", "exec", "__import__")
            ):
                found.append(f"{path.name}:{node.lineno}: {node.func.id}")
    assert len(SOURCES) > 20
    assert not found


ENTRY_POINTS = """
    from importlib.metadata import entry_points

    for group in ("hopper_mxfp4", "vllm.general_plugins", "sglang.srt.plugins"):
        for entry in sorted(entry_points(group=group)):
            print(group, entry.name, entry.value, sep="|")
"""


def in_a_clean_environment(distribution: Path) -> int:
    """Install it with all that it needs, use it away from the sources and without network, and
    compare what is installed with what is here; gives how many packages came.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        python = venv / "bin" / "python"
        run(sys.executable, "-m", "venv", venv)
        torch_version = torch.__version__.partition("+")[0]
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        options = {"cwd": folder, "env": clean}
        run(*pip, "install", distribution, f"torch=={torch_version}", **options)
        assert "No broken requirements" in run(*pip, "check", **options)

        (Path(folder) / "use").mkdir()
        where = Path(use(python, Path(folder) / "use").splitlines()[-1])
        assert where.is_relative_to(venv)
        site = where.parents[1]
        for name, source in sources_of_the_wheel().items():
            assert (site / name).read_bytes() == source.read_bytes(), name
        (licence,) = site.glob("hopper_mxfp4-*.dist-info/licenses/LICENSE")
        assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()

        script = venv / "bin" / "hopper-mxfp4"
        assert run(script, "--version", **options).split()[-1] == hopper_mxfp4.__version__
        help_text = run(script, "--help", **options)
        for command in ("check", "demo", "warmup", "tune", "bench"):
            assert re.search(rf"^ +{command} ", help_text, re.MULTILINE), help_text
        run(python, "-m", "hopper_mxfp4", "bench", "--help", **options)
        found = run(python, "-c", textwrap.dedent(ENTRY_POINTS), **options).splitlines()
        assert found == [
            "hopper_mxfp4|sglang|hopper_mxfp4_sglang.registration",
            "hopper_mxfp4|vllm|hopper_mxfp4_vllm.registration",
            "vllm.general_plugins|hopper_mxfp4|hopper_mxfp4_vllm:register",
            "sglang.srt.plugins|hopper_mxfp4|hopper_mxfp4_sglang:register",
        ]
        return len(run(*pip, "list", "--format", "freeze", **options).splitlines())


def test_the_wheel_in_a_clean_environment(built, record_property) -> None:
    """`pip install dist/*.whl` brings all that it needs; it works away from the sources, without
    network.
    """
    record_property("packages", in_a_clean_environment(next(built[0].glob("*.whl"))))


def test_the_sdist_in_a_clean_environment(built, record_property) -> None:
    """The same of `pip install dist/*.tar.gz`, which fetches what builds it."""
    record_property("packages", in_a_clean_environment(next(built[0].glob("*.tar.gz"))))


def test_the_package_of_the_documentation_is_built_and_found(tmp_path) -> None:
    """docs/extending.md's pyproject.toml and kernel, installed beside this package: every process
    has the kernel then, and it computes what the reference does, by an expert map too.
    """
    page = (ROOT / "docs" / "extending.md").read_text()
    source = tmp_path / "source"
    source.mkdir()
    for name, language in (("pyproject.toml", "toml"), ("my_plugin.py", "python")):
        block = re.search(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        (source / name).write_text(block[1])
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
    site = tmp_path / "site"
    (wheel,) = tmp_path.glob("*.whl")
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    run(sys.executable, *install)
    code = """
        import torch
        from hopper_mxfp4 import *
        from hopper_mxfp4.registry import kernels

        assert list(kernels())[-1] == "loop", list(kernels())
        def layer():
            g = torch.Generator().manual_seed(0)
            def some(low, high, *shape):
                return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)
            return ExpertWeights(some(0, 256, 3, 64, 32), some(0, 256, 3, 64, 16),
                                 some(118, 122, 3, 64, 2), some(118, 122, 3, 64, 1))
        options = {"family": DEEPSEEK_V4, "swiglu": SwiGLU(limit=7.0)}
        call = (torch.randn(5, 64).bfloat16(), torch.randint(0, 3, (5, 2)), torch.rand(5, 2))
        p = prepare_experts(layer(), kernel="auto", **options)
        wanted = reference_moe(*call, layer(), **options)
        y = fused_moe(*call, p)
        assert torch.linalg.norm(y - wanted) <= 4e-3 * torch.linalg.norm(wanted)
        # Of five experts 4, 0 and 2 are this rank's.
        x, ids, weights = call
        expert_map = torch.tensor([1, -1, 2, -1, 0], dtype=torch.int32)
        mapped = fused_moe(x, torch.tensor([4, 0, 2])[ids], weights, p, expert_map=expert_map)
        assert torch.equal(mapped, y)
        elsewhere = torch.tensor([[1, 3]] * 5)
        assert not fused_moe(x, elsewhere, weights, p, expert_map=expert_map).any()
        print(p.kernel.name)
    """
    environment = os.environ | {"PYTHONPATH": str(site), "HOPPER_MXFP4_KERNEL": "loop"}
    assert run(sys.executable, "-c", textwrap.dedent(code), env=environment).split() == ["loop"]
