"""CUDA source files of this package, with the headers that they include."""

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from hopper_mxfp4.kernels import cuda

_INCLUDE = re.compile(r'^#include "(.*)"$', re.MULTILINE)


class Source(NamedTuple):
    """What the compiler reads: a file's text, and those of the headers it includes, also by way of
    other headers, by the names it includes them by. A header stands behind those it includes.
    """

    name: str
    text: str
    headers: dict[str, str]


@cache
def read(package: str, name: str, *bases: str) -> Source:
    """A source file of a package; its headers lie beside it or in `kernels/cuda`.

    bases: packages that it is built on: what it has no file of its own for is theirs.
    """
    folders = (*map(resources.files, (package, *bases)), resources.files(cuda))
    headers: dict[str, str] = {}

    def add_headers(text: str, of: str) -> None:
        for header in _INCLUDE.findall(text):
            if header not in headers:
                found = _find(folders, header, of).read_text()
                add_headers(found, header)
                headers[header] = found

    text = _find(folders, name, package).read_text()
    add_headers(text, name)
    return Source(name, text, headers)


def _find(folders: tuple[Traversable, ...], header: str, of: str) -> Traversable:
    for folder in folders:
        if (folder / header).is_file():
            return folder / header
    raise FileNotFoundError(f"{of} needs {header}, which this package does not have")
