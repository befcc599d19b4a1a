"""Every environment variable is declared in env.py and described in docs/configuration.md."""

import re
from pathlib import Path

import pytest

from hopper_mxfp4.env import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
NAME = r"HOPPER_MXFP4(?:_[A-Z0-9]+)*"


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_variable_is_described(variable) -> None:
    """It has a heading with its name, and under it its default and every choice."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    _, *found = re.split(rf"^#+ .*?({NAME})\b.*$", page, flags=re.MULTILINE)
    sections = dict(zip(found[::2], found[1::2], strict=True))
    assert variable.name in sections, "no heading of docs/configuration.md names it"
    for word in (variable.default, *(variable.choices or ())):
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sections[variable.name]), (
            f"its section does not mention {word!r}"
        )


def test_nothing_else_is_described() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert set(re.findall(NAME, page)) == {variable.name for variable in VARIABLES}


def test_every_variable_in_the_sources_is_declared() -> None:
    """Any name of ours in core/ or adapters/, read or only mentioned, is one that env.py declares."""
    declared = {variable.name for variable in VARIABLES}
    sources = [
        path for folder in ("core", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = {name: path for path in sources for name in re.findall(NAME, path.read_text())}
    assert found.keys() >= declared, "the pattern finds less than there is"
    unknown = {
        name: str(path.relative_to(ROOT)) for name, path in found.items() if name not in declared
    }
    assert not unknown


def test_variables_are_well_formed() -> None:
    for variable in VARIABLES:
        assert re.fullmatch(NAME, variable.name)
        assert variable.help
        assert variable.choices is None or variable.default in variable.choices
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)
