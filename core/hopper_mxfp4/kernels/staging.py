"""What the flashinfer kernel is handed of a call: int32 ids without repeats, their weights, and x at its padded size.

FlashInfer 0.7.2 computes a row that names an expert twice wrongly, without a word. A row's repeats are therefore
made one, with the sum of their weights, and ids that are not of this rank's experts become -1. That is one launch of
a kernel of our own (staging.cu), or torch's operators where NVRTC is missing or the tensors are not on a GPU.
"""

import ctypes
import logging
import struct
from functools import cache
from importlib import resources

import torch

from ..workspace import raw_stream
from . import nvrtc, say_once

logger = logging.getLogger(__name__)

THREADS = 256
BLOCKS = 132 * 8  # fill an H100; more work is taken in turns
_configs: dict[tuple[int, int], nvrtc.LaunchConfig] = {}  # by stream and blocks

_ARGS = struct.Struct("@6P6q7i")  # staging.cu's Args; ctypes' structures take the host four times as long


def compile_kernel() -> bytes:
    """The kernel's cubin, from the cache where it is there. Raises RuntimeError."""
    return nvrtc.compile_cubin((resources.files(__package__) / "staging.cu").read_text(), "staging.cu", {})


@cache
def load(device_index: int) -> int | None:
    """The kernel on that device; None, said once, where NVRTC can't be used."""
    if reason := nvrtc.problem():
        say_once(logger, logging.WARNING, f"flashinfer calls are made ready by a dozen torch operators, which is slower: {reason}")
        return None
    cubin = compile_kernel()
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # torch makes the context when it first needs it
        return nvrtc.load(cubin, ("stage",), 0)[0]


def stage(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: int,
    x_to: torch.Tensor | None,
    ids_to: torch.Tensor,
    weights_to: torch.Tensor,
) -> None:
    """Write a call's inputs as FlashInfer wants them.

    x [M, H] bf16, H a multiple of 8; topk_ids [M, K] int32 or int64; topk_weights [M, K] float32; any strides.
    x_to: bf16 [M, Hp] contiguous, gets x and zeros; None: x is fine where it is. ids_to int32 and
    weights_to float32 [M, K], contiguous: -1 and 0 for holes and for all but the first of a row's equal ids, which gets
    the sum of their weights.
    """
    function = load(x.device.index) if x.is_cuda else None
    if function is None:
        _by_torch(x, topk_ids, topk_weights, experts, x_to, ids_to, weights_to)
    else:
        _by_launch(function, x, topk_ids, topk_weights, experts, x_to, ids_to, weights_to)


def _by_launch(
    function: int,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: int,
    x_to: torch.Tensor | None,
    ids_to: torch.Tensor,
    weights_to: torch.Tensor,
) -> None:
    m, top_k = topk_ids.shape
    x_s0, x_s1 = x.stride()
    x_at = x.data_ptr()
    padded, x_to_at = (0, 0) if x_to is None else (x_to.shape[1] // 8, x_to.data_ptr())
    arguments = _ARGS.pack(
        x_at, topk_ids.data_ptr(), topk_weights.data_ptr(), x_to_at, ids_to.data_ptr(), weights_to.data_ptr(),
        x_s0, x_s1, *topk_ids.stride(), *topk_weights.stride(),
        m, top_k, experts, x.shape[1] // 8, padded, x_s1 == 1 and not (x_s0 % 8 or x_at % 16), topk_ids.dtype is torch.int64,
    )  # fmt: skip
    blocks = min(-(-m * max(top_k, padded) // THREADS), BLOCKS)
    key = (raw_stream(x.device.index), blocks)
    config = _configs.get(key)
    if config is None:
        if len(_configs) >= 4096:
            _configs.clear()
        config = _configs[key] = nvrtc.launch_config((blocks, 1), THREADS, 0, key[0], early=False)
    pointer = ctypes.c_char_p(arguments)  # to the one argument; the driver has read it when it has launched
    nvrtc.launch(config, function, ctypes.addressof(pointer))


def _by_torch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: int,
    x_to: torch.Tensor | None,
    ids_to: torch.Tensor,
    weights_to: torch.Tensor,
) -> None:
    ids = torch.where((topk_ids >= 0) & (topk_ids < experts), topk_ids, -1)
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(2)
    first = (ids >= 0) & ~same.tril(-1).any(2)
    ids_to.copy_(torch.where(first, ids, -1))
    weights_to.copy_(torch.where(first.unsqueeze(2) & same, topk_weights.unsqueeze(1), 0).sum(2))
    if x_to is not None:
        hidden = x.shape[1]
        x_to[:, :hidden] = x
        x_to[:, hidden:] = 0
