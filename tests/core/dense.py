"""A layer's output in float64, every expert for every token, from what the bytes mean by
definition; and bf16 ulps.
"""

import torch

from hopper_mxfp4 import CheckpointFamily, ExpertWeights, SwiGLU
from random_layers import dequantize


class Dense:
    """A layer's weights as float64 matrices: gate, up [E, I, H], down [E, H, I], biases [E, I], [E,
    I], [E, H].
    """

    def __init__(self, w: ExpertWeights, family: CheckpointFamily, swiglu: SwiGLU) -> None:
        both, self.down = (
            dequantize(w.w13, w.w13_scale).double(),
            dequantize(w.w2, w.w2_scale).double(),
        )
        e, rows, _ = both.shape
        biases = torch.zeros(e, rows).double() if w.w13_bias is None else w.w13_bias.double()
        self.down_bias = (
            torch.zeros(e, self.down.shape[1]).double() if w.w2_bias is None else w.w2_bias.double()
        )
        halves = (
            (slice(0, None, 2), slice(1, None, 2))
            if family.rows == "interleaved"
            else (slice(rows // 2), slice(rows // 2, None))
        )
        self.gate, self.up = (both[:, half] for half in halves)
        self.gate_bias, self.up_bias = (biases[:, half] for half in halves)
        self.swiglu = swiglu

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64 [M, H]; ids outside of the layer add nothing, whatever their weights."""
        x, ids, s = x.double(), ids.long(), self.swiglu
        gate = torch.einsum("mh,eih->mei", x, self.gate) + self.gate_bias
        up = torch.einsum("mh,eih->mei", x, self.up) + self.up_bias
        if s.limit is not None:
            gate, up = gate.clamp(max=s.limit), up.clamp(-s.limit, s.limit)
        each = (
            torch.einsum(
                "mei,ehi->meh", gate / (1 + torch.exp(-s.alpha * gate)) * (up + s.beta), self.down
            )
            + self.down_bias
        )
        here = (ids >= 0) & (ids < len(self.gate))
        share = torch.where(here, weights.double(), 0.0)
        chosen = each.gather(
            1, ids.clamp(0, len(self.gate) - 1)[:, :, None].expand(-1, -1, each.shape[2])
        )
        return (chosen * share[:, :, None]).sum(1)


def row_ulps(y: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Each row's worst error in bf16 ulps of the largest magnitude of the row wanted, at least
    float32's smallest normal.
    """
    largest = wanted.abs().amax(1).clamp_min(2.0**-126).double()
    ulp = torch.exp2(torch.floor(torch.log2(largest)) - 7)  # bfloat16 keeps 8 bits
    return (y.double() - wanted.double()).abs().amax(1) / ulp
