"""MXFP4 mixture-of-experts layers (W4A16) on NVIDIA Hopper, for GPT-OSS and DeepSeek-V4."""

from .experts import (
    PreparedExperts,
    allocate_weights,
    fused_moe,
    prepare_experts,
    reserve_workspace,
    restore_weights,
    workspace_bytes,
)
from .families import DEEPSEEK_V4, GPT_OSS, CheckpointFamily, family_for
from .hookspecs import hookimpl
from .kernels import Call, Kernel, KernelUnavailable
from .kernels.policy import choose_kernel
from .layout import Layout
from .reference import reference_moe
from .swiglu import SwiGLU
from .weights import ExpertWeights, LayerShape
from .workspace import release_workspaces

__version__ = "0.1.0"

__all__ = [
    "DEEPSEEK_V4",
    "GPT_OSS",
    "Call",
    "CheckpointFamily",
    "ExpertWeights",
    "Kernel",
    "KernelUnavailable",
    "LayerShape",
    "Layout",
    "PreparedExperts",
    "SwiGLU",
    "allocate_weights",
    "choose_kernel",
    "family_for",
    "fused_moe",
    "hookimpl",
    "prepare_experts",
    "reference_moe",
    "release_workspaces",
    "reserve_workspace",
    "restore_weights",
    "workspace_bytes",
]
