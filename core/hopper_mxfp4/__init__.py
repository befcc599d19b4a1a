"""MXFP4 mixture-of-experts layers (W4A16) on NVIDIA Hopper, for GPT-OSS and DeepSeek-V4."""

from hopper_mxfp4.arrange import restore_in_place, restore_weights
from hopper_mxfp4.batched import batched_moe
from hopper_mxfp4.checkpoint.families import DEEPSEEK_V4, GENERIC, GPT_OSS, CheckpointFamily
from hopper_mxfp4.checkpoint.swiglu import SwiGLU
from hopper_mxfp4.checkpoint.weights import ExpertWeights
from hopper_mxfp4.contract import KernelUnavailable, LayerShape, PreparedExperts
from hopper_mxfp4.kernels.reference.moe import reference_moe
from hopper_mxfp4.prepare import allocate_weights, prepare_experts
from hopper_mxfp4.registry import family_for
from hopper_mxfp4.run import fused_moe, reserve_workspace, workspace_bytes
from hopper_mxfp4.scratch import release_workspaces

__version__ = "0.2.0"

__all__ = [
    "DEEPSEEK_V4",
    "GENERIC",
    "GPT_OSS",
    "CheckpointFamily",
    "ExpertWeights",
    "KernelUnavailable",
    "LayerShape",
    "PreparedExperts",
    "SwiGLU",
    "allocate_weights",
    "batched_moe",
    "family_for",
    "fused_moe",
    "prepare_experts",
    "reference_moe",
    "release_workspaces",
    "reserve_workspace",
    "restore_in_place",
    "restore_weights",
    "workspace_bytes",
]
