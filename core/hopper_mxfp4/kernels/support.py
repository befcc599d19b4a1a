"""What kernels have in common: caches, calls in chunks, lines that are logged once."""

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, TypeVar

import torch

from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import WORKSPACE_ALIGNMENT, Call, PreparedExperts, Run

PAIRS = "2P6iI0P"  # Pairs of routing.cuh, as struct's formats have it
Key = TypeVar("Key")
Value = TypeVar("Value")


def hopper_problem(device: torch.device) -> str | None:
    """Why a kernel of ours, compiled for SM90, can't run on the device; None where it can."""
    if device.type != "cuda":
        return f"it runs on a GPU, and the weights are on {device}"
    if not torch.cuda.is_available():
        return "torch sees no GPU; install a CUDA build of torch, or a driver"
    if torch.version.hip:
        return "it needs an NVIDIA Hopper GPU, and this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and it is written for 9.0 (Hopper)"
        )
    return None


def chunked(make: Callable[[int], Run], num_tokens: int, most: int) -> Run:
    """A runner of calls of num_tokens tokens that runs at most `most` of them at a time.

    The parts share the workspace, one after the other. make(n): the runner of n tokens.
    """
    if num_tokens <= most:  # the common case slices nothing
        return make(num_tokens)
    whole, last = make(most), make(num_tokens % most or most)

    def run(call: Call, p: PreparedExperts) -> None:
        for start in range(0, num_tokens, most):
            (whole if start + most <= num_tokens else last)(
                call.part(slice(start, start + most)), p
            )

    return run


def in_launches(
    launch: Callable[..., None],
    compiled_for: Callable[[int], Any],
    num_tokens: int,
    top_k: int,
    most: int,
) -> Run:
    """A runner that launches at most so many tokens together.

    launch(compiled, tokens, top_k, call, p). compiled_for(tokens): what such a launch runs.
    """
    return chunked(
        lambda tokens: partial(launch, compiled_for(tokens), tokens, top_k), num_tokens, most
    )


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where parts of so many bytes begin in a workspace, each aligned, and where the last ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + round_up(size, WORKSPACE_ALIGNMENT))
    return found


def tokens_at_once(kernel: str, max_top_k: int, max_pairs: int, tokens: int, top_k: int) -> int:
    """How many of a call's tokens a kernel launches together, with at most so many pairs (tokens x
    top-k). Raises ValueError for too large a top-k.
    """
    if top_k > max_top_k:
        raise ValueError(
            f"topk_ids has {top_k} columns; the {kernel} kernel takes at most {max_top_k}, so use "
            "kernel='flashinfer'"
        )
    return min(tokens, max_pairs // top_k)


def packed_pairs(call: Call, num_experts: int, top_k_reciprocal: int) -> tuple[int, ...]:
    """A call's PAIRS. top_k_reciprocal: the source divides by top-k with it."""
    ids, expert_map = call.topk_ids, call.expert_map
    tokens, top_k = ids.shape
    map_at, num_ids = 0, num_experts
    if expert_map is not None:
        map_at, num_ids = expert_map.data_ptr(), len(expert_map)
    return (
        ids.data_ptr(),
        map_at,
        tokens * top_k,
        top_k,
        ids.dtype is torch.int64,
        *ids.stride(),
        num_ids,
        top_k_reciprocal,
    )


def tokens_of(p: PreparedExperts, pairs_per_expert: float, top_k: int) -> int:
    """Up to how many tokens an expert has so many of their pairs (tokens x top-k), on average.

    With expert parallelism a rank is given all ranks' tokens, and masked ids for most pairs.
    """
    return int(pairs_per_expert * p.shape.num_experts * p.ep_size / top_k)


def cached(
    p: PreparedExperts, name: str, top_k: int, make: Callable[[PreparedExperts, int], Any]
) -> Any:
    """make(p, top_k), called once for a layer and top-k and kept in `p.plans` under that name."""
    found = p.plans.get((name, top_k))
    if found is None:
        found = p.plans[name, top_k] = make(p, top_k)
    return found


def bounded_put(kept: dict[Key, Value], key: Key, made: Value, most: int) -> Value:
    """Keep a value under its key, and return it; a dictionary that is full is emptied first."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = made
    return made


@cache
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a line once a process, not once a layer."""
    logger.log(level, message)
