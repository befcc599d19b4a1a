"""Random layers as checkpoints hold them, and what their bytes mean, written apart from the core's
own code.
"""

from dataclasses import replace

import numpy as np
import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, CheckpointFamily, ExpertWeights

FAMILIES = (GPT_OSS, DEEPSEEK_V4)
FAMILY_IDS = [family.name for family in FAMILIES]
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
WEIGHT_DTYPES = (torch.uint8, torch.int8)
SANE_SCALES = (118, 126)  # 2**-9 to 2**-1: sums stay far from float32's and bfloat16's ends
ALL_SCALES = (0, 254)


def random_weights(
    family: CheckpointFamily,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    weight_dtype: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.uint8,
    scales: tuple[int, int] = SANE_SCALES,
    seed: int = 0,
) -> ExpertWeights:
    """Every byte of the weights is random, every scale byte random within ``scales`` (both ends
    included).
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(
            weight_dtype
        )

    def scale(*shape: int) -> torch.Tensor:
        return encode_scale(
            torch.randint(scales[0], scales[1] + 1, shape, dtype=torch.uint8, generator=generator),
            scale_dtype,
        )

    def bias(*shape: int) -> torch.Tensor | None:
        return torch.randn(shape, generator=generator).bfloat16() if family.bias else None

    return ExpertWeights(
        w13=weight(experts, 2 * intermediate, hidden // 2),
        w2=weight(experts, hidden, intermediate // 2),
        w13_scale=scale(experts, 2 * intermediate, hidden // 32),
        w2_scale=scale(experts, hidden, intermediate // 32),
        w13_bias=bias(experts, 2 * intermediate),
        w2_bias=bias(experts, hidden),
    )


def encode_scale(bytes_: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """E8M0 bytes as a checkpoint of that dtype would hold them."""
    if dtype == torch.float32:
        return torch.from_numpy(np.ldexp(np.float32(1), bytes_.numpy().astype(np.int32) - 127))
    return bytes_.view(dtype)


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_scale`."""
    if scale.dtype == torch.float32:
        _, exponent = np.frexp(scale.numpy())  # 2**n is 0.5 * 2**(n + 1)
        return torch.from_numpy((exponent - 1 + 127).astype(np.uint8))
    return scale.view(torch.uint8)


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[.., rows, K/2] bytes with [.., rows, K/32] scales of any dtype, to float32 [.., rows, K], by
    e2m1's definition.
    """
    packed = weight.contiguous().view(torch.uint8).numpy()
    codes = (
        np.stack((packed & 15, packed >> 4), axis=-1)
        .reshape(*packed.shape[:-1], -1)
        .astype(np.int32)
    )
    sign, exponent, mantissa = codes >> 3, codes >> 1 & 3, codes & 1
    magnitude = np.where(exponent == 0, 0.5 * mantissa, np.ldexp(1 + 0.5 * mantissa, exponent - 1))
    power = np.repeat(decode_scale(scale).numpy().astype(np.int32) - 127, 32, axis=-1)
    with np.errstate(over="ignore"):  # 2 * 2**127 and more leave float32's range
        return torch.from_numpy(
            np.ldexp(np.where(sign == 1, -magnitude, magnitude), power).astype(np.float32)
        )


def clone(w: ExpertWeights) -> ExpertWeights:
    return replace(w, **{name: t.clone() for name, t in w.tensors().items()})


def bits(t: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers, so that NaN equals itself and -0 does not equal 0."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same_bits(seen: ExpertWeights, wanted: ExpertWeights) -> None:
    assert seen.tensors().keys() == wanted.tensors().keys()
    for name, t in wanted.tensors().items():
        got = seen.tensors()[name]
        assert got.dtype == t.dtype, name
        assert torch.equal(bits(got), bits(t)), name


def assert_restored(restored: ExpertWeights, w: ExpertWeights) -> None:
    """The restored weights are w's, bit for bit, with the scales as uint8."""
    as_bytes = {
        name: decode_scale(getattr(w, name).contiguous()) for name in ("w13_scale", "w2_scale")
    }
    assert_same_bits(restored, replace(w, **as_bytes, hidden_size=None, intermediate_size=None))
