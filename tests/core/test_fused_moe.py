"""`fused_moe`'s contract, on weights in the plain layout and in the SM90 one; both compute with the
reference's maths.
"""

import copy
from dataclasses import replace

import pytest
import torch

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    SwiGLU,
    fused_moe,
    observe,
    prepare_experts,
    reference_moe,
    workspace_bytes,
)
from hopper_mxfp4.plugin import hookimpl
from random_layers import FAMILIES, FAMILY_IDS, clone, random_weights
from sm90 import Plugin, Sm90Kernel, watched

pytestmark = pytest.mark.usefixtures("sm90_kernels")

EXPERTS, HIDDEN, INTERMEDIATE = 6, 160, 96  # neither size is a multiple of the SM90 kernel's 128
SWIGLU = SwiGLU(1.702, 1.0, 7.0)
NAN = float("nan")


@pytest.fixture(scope="module", params=["reference", "sm90-folded", "sm90-by_k"])
def kernel(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILY_IDS)
def layer(request, kernel, sm90_kernels):
    """(the checkpoint's weights, the same prepared, the family)"""
    w = random_weights(request.param, EXPERTS, HIDDEN, INTERMEDIATE)
    return (
        w,
        prepare_experts(clone(w), family=request.param, swiglu=SWIGLU, kernel=kernel),
        request.param,
    )


@pytest.fixture(scope="module")
def prepared():
    """One layer for what does not depend on the weights."""
    return prepare_experts(
        random_weights(DEEPSEEK_V4, EXPERTS, HIDDEN, INTERMEDIATE),
        family=DEEPSEEK_V4,
        swiglu=SWIGLU,
        kernel="reference",
    )


