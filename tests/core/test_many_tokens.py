"""More tokens than run at a time: the same result, in parts, with scratch for one part."""

import pytest
import torch

from hopper_mxfp4 import DEEPSEEK_V4, SwiGLU, fused_moe, prepare_experts, workspace_bytes
from hopper_mxfp4.run import MAX_TOKENS
from random_layers import random_weights
from sm90 import Plugin, Sm90Kernel, watched


class Counting(Sm90Kernel):
    """Keeps how many tokens each run had; wants 8 bytes a token."""

    def __init__(self) -> None:
        super().__init__("folded")
        self.name, self.runs = "counting", []

    def workspace_bytes(self, p, num_tokens, top_k) -> int:
        return 8 * num_tokens

    def make_runner(self, p, num_tokens, top_k):
        def see(call) -> None:
            assert call.topk_ids.shape == (num_tokens, top_k)
            self.runs.append((num_tokens, call.workspace.numel() >= 8 * num_tokens))

        return watched(super().make_runner(p, num_tokens, top_k), see)


@pytest.mark.parametrize("m", [MAX_TOKENS, MAX_TOKENS + 1, 65_536])
def test_parts(m, registered, record_property) -> None:
    kernel = Counting()
    w = random_weights(DEEPSEEK_V4, 2, 32, 32)
    with registered(Plugin(kernel)):
        p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="counting")
    g = torch.Generator().manual_seed(m)
    x, ids = torch.randn(m, 32, generator=g).bfloat16(), torch.randint(-1, 2, (m, 2), generator=g)
    weights = torch.rand(2, m, generator=g).t()  # strided
    out = torch.full((m, 32), float("nan"), dtype=torch.bfloat16)
    assert fused_moe(x, ids, weights, p, out=out) is out
    parts = [min(MAX_TOKENS, m - start) for start in range(0, m, MAX_TOKENS)]
    assert kernel.runs == [(part, True) for part in parts]
    assert workspace_bytes(p, m, 2) == workspace_bytes(p, MAX_TOKENS, 2) == 8 * MAX_TOKENS
    for start in range(0, m, MAX_TOKENS):
        rows = slice(start, start + MAX_TOKENS)
        assert torch.equal(out[rows], fused_moe(x[rows], ids[rows], weights[rows], p))
    record_property("tokens", m)
