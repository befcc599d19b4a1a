"""For those who fill the tensors of `allocate_weights` through a framework's own loader.

Such a loader copies what the checkpoint has and knows nothing of padding: whatever it does not
reach must hold a value that adds nothing. And given a whole tensor from the CPU to copy into a
corner, torch brings all of it to the GPU first, so a loader gets a few experts at a time.
"""

from collections.abc import Iterator

import torch

from hopper_mxfp4 import env
from hopper_mxfp4.arrange import gate_and_up
from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.checkpoint.weights import expert_chunks, round_up
from hopper_mxfp4.contract import ACTIVATIONS, BLOCK, NEUTRAL_SCALE

__all__ = [
    "activations_in_words",
    "activations_to_run",
    "fill_neutral",
    "hidden_beyond",
    "matching_chunks",
    "round_up",
]


def fill_neutral(name: str, tensor: torch.Tensor) -> None:
    """Overwrite one of `ExpertWeights`' tensors, or a part of it, with what adds nothing.

    That is zero for weights and biases, and 1.0 for scales, which are stored as E8M0.

    name: the tensor's field in `ExpertWeights`.
    """
    if name.endswith("scale"):
        tensor.view(torch.uint8).fill_(NEUTRAL_SCALE)  # as a byte, whatever the tensor's dtype
    else:
        tensor.zero_()


def hidden_beyond(name: str, tensor: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """The part of one of `ExpertWeights`' tensors that belongs to hidden columns from hidden_size
    on, as a view; empty where it has none.

    name: the tensor's field in `ExpertWeights`.
    """
    if not name.startswith("w13"):
        return tensor[:, hidden_size:]
    per_byte = {"w13": 2, "w13_scale": BLOCK}.get(name)
    return tensor[:, :0] if per_byte is None else tensor[:, :, hidden_size // per_byte :]


def activations_to_run(asked: str, by_flag: str | None, flag: str, stock: str) -> str:
    """Of ACTIVATIONS, what a server's layer runs with.

    asked: what HOPPER_MXFP4_ACTIVATIONS says, "auto" included. by_flag: what the framework's own
    flag for it asks for, None where it was not given; flag: how users write that one. stock: what
    the framework itself would run. Raises ValueError where variable and flag contradict.
    """
    if asked == "auto":
        return by_flag or stock
    if by_flag not in (None, asked):
        raise ValueError(
            f"{env.ACTIVATIONS.name}={asked} and {flag} ask for different activations; drop one"
        )
    return asked


def activations_in_words(
    runs: str, declared_bits: int, framework: str, stock_runs_declared: bool = False
) -> str:
    """What a server's log says of a layer's activations.

    runs: one of ACTIVATIONS. declared_bits: of those that the checkpoint declares, 16 if none.
    framework: its name. stock_runs_declared: whether its own kernels on Hopper run those.
    """
    told = f"activations are {ACTIVATIONS[runs]}"
    if runs != "bf16":
        of = "none" if declared_bits == 16 else f"{declared_bits}-bit ones"
        return f"{told}; the checkpoint declares {of}"
    if declared_bits == 16:
        return told
    told += f", not the {declared_bits}-bit ones that the checkpoint declares"
    if stock_runs_declared:
        return f"{told} and stock {framework} runs on Hopper"
    return f"{told}; stock {framework} too runs BF16 on Hopper"


def matching_chunks(
    name: str, target: torch.Tensor, source: torch.Tensor, family: CheckpointFamily
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of target and source, a few experts at a time, that belong into each other's corner.

    Where gate and up are halves of w13, its scales or its bias, each half of the target may be
    padded, so the pairs of views are of one half each.

    name: the tensors' field in `ExpertWeights`.
    """
    pairs = [(target, source)]
    if name.startswith("w13") and family.rows == "gate_up":
        halves = (gate_and_up(t, family.rows) for t in (target, source))
        pairs = list(zip(*halves, strict=True))
    for whole_target, whole_source in pairs:
        for experts in expert_chunks(whole_source):
            yield whole_target[experts], whole_source[experts]
