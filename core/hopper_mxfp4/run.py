"""Run a prepared layer's calls, in scratch memory of the core's or the caller's."""

from typing import NoReturn

import torch

from hopper_mxfp4 import observe
from hopper_mxfp4.contract import WORKSPACE_ALIGNMENT, Call, LaunchPlan, PreparedExperts, Run
from hopper_mxfp4.kernels.support import bounded_put, chunked
from hopper_mxfp4.scratch import current_device, device_guard
from hopper_mxfp4.scratch import workspace as own_workspace

_IDS = (torch.int32, torch.int64)
# At a time: bounds scratch memory, and keeps tokens * top-k * columns within a kernel's 32-bit
# offsets.
MAX_TOKENS = 1 << 14


def workspace_bytes(p: PreparedExperts, num_tokens: int, top_k: int) -> int:
    """Bytes of scratch that `fused_moe` needs for up to num_tokens tokens of top_k experts."""
    if not num_tokens:
        return 0
    plan = p.launch_plans.get((num_tokens, top_k))
    return (
        p.kernel.workspace_bytes(p, min(num_tokens, MAX_TOKENS), top_k)
        if plan is None
        else plan.workspace_bytes
    )


def reserve_workspace(p: PreparedExperts, num_tokens: int, top_k: int) -> int:
    """Make the core's own scratch large enough for calls of up to num_tokens tokens now; returns
    the bytes they need.

    For the calling thread and the current stream of p's device, where all layers share it. Without
    it the scratch grows with the largest call so far.
    """
    needed = workspace_bytes(p, num_tokens, top_k)
    own_workspace(p.w13.device, needed)
    return needed


