"""What is timed on a GPU: CUDA graphs that do not disturb each other."""

import torch

from hopper_mxfp4.bench.timing import round_of, warming_up
from layers import CUDA


def test_graphs_share_no_memory():
    """One kernel's state, made while its graph is captured, stays whole however often another's
    graph runs.

    So it was with vLLM's Marlin: its locks lay in memory that graphs captured before had used and
    freed, and were garbage once one of these ran again.
    """
    size, states, seen = 1 << 20, {}, torch.zeros(1, dtype=torch.int64, device=CUDA)

    def with_scratch():
        return torch.full((size,), 7, dtype=torch.int64, device=CUDA) + 1

    def with_state():
        stream = torch.cuda.current_stream(CUDA)
        if stream not in states:
            states[stream] = torch.zeros(size, dtype=torch.int64, device=CUDA)
        seen.copy_(states[stream].sum())

    scratch = round_of([with_scratch], CUDA)
    makes_state, uses_state = round_of([with_state], CUDA), round_of([with_state], CUDA)
    makes_state()
    for _ in range(3):
        scratch()
        uses_state()
        assert not seen.item()


def test_what_is_made_once_a_stream_is_made_before_a_capture():
    captured = {}

    def with_state():
        stream = torch.cuda.current_stream(CUDA)
        captured.setdefault(stream, torch.cuda.is_current_stream_capturing())

    with warming_up(CUDA):
        with_state()
    round_of([with_state], CUDA)
    assert list(captured.values()) == [False]
