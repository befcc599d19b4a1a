"""`fused_moe` and `reference_moe` with arguments of any shape, dtype, stride, device and value: a
right result or a documented error.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense import Dense, row_ulps
from hopper_mxfp4 import SwiGLU, fused_moe, prepare_experts, reference_moe
from random_layers import FAMILIES, clone, random_weights

pytestmark = pytest.mark.usefixtures("sm90_kernels", "one_thread")

CASES = 13_000
SWIGLUS = (SwiGLU(1.702, 1.0, 7.0), SwiGLU(1.0, 0.0, 10.0), SwiGLU())
SIZES = ((1, 32, 32), (3, 64, 32), (4, 32, 96), (5, 96, 64))
KERNELS = ("reference", "reference", "reference", "sm90-folded")


RESHAPED = ("one row more", "one column more", "flat", "rank 3", "swapped", "no columns")


def kinds(good: tuple[torch.dtype, ...], bad: tuple[torch.dtype, ...]) -> st.SearchStrategy:
    """(shape, dtype, device) of an argument: mostly good, else one of them is not."""
    spoilt = (
        [(shape, good[0], "cpu") for shape in RESHAPED]
        + [("right", dtype, "cpu") for dtype in bad]
        + [("right", good[0], "meta")]
    )
    return st.sampled_from(
        [("right", dtype, "cpu") for dtype in good] * (5 * len(spoilt) // len(good)) + spoilt
    )


def stored(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values stored another way; "repeated" keeps the first row's alone."""
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        larger = torch.zeros([n + 3 for n in t.shape], dtype=t.dtype, device=t.device)
        return larger[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)
    if how == "stepped":
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "repeated" and len(t):
        return t[:1].expand(t.shape)
    return t


STORED = st.sampled_from(
    ("contiguous", "contiguous", "transposed", "sliced", "stepped", "repeated")
)


def reshaped(shape: tuple[int, int], how: str) -> tuple[int, ...]:
    m, n = shape
    shapes = {
        "one row more": (m + 1, n),
        "one column more": (m, n + 1),
        "flat": (m * n,),
        "rank 3": (1, m, n),
        "swapped": (n, m),
    }
    return (m, 0) if how == "no columns" else shapes.get(how, shape)


WORKSPACES = [torch.empty(n, dtype=torch.uint8) for n in (0, 100)] + [
    torch.empty(10),
    torch.empty(2, 2, dtype=torch.uint8),
]
CALL = {
    "layer": st.integers(0, 10**6),
    "m": st.integers(0, 9),
    "top_k": st.integers(1, 8),
    "seed": st.integers(0, 2**31),
    "x": kinds(
        (torch.bfloat16,),
        (torch.float32, torch.float16, torch.float64, torch.int8, torch.complex64, torch.bool),
    ),
    "x_values": st.sampled_from(
        ("random", "random", "random", "zeros", "tiny", "huge", "a row of nan", "an inf")
    ),
    "x_stored": STORED,
    "ids": kinds((torch.int32, torch.int64), (torch.int16, torch.uint8, torch.float32, torch.bool)),
    "ids_values": st.sampled_from(
        ("in range", "in range", "masked ids too", "one expert", "nothing but masked ids")
    ),
    "ids_stored": STORED,
    "weights": kinds(
        (torch.float32,), (torch.float64, torch.bfloat16, torch.int32, torch.complex64)
    ),
    "weights_stored": STORED,
    "out": st.sampled_from(
        ("none",) * 12
        + ("right",) * 8
        + ("short", "float32", "strided", "meta", "x itself", "over x", "beside x")
    ),
    "workspace": st.sampled_from([None] * 30 + WORKSPACES),
}


@pytest.fixture(scope="module")
def layers(sm90_kernels):
    """(prepared, the checkpoint's weights, float64 oracle, family, swiglu), of every kind."""
    made = []
    for n, (kernel, size) in enumerate((k, s) for k in KERNELS for s in SIZES):
        family, swiglu = FAMILIES[n % 2], SWIGLUS[n % 3]
        w = random_weights(family, *size, scales=(120, 124), seed=n)
        made.append(
            (
                prepare_experts(clone(w), family=family, swiglu=swiglu, kernel=kernel),
                w,
                Dense(w, family, swiglu),
                family,
                swiglu,
            )
        )
    return made