def fused_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    p: PreparedExperts,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output: each token's experts, weighted and summed.

    x [M, H] bf16, any strides, never written; topk_ids [M, K] int32 or int64, local expert ids:
    those < 0 or >= E add nothing, and a row of them alone gives zeros, an expert that a row names
    twice adds twice; topk_weights [M, K] float32, with any routed scaling factor already in them. M
    may be 0; beyond 16,384 tokens run in parts of so many.
    out: [M, H] bf16 contiguous, to write the result into; must share no memory with x. Returned if
        given.
    workspace: uint8 [at least `workspace_bytes`] on x's device, for callers that manage their own
    scratch, on a GPU aligned to 256 bytes; calls on different streams must not share one. None: the
    core's own, which all layers share (a buffer a stream and thread; within a CUDA graph, the
    graph's memory pool).
    expert_map: int32 [global experts], contiguous, fewer than 2^31: topk_ids are then global, and
        this has the local expert of each, with -1 (or anything else that is < 0 or >= E) for those
        of other ranks. Ids < 0 or >= its length add nothing. A CUDA graph holds its address: what
        changes, such as where experts lie, is written into it in place.

    No host synchronisation and safe under CUDA graphs, except with the reference kernel.

    Raises ValueError, naming the argument, what it is and what was wanted.
    """
    shape, chosen, device = x.shape, topk_ids.shape, p.w13.device
    # One expression for the common case: a call must cost the host little. What is wrong is found
    # out afterwards.
    if not (
        len(shape) == 2
        and shape[1] == p.shape.hidden_size
        and x.dtype is torch.bfloat16
        and len(chosen) == 2
        and chosen[0] == shape[0]
        and topk_ids.dtype in _IDS
        and topk_weights.shape == chosen
        and topk_weights.dtype is torch.float32
        and x.device == topk_ids.device == topk_weights.device == device
    ):
        _refuse(x, topk_ids, topk_weights, p)
    if expert_map is not None and not (
        expert_map.dtype is torch.int32
        and expert_map.dim() == 1
        and expert_map.device == device
        and expert_map.is_contiguous()
        and expert_map.numel()
    ):
        raise ValueError(
            f"expert_map is {describe(expert_map)}; give contiguous int32 [global experts], at "
            f"least one, on {device}"
        )
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    elif not (
        out.shape == shape
        and out.dtype is torch.bfloat16
        and out.device == device
        and out.is_contiguous()
    ):
        raise ValueError(
            f"out is {describe(out)}; give contiguous bfloat16 {list(shape)} on {device}"
        )
    elif shape[0] and _overlap(x, out):
        raise ValueError("out shares memory with x, which is never written; give another tensor")
    plan = p.launch_plans.get(chosen)
    if plan is None:
        if 0 in chosen:  # no tokens, or no experts for any
            return out.zero_()
        with device_guard(device):
            plan = _make_launch_plan(p, *chosen)
    needed, run = plan
    if workspace is None:
        workspace = own_workspace(device, needed)
    else:
        sized = workspace.dim() == 1 and workspace.is_contiguous() and workspace.numel() >= needed
        if not sized or workspace.dtype != torch.uint8 or workspace.device != device:
            raise ValueError(
                f"workspace is {describe(workspace)}; give contiguous 1-D uint8 of at least "
                f"{needed} bytes on {device}"
            )
        if workspace.is_cuda and workspace.data_ptr() % WORKSPACE_ALIGNMENT:
            raise ValueError(
                f"workspace begins at address {workspace.data_ptr():#x}; give one aligned to "
                f"{WORKSPACE_ALIGNMENT} bytes"
            )
    call = Call(x, topk_ids, topk_weights, out, workspace, expert_map)
    for watcher in observe.watchers:
        watcher(p, call)
    # To ask is cheaper than to enter a context.
    if device.type != "cuda" or device.index == current_device():
        run(call, p)
    else:
        with device_guard(device):
            run(call, p)
    return out


_MAX_LAUNCH_PLANS = 1024  # a layer remembers before it starts anew


def _make_launch_plan(p: PreparedExperts, num_tokens: int, top_k: int) -> LaunchPlan:
    run = chunked(lambda tokens: p.kernel.make_runner(p, tokens, top_k), num_tokens, MAX_TOKENS)
    if not getattr(p.kernel, "takes_expert_map", False):
        run = _given_local_ids(run)
    return bounded_put(
        p.launch_plans,
        (num_tokens, top_k),
        LaunchPlan(workspace_bytes(p, num_tokens, top_k), run),
        _MAX_LAUNCH_PLANS,
    )


def _given_local_ids(run: Run) -> Run:
    """For kernels that take no expert_map: the ids that it stands for, in four of torch's
    kernels.
    """

    def run_with_local_ids(call: Call, p: PreparedExperts) -> None:
        if call.expert_map is not None:
            call = call._replace(
                topk_ids=_local_ids(call.topk_ids, call.expert_map), expert_map=None
            )
        run(call, p)

    return run_with_local_ids


def _local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """int32, of the same shape."""
    within = topk_ids.clamp(0, expert_map.numel() - 1)
    return torch.where(within == topk_ids, expert_map[within], -1)


def _refuse(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, p: PreparedExperts
) -> NoReturn:
    """Say what is wrong with a call's inputs."""
    device = p.w13.device
    if (
        x.dim() != 2
        or x.shape[1] != p.shape.hidden_size
        or x.dtype != torch.bfloat16
        or x.device != device
    ):
        raise ValueError(
            f"x is {describe(x)}; give bfloat16 [tokens, {p.shape.hidden_size}] on {device}"
        )
    m = x.shape[0]
    if (
        topk_ids.dim() != 2
        or topk_ids.shape[0] != m
        or topk_ids.dtype not in _IDS
        or topk_ids.device != device
    ):
        raise ValueError(
            f"topk_ids is {describe(topk_ids)}; give int32 or int64 [{m}, top_k] on {device}"
        )
    raise ValueError(
        f"topk_weights is {describe(topk_weights)}; give float32 {list(topk_ids.shape)} on {device}"
    )


def _overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether x's elements lie within the memory that a contiguous out covers."""
    if x.is_contiguous():
        return abs(x.data_ptr() - out.data_ptr()) < out.nbytes  # of the same shape and dtype
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    x_begin, out_begin = x.data_ptr(), out.data_ptr()
    return x_begin < out_begin + out.nbytes and out_begin < x_begin + (last + 1) * x.element_size()


def describe(t: torch.Tensor) -> str:
    strides = "" if t.is_contiguous() else f" with strides {list(t.stride())}"
    return f"{t.dtype} {list(t.shape)}{strides} on {t.device}".replace("torch.", "")
