"""What a plugin can add: three hooks, each called once with a function that registers one thing.

    from hopper_mxfp4.plugin import hookimpl

    @hookimpl
    def register_kernels(register):
        register(MyKernel())

A package offers its module or object under the entry point group ``hopper_mxfp4``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hopper_mxfp4.checkpoint.families import CheckpointFamily
    from hopper_mxfp4.contract import Kernel
    from hopper_mxfp4.registry import Adapter

ENTRY_POINT_GROUP = "hopper_mxfp4"
hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookspec
def register_families(register: "Callable[[CheckpointFamily], None]") -> None:
    """Add checkpoint families."""


@hookspec
def register_kernels(register: "Callable[[Kernel], None]") -> None:
    """Add kernels."""


@hookspec
def register_adapters(register: "Callable[[Adapter], None]") -> None:
    """Add framework adapters, which `hopper-mxfp4 check` then examines."""
