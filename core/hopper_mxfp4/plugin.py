"""What those who write a kernel, a family of checkpoints or an adapter need; docs/extending.md has
an example of each.
"""

from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.checkpoint.swiglu import SwiGLU
from hopper_mxfp4.contract import (
    BLOCK,
    PLAIN,
    WORKSPACE_ALIGNMENT,
    Call,
    Compilation,
    Kernel,
    KernelUnavailable,
    LayerShape,
    Layout,
    PreparedExperts,
    Run,
)
from hopper_mxfp4.hookspecs import hookimpl
from hopper_mxfp4.kernels.select import choose_kernel
from hopper_mxfp4.registry import Adapter

__all__ = [
    "BLOCK",
    "PLAIN",
    "WORKSPACE_ALIGNMENT",
    "Adapter",
    "Call",
    "CheckpointFamily",
    "Compilation",
    "Kernel",
    "KernelUnavailable",
    "LayerShape",
    "Layout",
    "PreparedExperts",
    "Run",
    "SwiGLU",
    "choose_kernel",
    "hookimpl",
]