def batch(
    tokens: int, top_k: int, seed: int = 0, low: int = 0, high: int = EXPERTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids from low to high - 1 with duplicates in a row, weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(low, high, (tokens, top_k), generator=generator)
    return x, ids, torch.rand(tokens, top_k, generator=generator)


def wanted(layer, x, ids, weights) -> torch.Tensor:
    """reference_moe, which has no kernel, no layout and no padding, rounded once."""
    w, _, family = layer
    return reference_moe(x, ids, weights, w, family=family, swiglu=SWIGLU).bfloat16()


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(layer, top_k, id_dtype) -> None:
    """Duplicates in a row, which top-k 7 and 8 of 6 experts cannot do without, count once each."""
    x, ids, weights = batch(23, top_k, seed=top_k)
    y = fused_moe(x, ids.to(id_dtype), weights, layer[1])
    assert (y.shape, y.dtype, y.is_contiguous()) == ((23, HIDDEN), torch.bfloat16, True)
    assert y.isfinite().all()
    assert y.abs().min(dim=1).values.max() > 0
    assert torch.equal(y, wanted(layer, x, ids, weights))


def test_duplicates_add_up(layer) -> None:
    x, _, _ = batch(3, 1)
    twice = fused_moe(x, torch.tensor([[2, 2]] * 3), torch.tensor([[0.25, 0.5]] * 3), layer[1])
    once = fused_moe(x, torch.tensor([[2]] * 3), torch.full((3, 1), 0.75), layer[1])
    assert torch.allclose(twice.float(), once.float(), rtol=1e-2)


@pytest.mark.parametrize("masked", [-1, -(2**31), EXPERTS, EXPERTS + 1, 2**31 - 1])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
def test_holes(layer, masked, id_dtype) -> None:
    """Masked ids add nothing, their weights are not looked at; a row of them is zeros, not NaN."""
    x, ids, weights = batch(12, 4)
    ids[::2, 1], weights[::2, 1] = masked, NAN
    ids[5], weights[5] = masked, NAN
    y = fused_moe(x, ids.to(id_dtype), weights, layer[1])
    assert torch.equal(y[5], torch.zeros(HIDDEN, dtype=torch.bfloat16))
    assert y.isfinite().all()
    for row in (0, 1):
        kept = ids[row] != masked
        alone = fused_moe(
            x[row : row + 1], ids[row : row + 1, kept], weights[row : row + 1, kept], layer[1]
        )
        assert torch.allclose(
            y[row].float(), alone[0].float(), rtol=1e-2, atol=1e-3 * y.abs().max().item()
        )


def test_nothing_but_masked_ids(layer) -> None:
    """Even where x itself is NaN: no expert asked for it."""
    x = torch.full((4, HIDDEN), NAN, dtype=torch.bfloat16)
    y = fused_moe(x, torch.full((4, 3), -1), torch.full((4, 3), NAN), layer[1])
    assert torch.equal(y, torch.zeros(4, HIDDEN, dtype=torch.bfloat16))


def test_top_k_of_none(layer) -> None:
    """A token without any expert is a row of masked ids."""
    x, ids, weights = batch(4, 1)
    assert torch.equal(
        fused_moe(x, ids[:, :0], weights[:, :0], layer[1]),
        torch.zeros(4, HIDDEN, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("with_out", [False, True])
def test_no_tokens(layer, with_out) -> None:
    out = torch.empty(0, HIDDEN, dtype=torch.bfloat16) if with_out else None
    y = fused_moe(*batch(0, 4), layer[1], out=out)
    assert (y.shape, y.dtype) == ((0, HIDDEN), torch.bfloat16)
    assert out is None or y is out
    assert workspace_bytes(layer[1], 0, 4) == 0


@pytest.mark.parametrize("which", ["x", "ids", "weights", "all"])
def test_any_strides(layer, which) -> None:
    x, ids, weights = batch(9, 4)
    y = fused_moe(x, ids, weights, layer[1])
    assert y.any()
    if which in ("x", "all"):
        x = torch.cat((x, x), dim=1)[:, :HIDDEN]  # as a slice of a fused projection
    if which in ("ids", "all"):
        ids = ids.t().contiguous().t()
    if which in ("weights", "all"):
        weights = weights.repeat_interleave(2, dim=1)[:, ::2]
    assert not all(t.is_contiguous() for t in (x, ids, weights))
    assert torch.equal(fused_moe(x, ids, weights, layer[1]), y)


def test_arguments_are_only_read(layer) -> None:
    _, p, _ = layer
    call = batch(9, 4, low=-1, high=EXPERTS + 1)
    tensors = (*call, p.w13, p.w2, p.w13_scale, p.w2_scale)
    before = copy.deepcopy(tensors)
    fused_moe(*call, p)
    for seen, was in zip(tensors, before, strict=True):
        assert torch.equal(seen, was)


def test_out_is_filled_and_returned(layer) -> None:
    """Every element is written, whatever was there, rows of masked ids too."""
    x, ids, weights = batch(9, 2)
    ids[4] = -1
    out = torch.full((9, HIDDEN), NAN, dtype=torch.bfloat16)
    assert fused_moe(x, ids, weights, layer[1], out=out) is out
    assert torch.equal(out, wanted(layer, x, ids, weights))


def test_nan_stays_in_its_row(layer) -> None:
    """A broken token must not reach the others of its batch, nor through the experts they share."""
    x, ids, weights = batch(16, 4)
    y = fused_moe(x, ids, weights, layer[1])
    x[7] = NAN
    broken = fused_moe(x, ids, weights, layer[1])
    assert broken[7].isnan().all()
    others = torch.arange(16) != 7
    assert torch.equal(broken[others], y[others])


def test_a_row_does_not_depend_on_the_batch(layer) -> None:
    x, ids, weights = batch(32, 4)
    y = fused_moe(x, ids, weights, layer[1]).float()
    for rows in (slice(0, 1), slice(5, 12)):
        part = fused_moe(x[rows], ids[rows], weights[rows], layer[1]).float()
        assert torch.allclose(part, y[rows], rtol=1e-2, atol=1e-3 * y.abs().max().item())


X, IDS, WEIGHTS = batch(5, 2)
BAD_CALLS = {
    "x flat": ({"x": X[0]}, "x is bfloat16 [160] on cpu; give bfloat16 [tokens, 160]"),
    "x of rank 3": (
        {"x": X[None]},
        "x is bfloat16 [1, 5, 160] on cpu; give bfloat16 [tokens, 160]",
    ),
    "x narrow": (
        {"x": X[:, :128]},
        "x is bfloat16 [5, 128] with strides [160, 1] on cpu; give bfloat16 [tokens, 160]",
    ),
    "x padded": (
        {"x": torch.cat((X, X), 1)},
        "x is bfloat16 [5, 320] on cpu; give bfloat16 [tokens, 160]",
    ),
    "x half": ({"x": X.half()}, "x is float16 [5, 160] on cpu; give bfloat16"),
    "x elsewhere": (
        {"x": X.to("meta")},
        "x is bfloat16 [5, 160] on meta; give bfloat16 [tokens, 160] on cpu",
    ),
    "ids flat": (
        {"topk_ids": IDS[:, 0]},
        "topk_ids is int64 [5] with strides [2] on cpu; give int32 or int64 [5, top_k]",
    ),
    "ids short": (
        {"topk_ids": IDS[:4]},
        "topk_ids is int64 [4, 2] on cpu; give int32 or int64 [5, top_k]",
    ),
    "ids float": (
        {"topk_ids": IDS.float()},
        "topk_ids is float32 [5, 2] on cpu; give int32 or int64",
    ),
    "ids int16": (
        {"topk_ids": IDS.short()},
        "topk_ids is int16 [5, 2] on cpu; give int32 or int64",
    ),
    "ids elsewhere": (
        {"topk_ids": IDS.to("meta")},
        "topk_ids is int64 [5, 2] on meta; give int32 or int64 [5, top_k] on cpu",
    ),
    "weights flat": (
        {"topk_weights": WEIGHTS.flatten()},
        "topk_weights is float32 [10] on cpu; give float32 [5, 2]",
    ),
    "weights wide": (
        {"topk_weights": torch.rand(5, 3)},
        "topk_weights is float32 [5, 3] on cpu; give float32 [5, 2]",
    ),
    "weights bf16": (
        {"topk_weights": WEIGHTS.bfloat16()},
        "topk_weights is bfloat16 [5, 2] on cpu; give float32 [5, 2]",
    ),
    "weights elsewhere": (
        {"topk_weights": WEIGHTS.to("meta")},
        "topk_weights is float32 [5, 2] on meta; give float32 [5, 2] on cpu",
    ),
    "out short": (
        {"out": torch.empty_like(X[:4])},
        "out is bfloat16 [4, 160] on cpu; give contiguous bfloat16 [5, 160]",
    ),
    "out float": (
        {"out": torch.empty_like(X).float()},
        "out is float32 [5, 160] on cpu; give contiguous bfloat16 [5, 160]",
    ),
    "out strided": (
        {"out": torch.empty(160, 5, dtype=torch.bfloat16).t()},
        "out is bfloat16 [5, 160] with strides [1, 5] on cpu; give contiguous bfloat16 [5, 160]",
    ),
    "out elsewhere": (
        {"out": torch.empty_like(X, device="meta")},
        "out is bfloat16 [5, 160] on meta; give contiguous bfloat16",
    ),
    "out is x": (
        {"out": X},
        "out shares memory with x, which is never written; give another tensor",
    ),
}


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_arguments(case, prepared) -> None:
    """The message names the argument, what it is and what is wanted; an out given is not
    touched.
    """
    changes, message = BAD_CALLS[case]
    before = X.clone()
    with pytest.raises(ValueError, match=r"; give ") as caught:
        fused_moe(**({"x": X, "topk_ids": IDS, "topk_weights": WEIGHTS, "p": prepared} | changes))
    assert message in str(caught.value)
    assert torch.equal(X, before)


# ---- Expert parallelism: global ids and a map ---------------------------------------------------


def mapped_by_hand(ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """Local ids, one by one."""
    values = expert_map.tolist()
    return torch.tensor(
        [[values[e] if 0 <= e < len(values) else -1 for e in row] for row in ids.tolist()]
    )


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [3, EXPERTS, 40])
def test_an_expert_map(layer, experts, id_dtype) -> None:
    """Of fewer, as many and more global experts than local ones: in any order, with holes, with
    experts that two ids share, with values of no local expert; and ids that it does not have.
    """
    x, ids, weights = batch(23, 4, low=-2, high=experts + 2)
    ids[:3, 0] = torch.tensor([-(2**31), 2**31 - 1, experts])
    ids, g = ids.to(id_dtype), torch.Generator().manual_seed(experts)
    if id_dtype is torch.int64:
        ids[3, 0], ids[4, 0] = 2**32, -(2**32)  # not 0
    expert_map = torch.randint(-2, EXPERTS + 2, (experts,), generator=g, dtype=torch.int32)
    expert_map[0] = 2**31 - 1
    local = mapped_by_hand(ids, expert_map)
    assert ((local >= 0) & (local < EXPERTS)).any()
    y = fused_moe(x, ids, weights, layer[1], expert_map=expert_map)
    assert torch.equal(y, fused_moe(x, local, weights, layer[1]))
    columns = ids.t().contiguous().t()
    assert torch.equal(fused_moe(x, columns, weights, layer[1], expert_map=expert_map), y)


def test_an_expert_map_without_local_experts(layer) -> None:
    x, ids, weights = batch(4, 3)
    nobody = torch.full((EXPERTS,), -1, dtype=torch.int32)
    assert not fused_moe(x, ids, weights, layer[1], expert_map=nobody).any()
    for call in ((x[:0], ids[:0], weights[:0]), (x, ids[:, :0], weights[:, :0])):
        assert not fused_moe(*call, layer[1], expert_map=nobody).any()


def test_ranks_add_up(kernel) -> None:
    """Each with the experts that its map says, every third one."""
    whole = random_weights(DEEPSEEK_V4, EXPERTS, HIDDEN, INTERMEDIATE)
    x, ids, weights = batch(17, 3, low=-1)
    total = torch.zeros(17, HIDDEN)
    for rank in range(3):
        own = range(rank, EXPERTS, 3)
        w = replace(whole, **{name: t[list(own)] for name, t in whole.tensors().items()})
        p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SWIGLU, kernel=kernel, ep_size=3)
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[list(own)] = torch.arange(len(own), dtype=torch.int32)
        total += fused_moe(x, ids, weights, p, expert_map=expert_map).float()
    expected = reference_moe(x, ids, weights, whole, family=DEEPSEEK_V4, swiglu=SWIGLU)
    assert torch.linalg.norm(total - expected) < 5e-3 * torch.linalg.norm(expected)


class Remembers(Sm90Kernel):
    """Its calls."""

    def __init__(self, name: str, **attributes) -> None:
        super().__init__("folded")
        self.name, self.calls = name, []
        vars(self).update(attributes)

    def make_runner(self, p, num_tokens, top_k):
        return lambda call, p: self.calls.append(call)


def test_who_takes_an_expert_map_is_handed_it(registered) -> None:
    """Any other kernel has local ids, int32, and never hears of a map; watchers see what the caller
    gave.
    """
    takes = Remembers("takes", takes_expert_map=True)
    others = [Remembers("knows none"), Remembers("takes none", takes_expert_map=False)]
    expert_map, seen = torch.tensor([-1, 1, 0, -1, -1, 7, 3], dtype=torch.int32), []
    ids = torch.tensor([[0, 1], [2, 5], [6, 7], [-1, 3], [2, 2]])
    end = observe.watch(lambda p, call: seen.append(call))
    try:
        with registered(Plugin(takes, *others)):
            for kernel in (takes, *others):
                w = random_weights(DEEPSEEK_V4, EXPERTS, HIDDEN, INTERMEDIATE)
                p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SWIGLU, kernel=kernel.name)
                fused_moe(X, ids, WEIGHTS, p, expert_map=expert_map)
                fused_moe(X, ids, WEIGHTS, p)
    finally:
        end()
    for mapped, plain in (takes.calls, seen[:2], seen[2:4], seen[4:]):
        assert mapped.topk_ids is plain.topk_ids is ids
        assert mapped.expert_map is expert_map
        assert plain.expert_map is None
    for kernel in others:
        mapped, plain = kernel.calls
        assert mapped.topk_ids.tolist() == [[-1, 1], [0, 7], [3, -1], [-1, -1], [0, 0]]
        assert (mapped.topk_ids.dtype, mapped.expert_map) == (torch.int32, None)
        assert plain.topk_ids is ids
        assert mapped.x is plain.x is X


BAD_MAPS = {
    "int64": (torch.zeros(4, dtype=torch.int64), "int64 [4] on cpu"),
    "of rank 2": (torch.zeros(1, 4, dtype=torch.int32), "int32 [1, 4] on cpu"),
    "a number": (torch.zeros((), dtype=torch.int32), "int32 [] on cpu"),
    "empty": (torch.zeros(0, dtype=torch.int32), "int32 [0] on cpu"),
    "strided": (torch.zeros(8, dtype=torch.int32)[::2], "int32 [4] with strides [2] on cpu"),
    "elsewhere": (torch.zeros(4, dtype=torch.int32, device="meta"), "int32 [4] on meta"),
}


@pytest.mark.parametrize("case", list(BAD_MAPS))
def test_bad_expert_maps(case, prepared) -> None:
    expert_map, seen = BAD_MAPS[case]
    out = torch.full_like(X, NAN)
    with pytest.raises(ValueError, match="expert_map is") as caught:
        fused_moe(X, IDS, WEIGHTS, prepared, out=out, expert_map=expert_map)
    assert str(caught.value) == (
        f"expert_map is {seen}; give contiguous int32 [global experts], at least one, on cpu"
    )
    assert out.isnan().all()


BOTH = torch.cat((X, X, X))


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (BOTH[:5], BOTH[1:6]),
        (BOTH[4:9], BOTH[:5]),
        (BOTH.view(5, 3 * HIDDEN)[:, 7 : 7 + HIDDEN], BOTH[10:]),
        (BOTH[5:6].expand(5, HIDDEN), BOTH[5:10]),
    ],
    ids=["ahead", "behind", "strided", "expanded"],
)
def test_out_that_overlaps_x(x, out, prepared) -> None:
    """A kernel may write out before it has read all of x, wherever the two meet."""
    before = BOTH.clone()
    with pytest.raises(ValueError, match="out shares memory with x"):
        fused_moe(x, IDS, WEIGHTS, prepared, out=out)
    assert torch.equal(BOTH, before)


