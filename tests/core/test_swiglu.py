"""The activation: its formula by hand, its parameters from configs, and what it refuses."""

import math

import pytest
import torch

from hopper_mxfp4 import SwiGLU


def by_hand(gate: float, up: float, alpha: float, beta: float, limit: float | None) -> float:
    if limit is not None:
        gate = min(gate, limit)
        up = max(-limit, min(up, limit))
    return gate * (1 / (1 + math.exp(-alpha * gate))) * (up + beta)


POINTS = (-30.0, -10.5, -7.0, -1.25, -0.0, 0.0, 0.5, 3.0, 6.875, 7.0, 7.125, 12.0, 30.0)


@pytest.mark.parametrize(
    ("alpha", "beta", "limit"),
    [(1.702, 1.0, 7.0), (1.0, 0.0, 10.0), (1.0, 0.0, None), (0.5, -2.0, 0.25)],
)
def test_formula(alpha, beta, limit) -> None:
    """Every pair of points: below, at and beyond the clamp on either side."""
    gate, up = torch.cartesian_prod(torch.tensor(POINTS), torch.tensor(POINTS)).double().unbind(1)
    before = gate.clone(), up.clone()
    seen = SwiGLU(alpha, beta, limit)(gate, up)
    wanted = [
        by_hand(g, u, alpha, beta, limit) for g, u in zip(gate.tolist(), up.tolist(), strict=True)
    ]
    assert torch.allclose(seen, torch.tensor(wanted, dtype=torch.double), rtol=1e-12, atol=0)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


def test_clamps_come_first() -> None:
    """Numbers by hand: the sigmoid sees the clamped gate, up is clamped before beta is added, and
    gate has no lower clamp.
    """
    act = SwiGLU(alpha=1.0, beta=1.0, limit=2.0)
    gate, up = (
        torch.tensor([100.0, 2.0, -100.0, -3.0]).double(),
        torch.tensor([1.0, 50.0, 1.0, -50.0]).double(),
    )
    sigmoid_2, sigmoid_m3 = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))
    wanted = [
        2 * sigmoid_2 * 2,
        2 * sigmoid_2 * 3,
        -100 / (1 + math.exp(100)) * 2,
        -3 * sigmoid_m3 * (-2 + 1),
    ]
    assert act(gate, up).tolist() == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shape_and_dtype_stay(dtype) -> None:
    gate, up = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = SwiGLU(1.702, 1.0, 7.0)(gate, up)
    assert (result.shape, result.dtype) == ((3, 5), dtype)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_factors(name, value) -> None:
    with pytest.raises(ValueError, match=rf"SwiGLU {name} is {value}; give a finite number"):
        SwiGLU(**{name: value})


@pytest.mark.parametrize("value", [0.0, -7.0, math.nan, math.inf])
def test_bad_limits(value) -> None:
    with pytest.raises(
        ValueError, match=rf"SwiGLU limit is {value}; give a positive number, or None"
    ):
        SwiGLU(limit=value)


def test_defaults_are_silu() -> None:
    x = torch.linspace(-9, 9, 50).double()
    assert torch.allclose(SwiGLU()(x, torch.ones_like(x)), torch.nn.functional.silu(x))
