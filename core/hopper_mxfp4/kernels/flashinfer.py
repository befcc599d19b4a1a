"""The `flashinfer` kernel: FlashInfer's CUTLASS grouped GEMMs for BF16 x MXFP4 on SM90."""

import logging
import os
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch

from .. import compat
from ..layout import UNPACK_SM90_SCALE, Layout, unpack_sm90_weight
from ..weights import GROUP, LayerShape, round_up
from . import WORKSPACE_ALIGNMENT, KernelUnavailable

if TYPE_CHECKING:
    from ..experts import PreparedExperts

logger = logging.getLogger(__name__)

MULTIPLE = 128  # a scale block of the kernel covers 128 values of K, and hidden and intermediate sizes are K once each


class FlashInferKernel:
    """Calls `flashinfer.fused_moe.cutlass_fused_moe(use_w4_group_scaling=True)` with local experts and whole shards."""

    name = "flashinfer"
    auto_devices = frozenset({"cuda"})

    def why_not(self, shape: LayerShape, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs a Hopper GPU, and the weights are on {device}; move them to cuda"
        if torch.version.hip:
            return "it needs an NVIDIA Hopper GPU, and this torch is built for ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            return f"it needs compute capability 9.0 (Hopper), and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        return compat.flashinfer_problem() or _import_problem()

    def layout(self, device: torch.device) -> Layout:
        return _layout(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))

    def workspace_bytes(self, p: "PreparedExperts", num_tokens: int, top_k: int) -> int:
        h, i = p.w2.shape[1], p.w13.shape[1] // 2
        staging = 2 * _staging_bytes(num_tokens, h)  # padded input and padded output
        return staging + _flashinfer_bytes(num_tokens, h, i, p.shape.num_experts, top_k, not p.deterministic, p.w13.device)

    def run(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        p: "PreparedExperts",
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        m, h = x.shape
        padded = p.w2.shape[1]
        staging = _staging_bytes(m, padded)
        used = 2 * m * padded

        def stage(index: int) -> torch.Tensor:
            return workspace[index * staging : index * staging + used].view(torch.bfloat16).view(m, padded)

        source, target = x, out
        if padded != h:
            target = stage(1)
            source = torch.cat((x, p.tail.expand(m, -1)), dim=1, out=stage(0))
        elif not x.is_contiguous():
            source = stage(0).copy_(x)
        compat.flashinfer_moe().cutlass_fused_moe(
            input=source,
            token_selected_experts=topk_ids.to(torch.int32).contiguous(),
            token_final_scales=topk_weights.contiguous(),
            fc1_expert_weights=p.w13,
            fc2_expert_weights=p.w2,
            output_dtype=torch.bfloat16,
            quant_scales=[p.w13_scale, p.w2_scale],
            fc1_expert_biases=p.w13_bias,
            fc2_expert_biases=p.w2_bias,
            swiglu_alpha=p.alpha,
            swiglu_beta=p.beta,
            swiglu_limit=p.limit,
            # Local ids and this rank's shard: FlashInfer needs no word of the other ranks. A tp_rank
            # other than 0 would drop the second bias, which the loaders already zero there.
            tp_size=1,
            tp_rank=0,
            ep_size=1,
            ep_rank=0,
            output=target,
            use_w4_group_scaling=True,
            use_fused_finalize=not p.deterministic,
            workspace_buffer=workspace[2 * staging :],
        )
        if target is not out:
            out.copy_(target[:, :h])


def _staging_bytes(num_tokens: int, hidden_size: int) -> int:
    return round_up(2 * num_tokens * hidden_size, WORKSPACE_ALIGNMENT)


@cache
def _import_problem() -> str | None:
    # FlashInfer's kernels trace every launch unless told otherwise; read once, when its module loads.
    os.environ.setdefault("TLLM_LOG_LEVEL", "INFO")
    try:
        moe = compat.flashinfer_moe()
    except Exception as error:  # a broken install can raise anything, and any of it is the reason
        return f"importing FlashInfer failed ({type(error).__name__}: {error}); {compat.INSTALL} anew"
    names = ("cutlass_fused_moe", "interleave_moe_weights_for_sm90_mixed_gemm", "interleave_moe_scales_for_sm90_mixed_gemm")
    missing = [name for name in names if not hasattr(moe, name)]
    if missing:
        return f"FlashInfer lacks {', '.join(missing)}; {compat.INSTALL}"
    if compat.scale_layout(moe.interleave_moe_scales_for_sm90_mixed_gemm) is None:
        return f"FlashInfer {compat.flashinfer_version()} lays scales out in a way this release does not know; {compat.INSTALL}"
    return None


@cache
def _layout(device: torch.device) -> Layout:
    """The layout of the installed FlashInfer, checked against its own helpers on this device."""
    if compat.compiled_module() is None:
        logger.warning(
            "FlashInfer has no compiled SM90 MoE module and builds one now, which can take an hour; flashinfer-jit-cache has it ready"
        )
    moe = compat.flashinfer_moe()
    scales = compat.scale_layout(moe.interleave_moe_scales_for_sm90_mixed_gemm)
    assert scales is not None  # why_not has seen to it
    layout = Layout(
        name=f"flashinfer-sm90-{scales}",
        multiple=MULTIPLE,
        pack_weight=lambda w: moe.interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4"),
        pack_scale=lambda s: moe.interleave_moe_scales_for_sm90_mixed_gemm(s, group_size=GROUP),
        unpack_weight=unpack_sm90_weight,
        unpack_scale=UNPACK_SM90_SCALE[scales],
    )
    probe = torch.arange(2 * 64 * 64, device=device).mul(40503).bitwise_right_shift(7).to(torch.uint8).view(2, 64, 64)
    if not torch.equal(layout.unpack_weight(layout.pack_weight(probe)), probe):
        version = compat.flashinfer_version()
        raise KernelUnavailable(f"FlashInfer {version} lays weights out in a way this release does not know; {compat.INSTALL}")
    return layout


@lru_cache(maxsize=4096)
def _flashinfer_bytes(m: int, h: int, i: int, experts: int, top_k: int, fused: bool, device: torch.device) -> int:
    return compat.flashinfer_moe().cutlass_fused_moe_workspace_size(
        m,
        h,
        i,
        experts,
        top_k,
        x_dtype=torch.bfloat16,
        weight_dtype=torch.uint8,
        use_w4_group_scaling=True,
        use_fused_finalize=fused,
        device=device,
    )
