"""Preparing and restoring is the identity, and preparing in place keeps addresses and leaks
nothing.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    CheckpointFamily,
    ExpertWeights,
    LayerShape,
    SwiGLU,
    allocate_weights,
    prepare_experts,
    reference_moe,
    restore_weights,
)
from random_layers import (
    ALL_SCALES,
    FAMILIES,
    FAMILY_IDS,
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    assert_restored,
    assert_same_bits,
    bits,
    clone,
    encode_scale,
    random_weights,
)
from sm90 import expected

pytestmark = pytest.mark.usefixtures("sm90_kernels")

KERNELS = ("reference", "sm90-folded", "sm90-by_k")
PREPARED = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")
bounded = settings(max_examples=80, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 12).map(lambda n: 32 * n)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, the last two dimensions stored the other way round."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values as a view of every other column of something twice as wide."""
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values as the middle of a larger tensor, which is how a shard's slice looks."""
    larger = torch.empty([n + 3 for n in t.shape], dtype=t.dtype)
    middle = larger[tuple(slice(1, n + 1) for n in t.shape)]
    return middle.copy_(t)


def backed_by_one_expert(t: torch.Tensor) -> torch.Tensor:
    """All experts the first one: an expanded tensor, whose experts share memory."""
    return t[:1].expand(t.shape)


layers = {
    "family": st.sampled_from(FAMILIES),
    "experts": st.integers(1, 5),
    "hidden": sizes,
    "intermediate": sizes,
    "weight_dtype": st.sampled_from(WEIGHT_DTYPES),
    "kernel": st.sampled_from(KERNELS),
    "seed": st.integers(0, 2**31),
}


@given(
    **layers,
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    stored=st.sampled_from((torch.clone, transposed, every_other, sliced, backed_by_one_expert)),
)
@bounded
def test_restoring_gives_the_checkpoint_again(
    family, experts, hidden, intermediate, weight_dtype, scale_dtype, kernel, stored, seed
) -> None:
    w = random_weights(
        family,
        experts,
        hidden,
        intermediate,
        weight_dtype=weight_dtype,
        scale_dtype=scale_dtype,
        scales=ALL_SCALES,
        seed=seed,
    )
    w = replace(w, **{name: stored(t) for name, t in w.tensors().items()})
    before = clone(w)
    prepared = prepare_experts(w, family=family, swiglu=SwiGLU(), kernel=kernel)
    assert_restored(restore_weights(prepared), before)
    one = slice(experts - 1, experts)
    assert_restored(
        restore_weights(prepared, one),
        replace(before, **{name: t[one] for name, t in before.tensors().items()}),
    )
    in_place = {
        getattr(prepared, name).data_ptr() == t.data_ptr() for name, t in w.tensors().items()
    }
    assert in_place == {w.consumed}, "all tensors or none"
    if not w.consumed:
        assert_same_bits(w, before)


