"""The core's own scratch memory: a buffer for each device, stream and thread.

All layers share it, and it grows to the largest call so far.
A captured CUDA graph never uses it: while a stream is captured, scratch comes from the graph's own
memory pool, which lives as long as the graph. So growing frees nothing that a graph will read, and
replaying a graph beside eager calls is safe. Streams have buffers of their own because their work
overlaps, threads because their launches on one stream interleave.
"""

import logging
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

logger = logging.getLogger(__name__)


class _Buffers(threading.local):
    def __init__(self) -> None:  # once a thread
        self.by_stream: dict[Any, torch.Tensor] = {}


_buffers = _Buffers()
# torch.cuda.current_stream makes a Stream object, ten times as slow; torch's own compiler calls
# this one too.
raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)

# Without torch's check whether CUDA is initialised, which costs more than the question.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: some launches go there, wherever their arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def workspace(device: torch.device, nbytes: int) -> torch.Tensor:
    """uint8 [at least nbytes], of any content, for the calling thread's current stream."""
    key = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        key = (device.index, raw_stream(device.index))
    found = _buffers.by_stream.get(key)
    if found is not None and found.numel() >= nbytes:
        return found
    # Steps of an eighth, so that slowly growing batches do not mean a new buffer each.
    step = max(1 << 16, 1 << max(nbytes.bit_length() - 4, 0))
    # Freed before the larger one is asked for: the allocator hands a stream's memory on in that
    # stream's order.
    _buffers.by_stream.pop(key, None)
    del found
    with torch.inference_mode(False):  # or calls outside of inference mode could not write to it
        grown = torch.empty(-(-nbytes // step) * step, dtype=torch.uint8, device=device)
    # Kernels keep their views of the buffer on it, so that these go when it goes.
    grown.views = {}  # type: ignore[attr-defined]
    _buffers.by_stream[key] = grown
    if nbytes:
        logger.info(
            "scratch memory on %s: %.1f MiB, shared by all layers", device, grown.numel() / 2**20
        )
    return grown


def release_workspaces() -> None:
    """Give the calling thread's buffers back to torch's allocator; the next call makes new ones."""
    _buffers.by_stream.clear()
