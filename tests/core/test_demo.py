"""What of the demo needs no engine."""

import torch

from hopper_mxfp4 import GPT_OSS, SwiGLU, fused_moe, observe, prepare_experts
from hopper_mxfp4.cli import demo
from random_layers import random_weights


def test_calls_are_counted_from_now_on(monkeypatch) -> None:
    """Of layers too that were prepared, and ran, before."""
    monkeypatch.setattr(observe, "watchers", ())  # puts it back
    monkeypatch.setattr(demo, "CALLS", {})
    p = prepare_experts(
        random_weights(GPT_OSS, 2, 64, 32), family=GPT_OSS, swiglu=SwiGLU(), kernel="reference"
    )
    call = torch.ones(3, 64).bfloat16(), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    fused_moe(*call, p)
    demo.count_calls()
    demo.count_calls()  # once is enough
    assert demo.CALLS == {}
    for _ in range(2):
        fused_moe(*call, p)
    fused_moe(*(t[:1] for t in call), p)
    assert demo.CALLS == {"reference": 3}
