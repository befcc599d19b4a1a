"""What a layer should give: float32 or float64, weights as they are, nothing rounded on the way."""

import torch

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def dequantize(w: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    table = torch.tensor(E2M1, dtype=dtype, device=w.device)
    values = table[torch.stack((w & 15, w >> 4), -1).flatten(-2).long()]
    return values * torch.exp2(s.to(dtype) - 127).repeat_interleave(32, -1)


def layer(weights: dict, x, ids, topw, swiglu, dtype=torch.float32) -> torch.Tensor:
    """weights: w13, s13, b13, w2, s2, b2 as WideLayer takes them."""
    alpha, beta, limit = swiglu
    experts = len(weights["w13"])
    out = torch.zeros(len(x), weights["w2"].shape[1], dtype=dtype, device=x.device)
    xs = x.to(dtype)
    for e in range(experts):
        token, k = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        y = xs[token] @ dequantize(weights["w13"][e], weights["s13"][e], dtype).T
        if weights["b13"] is not None:
            y += weights["b13"][e].to(dtype)
        gate, up = y.chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = gate * torch.sigmoid(alpha * gate) * (up + beta)
        y = h @ dequantize(weights["w2"][e], weights["s2"][e], dtype).T
        if weights["b2"] is not None:
            y += weights["b2"][e].to(dtype)
        # A token may have an expert twice: added one after the other.
        out.index_put_((token,), y * topw[token, k, None].to(dtype), accumulate=True)
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