def as_kind(t: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    return t.to(dtype).to(device)


def tensors(c: dict, experts: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(c["seed"])
    (x_shape, *x_kind), (ids_shape, *ids_kind), (weights_shape, *weights_kind) = (
        c["x"],
        c["ids"],
        c["weights"],
    )
    x = torch.randn(reshaped((c["m"], hidden), x_shape), generator=g)
    scale = {"zeros": 0.0, "tiny": 2.0**-130, "huge": 2.0**15}.get(c["x_values"], 1.0)
    x = as_kind(x * scale, *x_kind)
    if c["x_values"] in ("a row of nan", "an inf") and x.is_floating_point() and x.numel():
        last = x[-1] if c["x_values"] == "a row of nan" else x[-1].flatten()[:1]
        last.fill_(float("nan" if last.numel() > 1 else "inf"))
    low, high = {
        "masked ids too": (-2, experts + 2),
        "one expert": (experts - 1, experts),
        "nothing but masked ids": (-9, 0),
    }.get(c["ids_values"], (0, experts))
    ids = torch.randint(low, high, reshaped((c["m"], c["top_k"]), ids_shape), generator=g)
    if c["ids_values"] == "masked ids too" and ids.numel():
        ids.flatten()[0] = (-(2**31), 2**31 - 1)[c["seed"] % 2]
    weights = torch.rand(reshaped((c["m"], c["top_k"]), weights_shape), generator=g)
    return (
        stored(x, c["x_stored"]),
        stored(as_kind(ids, *ids_kind), c["ids_stored"]),
        stored(as_kind(weights, *weights_kind), c["weights_stored"]),
    )


def out_tensor(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x, out): x moved where it has to lie beside out."""
    if kind in ("over x", "beside x"):
        both = torch.zeros(2, x.numel() + 1, dtype=x.dtype, device=x.device)
        moved = both[0, : x.numel()].view(x.shape).copy_(x)
        return moved, (both[0, 1:] if kind == "over x" else both[1, 1:]).view(x.shape)
    makers = {
        "none": lambda: None,
        "right": lambda: torch.full(x.shape, float("nan"), dtype=torch.bfloat16),
        "short": lambda: torch.empty(x.shape[0] + 1, *x.shape[1:], dtype=torch.bfloat16),
        "float32": lambda: torch.empty(x.shape),
        "strided": lambda: torch.empty(*x.shape, 2, dtype=torch.bfloat16)[..., 0],
        "meta": lambda: torch.empty(x.shape, dtype=torch.bfloat16, device="meta"),
        "x itself": lambda: x,
    }
    return x, makers[kind]()


def good_call(x, ids, weights, hidden: int) -> bool:
    """What both functions' docstrings ask of shapes and devices."""
    cpu = all(t.device.type == "cpu" for t in (x, ids, weights))
    return (
        cpu
        and x.dim() == 2
        and x.shape[1] == hidden
        and ids.dim() == 2
        and len(ids) == len(x)
        and weights.shape == ids.shape
    )


def bits_of(t: torch.Tensor) -> bytes:
    return (
        t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()
    )


def assert_right(y: torch.Tensor, x, ids, weights, dense: Dense) -> None:
    """Within 4 bf16 ulps of the row's scale; rows of NaN or Inf only where x has them and an expert
    asked.
    """
    y, x = y.double(), x.to(torch.float64)
    broken = ~x.isfinite().all(1)
    assert row_ulps(y[~broken], dense(x[~broken], ids[~broken], weights[~broken])).le(4).all()
    masked = ((ids.long() < 0) | (ids.long() >= len(dense.gate))).all(1)
    assert not y[masked].any()
    assert not y[broken & ~masked & x.isnan().all(1) & weights.ne(0).all(1)].isfinite().any()


def outcome(call, *more: str):
    """(result, None) or (None, the message); any other error, or a message that does not name the
    argument, fails the test.
    """
    try:
        return call(), None
    except ValueError as error:
        refused = str(error)
    assert refused.split()[0] in ("x", "topk_ids", "topk_weights", *more), refused
    assert "; give " in refused
    return None, refused


def fuzz(check, cases: int, tell, each: float = 0.25) -> None:
    """Run check(case) -> outcome that many times; at least a share of each are right results and
    refusals.
    """
    outcomes = Counter()

    @given(st.fixed_dictionaries(CALL))
    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(case) -> None:
        outcomes[check(case)] += 1

    run()
    total = tell(outcomes)
    assert total >= cases
    assert min(outcomes["right result"], outcomes["documented error"]) > each * total


def test_fused_moe(layers, tell) -> None:
    def check(c) -> str:
        p, _, dense, _, _ = layers[c["layer"] % len(layers)]
        hidden = p.shape.hidden_size
        x, ids, weights = tensors(c, p.shape.num_experts, hidden)
        x, out = out_tensor(c["out"], x)
        good = good_call(x, ids, weights, hidden)
        good &= (x.dtype, weights.dtype) == (torch.bfloat16, torch.float32) and ids.dtype in (
            torch.int32,
            torch.int64,
        )
        good &= out is None or (out.shape, out.dtype, out.device.type) == (
            x.shape,
            torch.bfloat16,
            "cpu",
        )
        good &= out is None or out.is_contiguous()
        good &= c["out"] not in ("x itself", "over x") or len(x) == 0
        space = c["workspace"]
        # not looked at where there is nothing to do
        good &= space is None or (space.dtype == torch.uint8 and space.dim() == 1) or 0 in ids.shape
        before = [bits_of(t) if t.device.type == "cpu" else b"" for t in (x, ids, weights)]
        y, refused = outcome(
            lambda: fused_moe(x, ids, weights, p, out=out, workspace=space), "out", "workspace"
        )
        assert before == [bits_of(t) if t.device.type == "cpu" else b"" for t in (x, ids, weights)]
        assert good == (refused is None), refused
        if refused:
            return "documented error"
        assert out is None or y is out
        assert (y.shape, y.dtype) == (x.shape, torch.bfloat16)
        assert_right(y, x, ids, weights, dense)
        return "right result"

    fuzz(check, CASES, tell)


def test_reference_moe(layers, tell) -> None:
    """x of any float dtype, ids of any integer one, and weights of any real one."""

    def check(c) -> str:
        p, w, dense, family, swiglu = layers[c["layer"] % len(layers)]
        x, ids, weights = tensors(c, p.shape.num_experts, p.shape.hidden_size)
        good = good_call(x, ids, weights, p.shape.hidden_size) and x.is_floating_point()
        good &= (
            not (ids.is_floating_point() or ids.dtype == torch.bool) and weights.is_floating_point()
        )
        y, refused = outcome(
            lambda: reference_moe(x, ids, weights, w, family=family, swiglu=swiglu)
        )
        assert good == (refused is None), refused
        if refused:
            return "documented error"
        assert (y.shape, y.dtype) == (x.shape, torch.float32)
        assert_right(y, x, ids, weights, dense)
        return "right result"

    fuzz(check, CASES // 4, tell, each=0.15)
