"""What the flashinfer kernel is handed of a call: int32 ids without repeats, their weights, and x
at its padded size.

FlashInfer 0.7.2 computes a row that names an expert twice wrongly, without a word. A row's repeats
are therefore made one, with the sum of their weights, and ids that are not of this rank's experts
become -1. That is one launch of a kernel of our own (staging.cu), or torch's operators where NVRTC
is missing or the tensors are not on a GPU.
"""

import ctypes
import logging
import struct
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch

from hopper_mxfp4.kernels.jit import driver, nvrtc, sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.scratch import raw_stream

logger = logging.getLogger(__name__)

THREADS = 256
BLOCKS = 132 * 8  # fill an H100; more work is taken in turns
# Writes a call's inputs as FlashInfer wants them, given x [M, H] bf16, H a multiple of 8, topk_ids
# [M, K] int32 or int64, topk_weights [M, K] float32, of any strides, the number of experts, and
# where to. There x gets x and zeros; ids and weights get -1 and 0 for masked ids and for all but
# the first of a row's equal ids, which gets the sum of their weights.
Stage = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, "Staged"], None]
# staging.cu's Args; ctypes' structures take the host four times as long.
_ARGS = struct.Struct("@6P6q7i")


def source() -> Source:
    return sources.read(__package__, "staging.cu")


def compile_kernel() -> bytes:
    """The kernel's cubin, from the cache where it is there. Raises RuntimeError."""
    return nvrtc.compile_cubin(source(), {})


@cache
def load(device_index: int) -> int | None:
    """The kernel on that device; None, said once, where NVRTC can't be used."""
    if reason := nvrtc.problem():
        log_once(
            logger,
            logging.WARNING,
            "flashinfer calls are made ready by a dozen torch operators, which is slower: "
            f"{reason}",
        )
        return None
    return driver.load(compile_kernel(), ("stage",), 0, device_index)[0]


class Staged(NamedTuple):
    """What FlashInfer is handed, contiguous.

    x: bf16 [M, Hp], None where the call's own will do. ids: int32, weights: float32 [M, K].
    addresses: of the three, 0 for None. padded: x's columns / 8.
    """

    x: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    addresses: tuple[int, int, int]
    padded: int


def staged(x: torch.Tensor | None, ids: torch.Tensor, weights: torch.Tensor) -> Staged:
    x_at, padded = (0, 0) if x is None else (x.data_ptr(), x.shape[1] // 8)
    return Staged(x, ids, weights, (x_at, ids.data_ptr(), weights.data_ptr()), padded)


def stager(device: torch.device) -> Stage:
    """How inputs are staged on that device."""
    function = load(device.index) if device.type == "cuda" else None
    return by_torch if function is None else partial(by_launch, function)


def by_launch(
    function: int,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: int,
    to: Staged,
) -> None:
    m, top_k = topk_ids.shape
    x_s0, x_s1 = x.stride()
    x_at = x.data_ptr()
    aligned = x_s1 == 1 and not (x_s0 % 8 or x_at % 16)
    arguments = _ARGS.pack(
        x_at, topk_ids.data_ptr(), topk_weights.data_ptr(), *to.addresses,
        x_s0, x_s1, *topk_ids.stride(), *topk_weights.stride(),
        m, top_k, experts, x.shape[1] // 8, to.padded, aligned, topk_ids.dtype is torch.int64,
    )  # fmt: skip
    blocks = min(-(-m * max(top_k, to.padded) // THREADS), BLOCKS)
    config = _config(raw_stream(x.get_device()), blocks)
    pointer = ctypes.c_char_p(arguments)  # the driver has read it when it has launched
    driver.launch(config, function, ctypes.addressof(pointer))


@lru_cache(maxsize=4096)
def _config(stream: int, blocks: int) -> driver.LaunchConfig:
    # Not early, which would save 0.6 us: before this comes another's kernel, and one that is
    # launched early itself and does not wait would let this start before what writes x has ended.
    return driver.launch_config((blocks, 1), THREADS, 0, stream, early=False)


def by_torch(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, to: Staged
) -> None:
    ids = torch.where((topk_ids >= 0) & (topk_ids < experts), topk_ids, -1)
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(2)
    first = (ids >= 0) & ~same.tril(-1).any(2)
    to.ids.copy_(torch.where(first, ids, -1))
    to.weights.copy_(torch.where(first.unsqueeze(2) & same, topk_weights.unsqueeze(1), 0).sum(2))
    if to.x is not None:
        hidden = x.shape[1]
        to.x[:, :hidden] = x
        to.x[:, hidden:] = 0
