"""Restoring prepared weights where they are, for a loader to overwrite some of them, and preparing
them again.
"""

import pytest
import torch

from hopper_mxfp4 import LayerShape, allocate_weights, prepare_experts
from hopper_mxfp4.arrange import restore_in_place
from hopper_mxfp4.contract import NEUTRAL_SCALE
from random_layers import FAMILIES, FAMILY_IDS, assert_same_bits, bits, clone, random_weights

SHAPE = LayerShape(3, 192, 160)
KERNELS = ("reference", "sm90-folded", "sm90-by_k")


def filled(family, w, kernel):
    """What a loader leaves in allocated weights: the checkpoint's tensors in the corners, gate and
    up in their halves.
    """
    allocated = allocate_weights(SHAPE, family=family, device="cpu", kernel=kernel)
    for name, source in w.tensors().items():
        target = getattr(allocated, name)
        halves = name.startswith("w13") and family.rows == "gate_up"
        pairs = (
            zip(target.chunk(2, 1), source.chunk(2, 1), strict=True)
            if halves
            else [(target, source)]
        )
        for place, piece in pairs:
            place[tuple(slice(n) for n in piece.shape)] = piece
    return allocated


@pytest.mark.usefixtures("sm90_kernels")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_the_loaders_bytes_are_back_at_the_same_addresses(family, kernel):
    allocated = filled(family, random_weights(family, 3, 192, 160), kernel)
    loaded = clone(allocated)
    addresses = {name: t.data_ptr() for name, t in allocated.tensors().items()}
    p = prepare_experts(allocated, family=family, swiglu=family.swiglu({}), kernel=kernel)
    prepared = {name: t.clone() for name, t in allocated.tensors().items()}
    restored = restore_in_place(p)
    assert {name: t.data_ptr() for name, t in restored.tensors().items()} == addresses
    assert_same_bits(restored, loaded)
    again = prepare_experts(restored, family=family, swiglu=family.swiglu({}), kernel=kernel)
    for name, t in prepared.items():
        assert getattr(again, name).data_ptr() == addresses[name]
        assert torch.equal(bits(restored.tensors()[name]), bits(t)), name


@pytest.mark.usefixtures("sm90_kernels")
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_whatever_the_memory_held(family):
    """After a sleep that dropped it: the padding is neutral again, and so fit for a loader that
    fills corners.
    """
    allocated = filled(family, random_weights(family, 3, 192, 160), "sm90-folded")
    p = prepare_experts(allocated, family=family, swiglu=family.swiglu({}), kernel="sm90-folded")
    for t in allocated.tensors().values():
        t.view(torch.uint8).fill_(255)
    restored = restore_in_place(p)
    for name, t in restored.tensors().items():
        neutral = NEUTRAL_SCALE if name.endswith("scale") else 0
        if name.startswith("w2"):
            assert (t[:, 192:] == neutral).all(), name
        if name in ("w2", "w2_scale"):
            assert (t[..., 160 // (2 if name == "w2" else 32) :] == neutral).all(), name