@pytest.mark.parametrize(
    "rows", [(slice(5), slice(5, 10)), (slice(5, 10), slice(5)), (slice(10, 15), slice(5))], ids=str
)
def test_out_beside_x(rows, prepared) -> None:
    """Parts of one tensor are fine where they do not meet."""
    both = BOTH.clone()
    x, out = both[rows[0]], both[rows[1]]
    out.fill_(NAN)
    assert fused_moe(x, IDS, WEIGHTS, prepared, out=out).isfinite().all()
    assert torch.equal(x, BOTH[rows[0]])


class Scratch(Sm90Kernel):
    """Needs 100 bytes a token and 8 a choice, fills them, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__("folded")
        self.name = "scratch"
        self.given = []

    def workspace_bytes(self, p, num_tokens, top_k) -> int:
        return 100 * num_tokens + 8 * num_tokens * top_k

    def make_runner(self, p, num_tokens, top_k):
        return watched(
            super().make_runner(p, num_tokens, top_k),
            lambda call: self.given.append(call.workspace.fill_(255)),
        )

    @hookimpl
    def register_kernels(self, register) -> None:
        register(self)


@pytest.fixture
def scratch(registered):
    kernel = Scratch()
    with registered(kernel):
        w = random_weights(GPT_OSS, EXPERTS, HIDDEN, INTERMEDIATE)
        yield kernel, prepare_experts(w, family=GPT_OSS, swiglu=SWIGLU, kernel="scratch")


def test_workspace_of_the_callers(scratch) -> None:
    kernel, p = scratch
    needed = workspace_bytes(p, 5, 2)
    assert needed == 5 * 116
    own = fused_moe(X, IDS, WEIGHTS, p)
    assert kernel.given.pop().numel() >= needed
    for size in (needed, needed + 1000):
        workspace = torch.empty(size, dtype=torch.uint8)
        assert torch.equal(fused_moe(X, IDS, WEIGHTS, p, workspace=workspace), own)
        assert kernel.given.pop() is workspace
    fused_moe(X[:0], IDS[:0], WEIGHTS[:0], p, workspace=workspace)
    assert not kernel.given, "run for no tokens"


@pytest.mark.parametrize(
    ("workspace", "seen"),
    [
        (torch.empty(579, dtype=torch.uint8), "uint8 [579] on cpu"),
        (torch.empty(0, dtype=torch.uint8), "uint8 [0] on cpu"),
        (torch.empty(580, dtype=torch.int8), "int8 [580] on cpu"),
        (torch.empty(5, 116, dtype=torch.uint8), "uint8 [5, 116] on cpu"),
        (torch.empty(580, dtype=torch.uint8, device="meta"), "uint8 [580] on meta"),
        (torch.empty(1160, dtype=torch.uint8)[::2], "uint8 [580] with strides [2] on cpu"),
    ],
    ids=["small", "empty", "int8", "rank 2", "elsewhere", "strided"],
)
def test_bad_workspaces(scratch, workspace, seen) -> None:
    kernel, p = scratch
    with pytest.raises(ValueError, match="workspace is") as caught:
        fused_moe(X, IDS, WEIGHTS, p, workspace=workspace)
    assert f"workspace is {seen}; give" in str(caught.value)
    assert "uint8 of at least 580 bytes on cpu" in str(caught.value)
    assert not kernel.given
