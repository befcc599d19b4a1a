"""What a plugin can add: three hooks, each called once with a function that registers one thing.

    from hopper_mxfp4 import hookimpl

    @hookimpl
    def register_kernels(register):
        register(MyKernel())

A package offers its module or object under the entry point group ``hopper_mxfp4``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .families import CheckpointFamily
    from .kernels import Kernel
    from .plugins import Adapter

GROUP = "hopper_mxfp4"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_families(register: "Callable[[CheckpointFamily], None]") -> None:
    """Add checkpoint families."""


@hookspec
def register_kernels(register: "Callable[[Kernel], None]") -> None:
    """Add kernels."""


@hookspec
def register_adapters(register: "Callable[[Adapter], None]") -> None:
    """Add framework adapters, which `hopper-mxfp4 check` then examines."""
