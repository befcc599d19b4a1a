"""What fills allocated tensors through a framework's loader: neutral values, then a few experts at
a time; and a kernel that is chosen once and passed on.
"""

import pytest
import torch

from hopper_mxfp4 import (
    KernelUnavailable,
    LayerShape,
    allocate_weights,
    prepare_experts,
    restore_weights,
)
from hopper_mxfp4.checkpoint import weights as weights_module
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.loading import fill_neutral, hidden_beyond, matching_chunks
from hopper_mxfp4.plugin import Compilation, choose_kernel
from random_layers import FAMILIES, FAMILY_IDS, assert_same_bits, bits, random_weights

SHAPE = LayerShape(5, 192, 160)
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
families = pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)


def corner(target, source):
    """What a framework's loader does with what it is given."""
    target[tuple(slice(n) for n in source.shape)].copy_(source)


@families
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_neutral_is_what_allocated_weights_hold(family, scale_dtype):
    """In every dtype: 127 as a number of float8_e8m0fnu would be the byte of 128."""
    w = allocate_weights(
        SHAPE,
        family=family,
        device="cpu",
        kernel="reference",
        weight_dtype=torch.int8,
        scale_dtype=scale_dtype,
    )
    wanted = {name: t.clone() for name, t in w.tensors().items()}
    for name, t in w.tensors().items():
        t.view(torch.uint8).fill_(255)
        fill_neutral(name, t[1:3])
        assert bool((bits(t[0]) == bits(t[4])).all())  # the others are left alone
        fill_neutral(name, t)
        assert torch.equal(bits(t), bits(wanted[name])), name


@pytest.mark.usefixtures("sm90_kernels")
@families
@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 16 << 20])
def test_a_loader_that_fills_corners(monkeypatch, family, chunk_bytes):
    """Into padded tensors of anything, a few experts at a time: prepared, they are the
    checkpoint's.
    """
    monkeypatch.setattr(weights_module, "CHUNK_BYTES", chunk_bytes)
    source = random_weights(family, SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size)
    w = allocate_weights(SHAPE, family=family, device="cpu", kernel="sm90-folded")
    for name, target in w.tensors().items():
        assert target.shape != source.tensors()[name].shape
        target.view(torch.uint8).fill_(255)
        fill_neutral(name, target)
        given = 0
        for part, piece in matching_chunks(name, target, source.tensors()[name], family):
            assert len(part) == len(piece)
            assert len(piece) == 1 or piece[0].nbytes * len(piece) <= chunk_bytes
            corner(part, piece)
            given += piece.numel()
        assert given == source.tensors()[name].numel()
    p = prepare_experts(w, family=family, swiglu=family.swiglu({}), kernel="sm90-folded")
    assert_same_bits(restore_weights(p), source)


class Unregistered(ReferenceKernel):
    """A kernel that nobody can name."""

    name = "unregistered"

    def __init__(self):
        self.asked = []

    def unsupported_reason(self, shape, device, deterministic=False):
        self.asked.append((shape, device.type, deterministic))
        return "sums vary; ask for less" if deterministic else None


@families
def test_a_kernel_object_is_used_as_given(family):
    kernel = Unregistered()
    w = allocate_weights(SHAPE, family=family, device="cpu", kernel=kernel)
    source = random_weights(family, SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size)
    for name, target in w.tensors().items():
        corner(target, source.tensors()[name])
    p = prepare_experts(w, family=family, swiglu=family.swiglu({}), kernel=kernel)
    assert p.kernel is kernel
    assert kernel.asked == [(SHAPE, "cpu", False)] * 2
    with pytest.raises(ValueError, match="no kernel is called 'unregistered'"):
        choose_kernel(kernel.name, SHAPE, torch.device("cpu"))


class Compiles(Unregistered):
    def compilations(self, shape):
        return Compilation(print, (shape,)), Compilation(print)


def test_compiling_begins_before_weights_are_loaded(begun):
    kernel, family = Compiles(), FAMILIES[0]
    w = allocate_weights(SHAPE, family=family, device="cpu", kernel=kernel)
    assert begun == [Compilation(print, (SHAPE,)), Compilation(print)]
    prepare_experts(w, family=family, swiglu=family.swiglu({}), kernel=kernel)
    assert len({*begun}) == 2


def test_a_kernel_that_cannot_serve_compiles_nothing(begun):
    kernel, family = Compiles(), FAMILIES[0]
    w = random_weights(family, SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size)
    with pytest.raises(KernelUnavailable):
        prepare_experts(
            w, family=family, swiglu=family.swiglu({}), kernel=kernel, deterministic=True
        )
    assert not begun


def test_a_kernel_object_that_cannot_serve_is_refused(monkeypatch):
    kernel, family = Unregistered(), FAMILIES[0]
    w = random_weights(family, SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size)
    reason = "kernel unregistered can't run: sums vary; ask for less"
    with pytest.raises(KernelUnavailable, match=reason):
        prepare_experts(
            w, family=family, swiglu=family.swiglu({}), kernel=kernel, deterministic=True
        )
    assert not w.consumed
    monkeypatch.setenv("HOPPER_MXFP4_BATCH_INVARIANT", "1")
    with pytest.raises(KernelUnavailable, match=reason):
        allocate_weights(SHAPE, family=family, device="cpu", kernel=kernel)


@families
def test_hidden_columns_beyond_a_size(family):
    """What a checkpoint of 128 hidden columns leaves of tensors for 192, and not a byte more."""
    whole, small = (
        random_weights(family, 5, hidden, 160, seed=seed) for seed, hidden in enumerate((192, 128))
    )
    for name, tensor in whole.tensors().items():
        source = getattr(small, name)
        corner(tensor, source)
        fill_neutral(name, hidden_beyond(name, tensor, 128))
        assert torch.equal(tensor[tuple(slice(n) for n in source.shape)], source)
        beyond = hidden_beyond(name, tensor, 128)
        assert beyond.numel() == tensor.numel() - source.numel()
        assert (beyond == (127 if name.endswith("scale") else 0)).all()
        assert not hidden_beyond(name, tensor, 192).numel()