def corners(
    allocated: ExpertWeights, family: CheckpointFamily, hidden: int, intermediate: int
) -> list[tuple[str, tuple, tuple]]:
    """Where a loader puts a checkpoint's tensors: (field, index into the allocated tensor, index
    into the checkpoint's).
    """
    both, gate, up = (
        slice(2 * intermediate),
        slice(intermediate),
        slice(intermediate, 2 * intermediate),
    )
    middle = allocated.w13.shape[1] // 2
    rows = (
        [(both, both)]
        if family.rows == "interleaved"
        else [(gate, gate), (slice(middle, middle + intermediate), up)]
    )
    everything = slice(None)
    moves = []
    for to, source in rows:
        moves.append(("w13", (everything, to, slice(hidden // 2)), (everything, source)))
        moves.append(("w13_scale", (everything, to, slice(hidden // 32)), (everything, source)))
        if family.bias:
            moves.append(("w13_bias", (everything, to), (everything, source)))
    moves.append(("w2", (everything, slice(hidden), slice(intermediate // 2)), ()))
    moves.append(("w2_scale", (everything, slice(hidden), slice(intermediate // 32)), ()))
    if family.bias:
        moves.append(("w2_bias", (everything, slice(hidden)), ()))
    return moves


def load(allocated: ExpertWeights, w: ExpertWeights, family: CheckpointFamily) -> None:
    for name, to, source in corners(allocated, family, w.w2.shape[1], w.w13.shape[1] // 2):
        getattr(allocated, name)[to] = getattr(w, name)[source]


def fill_with_garbage(allocated: ExpertWeights, seed: int) -> None:
    """Random bytes in all of it, as long as a checkpoint might hold them: no scale that is NaN,
    biases finite.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, t in allocated.tensors().items():
        view = t.view(torch.uint8)
        view.copy_(
            torch.randint(
                0,
                255 if name.endswith("scale") else 256,
                view.shape,
                dtype=torch.uint8,
                generator=generator,
            )
        )
        if name.endswith("bias"):
            t.nan_to_num_(nan=-3.0)


@given(
    **layers,
    scale_dtype=st.sampled_from(SCALE_DTYPES[:2]),
    garbage=st.booleans(),
)
@bounded
def test_preparing_in_place(
    family, experts, hidden, intermediate, weight_dtype, scale_dtype, kernel, garbage, seed
) -> None:
    """Allocated, loaded and prepared: the same addresses, the same bytes as out of place, and the
    checkpoint can be had back.
    """
    dtypes = {"weight_dtype": weight_dtype, "scale_dtype": scale_dtype}
    w = random_weights(
        family, experts, hidden, intermediate, scales=ALL_SCALES, seed=seed, **dtypes
    )
    allocated = allocate_weights(
        LayerShape(experts, hidden, intermediate),
        family=family,
        device="cpu",
        kernel=kernel,
        **dtypes,
    )
    if garbage:
        fill_with_garbage(allocated, seed)
    load(allocated, w, family)
    addresses = {name: t.data_ptr() for name, t in allocated.tensors().items()}
    wanted = expected(w, family, kernel.removeprefix("sm90-") if kernel != "reference" else None)
    prepared = prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel=kernel)
    assert {name: getattr(prepared, name).data_ptr() for name in addresses} == addresses
    apart = prepare_experts(
        replace(w, **{name: sliced(t) for name, t in w.tensors().items()}),
        family=family,
        swiglu=SwiGLU(),
        kernel=kernel,
    )
    for name, tensor in wanted.items():
        for result in (prepared, apart):
            assert getattr(result, name).shape == tensor.shape
            assert torch.equal(getattr(result, name).view(torch.uint8), tensor.view(torch.uint8)), (
                name
            )
    assert_restored(restore_weights(prepared), w)


@pytest.mark.parametrize("scales", ["folded", "by_k"])
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_nan_in_the_padding_is_ignored(family, scales) -> None:
    """Loaders may allocate with torch.empty: what lies beyond the true sizes is neither refused nor
    prepared.
    """
    w = random_weights(family, 3, 160, 96)
    allocated = allocate_weights(
        LayerShape(3, 160, 96), family=family, device="cpu", kernel=f"sm90-{scales}"
    )
    for t in allocated.tensors().values():
        t.fill_(float("nan") if t.is_floating_point() else 255)
    load(allocated, w, family)
    wanted = expected(w, family, scales)
    prepared = prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel=f"sm90-{scales}")
    for name, tensor in wanted.items():
        assert torch.equal(getattr(prepared, name), tensor), name


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_nan_at_the_edge_of_the_true_size_is_not(family) -> None:
    """The last scale of each corner of the checkpoint, wherever the loader has put it, is looked
    at; the place named is there.
    """
    for name, to, _ in corners(
        allocate_weights(LayerShape(3, 160, 96), family=family, device="cpu", kernel="sm90-folded"),
        family,
        160,
        96,
    ):
        if not name.endswith("scale"):
            continue
        allocated = allocate_weights(
            LayerShape(3, 160, 96), family=family, device="cpu", kernel="sm90-folded"
        )
        load(allocated, random_weights(family, 3, 160, 96), family)
        row, column = to[1].stop - 1, to[2].stop - 1
        getattr(allocated, name)[2, row, column] = 255
        with pytest.raises(ValueError, match=rf"{name}\[2, {row}, {column}\] is 255"):
            prepare_experts(allocated, family=family, swiglu=SwiGLU(), kernel="sm90-folded")


@pytest.mark.parametrize("place", [(0, 2, "nan"), (2, 191, "inf")], ids=str)
def test_nan_in_a_bias_within_the_true_size_is_not(place) -> None:
    """The row named is that of the allocated tensor."""
    expert, row, value = place
    w = random_weights(GPT_OSS, 3, 160, 96)
    w.w13_bias[expert, row] = float(value)
    allocated = allocate_weights(
        LayerShape(3, 160, 96), family=GPT_OSS, device="cpu", kernel="sm90-folded"
    )
    load(allocated, w, GPT_OSS)
    with pytest.raises(ValueError, match=rf"w13_bias\[{expert}, {row}\] is {value}"):
        prepare_experts(allocated, family=GPT_OSS, swiglu=SwiGLU(), kernel="sm90-folded")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_what_is_allocated(family, kernel) -> None:
    """Padded sizes, the dtypes asked for, and values that mean nothing: zero weights and biases,
    scales of one.
    """
    allocated = allocate_weights(
        LayerShape(3, 160, 96),
        family=family,
        device="cpu",
        kernel=kernel,
        weight_dtype=torch.int8,
        scale_dtype=torch.float8_e8m0fnu,
    )
    h, i = (160, 96) if kernel == "reference" else (256, 128)
    shapes = {
        "w13": (3, 2 * i, h // 2),
        "w2": (3, h, i // 2),
        "w13_scale": (3, 2 * i, h // 32),
        "w2_scale": (3, h, i // 32),
    }
    if family.bias:
        shapes |= {"w13_bias": (3, 2 * i), "w2_bias": (3, h)}
    assert {name: tuple(t.shape) for name, t in allocated.tensors().items()} == shapes
    for name, t in allocated.tensors().items():
        kind = name.partition("_")[2]
        assert (
            t.dtype == {"": torch.int8, "scale": torch.float8_e8m0fnu, "bias": torch.bfloat16}[kind]
        )
        assert (t.view(torch.uint8) == (127 if kind == "scale" else 0)).all(), name
    assert (allocated.hidden_size, allocated.intermediate_size) == (160, 96)
    assert allocated.shape == LayerShape(3, 160, 96)


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        ("weight_dtype", torch.bfloat16),
        ("scale_dtype", torch.float32),
        ("scale_dtype", torch.bfloat16),
    ],
    ids=str,
)
def test_what_cannot_be_allocated(field, dtype) -> None:
    """A tensor of another kind would have to be refused or copied later, after the checkpoint is
    loaded into it.
    """
    with pytest.raises(ValueError, match=f"{field} is {dtype}"):
        allocate_weights(LayerShape(1, 128, 128), family=GPT_OSS, device="cpu", **{field: dtype})


def test_parameters_are_prepared_in_place() -> None:
    """Frameworks hand over nn.Parameters, biases with requires_grad among them."""
    w = random_weights(GPT_OSS, 2, 128, 128)
    before = clone(w)
    w = replace(
        w,
        **{
            name: torch.nn.Parameter(t, requires_grad=t.is_floating_point())
            for name, t in w.tensors().items()
        },
    )
    prepared = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="sm90-folded")
    for name in PREPARED:
        assert getattr(prepared, name).data_ptr() == getattr(w, name).data_ptr()
        assert not getattr(prepared, name).requires_grad
    assert_restored(restore_weights(prepared), before)


def float_scale(t: torch.Tensor) -> torch.Tensor:
    return encode_scale(t, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("w13", transposed),
        ("w2", transposed),
        ("w13_scale", every_other),
        ("w2_scale", float_scale),
        ("w13_bias", sliced),
        ("w2_bias", sliced),
    ],
)
def test_one_tensor_that_does_not_fit(name, change, kernel) -> None:
    """Then nothing is prepared in place: w is left alone as a whole and can be used again."""
    w = random_weights(GPT_OSS, 2, 128, 256)
    w = replace(w, **{name: change(getattr(w, name))})
    before = clone(w)
    prepared = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel=kernel)
    assert not w.consumed
    assert_same_bits(w, before)
    mine = {t.data_ptr() for t in w.tensors().values()}
    assert not mine & {getattr(prepared, name).data_ptr() for name in PREPARED}
    again = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel=kernel)
    for name in PREPARED:
        assert torch.equal(bits(getattr(again, name)), bits(getattr(prepared, name)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_prepared_in_place_are_used_up(kernel) -> None:
    """A second use would read a kernel's bytes as a checkpoint's and give garbage: it is refused,
    and refusing changes nothing.
    """
    w = random_weights(DEEPSEEK_V4, 2, 128, 128)
    prepared = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel=kernel)
    assert w.consumed
    before = clone(w)
    with pytest.raises(ValueError, match=r"prepared in place.*restore_weights"):
        prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel=kernel)
    call = (torch.ones(1, 128), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"prepared in place.*restore_weights"):
        reference_moe(*call, w, family=DEEPSEEK_V4, swiglu=SwiGLU())
    assert_same_bits(w, before)
    restored = restore_weights(prepared)
    assert not restored.consumed
    assert reference_moe(*call, restored, family=DEEPSEEK_V4, swiglu=SwiGLU()).any()


def test_restored_weights_are_new() -> None:
    """Writing to them does not reach the prepared ones, whatever the layout."""
    for kernel in KERNELS:
        w = random_weights(GPT_OSS, 2, 128, 128)
        prepared = prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel=kernel)
        first = restore_weights(prepared)
        kept = clone(first)
        for t in first.tensors().values():
            t.view(torch.uint8).fill_(1)
        assert_same_bits(restore_weights(prepared), kept)
