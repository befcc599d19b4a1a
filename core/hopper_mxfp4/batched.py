"""Calls whose tokens come sorted by expert already, as all-to-all kernels for decoding hand them
over: a place for each token that an expert might get, and how many came.

A slot is a token of one expert, so that the kernels run as ever: slot s of expert e is a token with
the id e, or a masked one where s is not below e's count. How many came is known on the device alone
and never asked for.
"""

from typing import Any, NamedTuple

import torch

from hopper_mxfp4.contract import PreparedExperts
from hopper_mxfp4.kernels.support import bounded_put
from hopper_mxfp4.run import describe, fused_moe
from hopper_mxfp4.scratch import raw_stream

_COUNTS = (torch.int32, torch.int64)


def batched_moe(
    x: torch.Tensor,
    counts: torch.Tensor,
    p: PreparedExperts,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's output for the tokens in its own slots, neither weighted nor summed.

    x [E, S, H] bf16, contiguous, never written: expert e's tokens are x[e, :counts[e]], and what
    lies behind them is not looked at. counts [E] int32 or int64, on x's device; one above S counts
    as S. S may be 0.
    out: [E, S, H] bf16 contiguous, to write the result into; must share no memory with x. Returned
        if given. Slots behind an expert's tokens are zeros.
    workspace: as for `fused_moe`, of at least ``workspace_bytes(p, E * S, 1)``.

    No host synchronisation and safe under CUDA graphs, except with the reference kernel.

    Raises ValueError, naming the argument, what it is and what was wanted.
    """
    experts, hidden, device = p.shape.num_experts, p.shape.hidden_size, p.w13.device
    shape = x.shape
    if not (
        len(shape) == 3
        and shape[0] == experts
        and shape[2] == hidden
        and x.dtype is torch.bfloat16
        and x.is_contiguous()
        and x.device == device
    ):
        raise ValueError(
            f"x is {describe(x)}; give contiguous bfloat16 [{experts}, slots, {hidden}] on {device}"
        )
    if not (counts.shape == shape[:1] and counts.dtype in _COUNTS and counts.device == device):
        raise ValueError(
            f"counts is {describe(counts)}; give int32 or int64 [{experts}] on {device}"
        )
    if out is not None and not (out.shape == shape and out.is_contiguous()):
        raise ValueError(
            f"out is {describe(out)}; give contiguous bfloat16 {list(shape)} on {device}"
        )
    slot, expert, masked, one = _constants(device, experts, shape[1])
    ids = torch.where(slot < counts.unsqueeze(1), expert, masked)
    tokens = experts * shape[1]
    y = fused_moe(
        x.view(tokens, hidden),
        ids.view(tokens, 1),
        one.expand(tokens, 1),
        p,
        out=None if out is None else out.view(tokens, hidden),
        workspace=workspace,
    )
    return y.view(shape) if out is None else out


class _Constants(NamedTuple):
    """slot int32 [S], expert int32 [E, 1], masked int32 [1], one float32 [1, 1]."""

    slot: torch.Tensor
    expert: torch.Tensor
    masked: torch.Tensor
    one: torch.Tensor


_kept: dict[Any, _Constants] = {}  # by device, stream and sizes
_MOST_KEPT = 64


def _constants(device: torch.device, experts: int, slots: int) -> _Constants:
    """Made once: launching two kernels a call instead of six is worth a microsecond each.

    On each stream its own, which is then known to have written them. Those made while a CUDA graph
    is captured lie in that graph's memory and hold something only once it runs: they are not kept.
    """
    key = (device, _stream(device), experts, slots)
    found = _kept.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):
        made = _Constants(
            torch.arange(slots, dtype=torch.int32, device=device),
            torch.arange(experts, dtype=torch.int32, device=device).unsqueeze(1),
            torch.full((1,), -1, dtype=torch.int32, device=device),
            torch.ones(1, 1, dtype=torch.float32, device=device),
        )
    return made if _capturing(device) else bounded_put(_kept, key, made, _MOST_KEPT)


def _stream(device: torch.device) -> Any:
    return raw_stream(device.index) if device.type == "cuda" else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
