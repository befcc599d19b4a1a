"""The truth: the fused MoE in float32 on dequantised weights, written for clarity."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from hopper_mxfp4.arrange import gate_and_up
from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.checkpoint.swiglu import SwiGLU
from hopper_mxfp4.checkpoint.weights import ExpertWeights, check_weights, scale_bytes
from hopper_mxfp4.contract import ACTIVATIONS, BLOCK

# OCP Microscaling Formats v1.0, section 5.3.3: e2m1 magnitudes; codes 8 to 15 are their negatives.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_ROWS = 8192  # token rows an expert takes at a time, which bounds the float32 intermediates


class Expert(NamedTuple):
    """One expert in float32: gate and up [I, H], down [H, I], biases [I], [I], [H] or None."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [256, 2]: the two values of a weight byte; float32 [256]: the value of a scale
    byte.
    """
    pairs = [(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)]
    powers = [2.0 ** (byte - 127) for byte in range(255)] + [float("nan")]
    # frameworks change torch's default dtype while they build a model
    return torch.tensor(pairs, dtype=torch.float32, device=device), torch.tensor(
        powers, dtype=torch.float32, device=device
    )


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e2m1 bytes [.., K/2] with E8M0 bytes [.., K/32], both uint8, to float32 [.., K].

    Exact, except where the product leaves float32's range: from 2 up at scale 2**127, 4 and 6 at
    2**126.
    """
    pairs, powers = _tables(weight.device)
    values = torch.nn.functional.embedding(weight.int(), pairs).flatten(-2)
    return (values.view(*scale.shape, BLOCK) * powers[scale.int()].unsqueeze(-1)).flatten(-2)


def dequantize_expert(w: ExpertWeights, e: int, family: CheckpointFamily) -> Expert:
    """Expert e of checked weights, at its true sizes."""
    s, one = w.shape, slice(e, e + 1)
    h, i = s.hidden_size, s.intermediate_size
    gate, up = gate_and_up(
        dequantize(w.w13[one].view(torch.uint8), scale_bytes(w.w13_scale[one])), family.rows
    )
    down = dequantize(w.w2[e].view(torch.uint8), scale_bytes(w.w2_scale[e]))
    gate_bias = up_bias = down_bias = None
    if w.w13_bias is not None and w.w2_bias is not None:
        gate_bias, up_bias = (
            half[0, :i] for half in gate_and_up(w.w13_bias[one].float(), family.rows)
        )
        down_bias = w.w2_bias[e, :h].float()
    return Expert(gate[0, :i, :h], up[0, :i, :h], down[:h, :i], gate_bias, up_bias, down_bias)


# What "fp8" activations are. A token's values are quantised in groups of QUANTISED along K (the
# last group of a row may be shorter): the group's largest magnitude over that of e4m3 is its scale,
# in float32, and the values over the scale are rounded to e4m3, to nearest even. So is fc1's result
# after SwiGLU, before fc2. Weights stay as they are, sums are float32. That is what vLLM 0.33 runs
# for DeepSeek-V4 on Hopper: its checkpoints declare MXFP8 activations (groups of 32, E8M0 scales),
# and there vLLM runs them in groups of 128 (kFp8Dynamic128Sym in fused_moe/oracle/mxfp4.py).
QUANTISED = 128
_PER_GREATEST_E4M3 = 1 / 448  # multiplied by, as vLLM does: where ties fall depends on it
_LEAST_MAGNITUDE = 1e-30  # a group of zeros has a scale too


def quantise(x: torch.Tensor) -> torch.Tensor:
    """float32 [rows, K] as fp8 activations hold it, in float32 again. A group with NaN or infinity
    becomes NaN where those are, at least.
    """
    rows, k = x.shape
    groups = torch.nn.functional.pad(x, (0, -k % QUANTISED)).view(rows, -1, QUANTISED)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=_LEAST_MAGNITUDE) * _PER_GREATEST_E4M3
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view(rows, -1)[:, :k]


def reference_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w: ExpertWeights,
    *,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    activations: str = "bf16",
) -> torch.Tensor:
    """The layer's output in float32, from the checkpoint's own tensors.

    x [M, H] of any float dtype; topk_ids [M, K] integers, local: ids < 0 or >= E add nothing;
    topk_weights [M, K] of any float dtype. Returns float32 [M, H]. Works on any device, one expert
    at a time; synchronises with the host.
    activations: with "bf16" nothing is rounded below float32 on the way. With "fp8" x, and fc1's
    result after SwiGLU, are quantised to e4m3 for each token and group of 128 columns.

    Raises ValueError where the weights are not as `ExpertWeights` says, or an argument is not as
    above.
    """
    w = check_weights(w, family)
    _check_call(x, topk_ids, topk_weights, w)
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations is {activations!r}; give {' or '.join(map(repr, ACTIVATIONS))}"
        )
    return sum_experts(
        x,
        topk_ids,
        topk_weights,
        w.shape.num_experts,
        lambda e: dequantize_expert(w, e, family),
        swiglu,
        activations,
    )


def _check_call(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, w: ExpertWeights
) -> None:
    integers = not (
        topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool
    )
    hidden, tokens = w.shape.hidden_size, list(x.shape[:1])
    for name, t, good, wanted in (
        (
            "x",
            x,
            x.is_floating_point() and x.dim() == 2 and x.shape[1] == hidden,
            f"floats [tokens, {hidden}]",
        ),
        (
            "topk_ids",
            topk_ids,
            integers and topk_ids.dim() == 2 and list(topk_ids.shape[:1]) == tokens,
            f"integers {[*tokens, 'top_k']}",
        ),
        (
            "topk_weights",
            topk_weights,
            topk_weights.is_floating_point() and topk_weights.shape == topk_ids.shape,
            "floats like topk_ids",
        ),
    ):
        if not good or t.device != w.w13.device:
            raise ValueError(
                f"{name} is {t.dtype} {list(t.shape)} on {t.device}; give {wanted} on "
                f"{w.w13.device}"
            )


def sum_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert: Callable[[int], Expert],
    swiglu: SwiGLU,
    activations: str,
) -> torch.Tensor:
    """Each token's weighted sum over its experts, float32 [M, H]; ``expert(e)`` is asked only for
    those in use.
    """
    y = torch.zeros_like(x, dtype=torch.float32)
    held = quantise if activations == "fp8" else torch.Tensor.float
    with _full_float32():
        for e in range(num_experts):
            tokens, slots = (topk_ids == e).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            w = expert(e)
            for token, slot in zip(
                torch.split(tokens, _ROWS), torch.split(slots, _ROWS), strict=True
            ):
                xe = held(x[token].float())
                gate, up = _linear(xe, w.gate, w.gate_bias), _linear(xe, w.up, w.up_bias)
                down = _linear(held(swiglu(gate, up)), w.down, w.down_bias)
                y.index_add_(0, token, down * topk_weights[token, slot, None].float())
            del w  # before the next one is dequantised
    return y


_linear = torch.nn.functional.linear


@contextmanager
def _full_float32() -> Iterator[None]:
    """Frameworks may have allowed TF32 or BF16 in float32 products for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
