"""Preparation for FlashInfer's SM90 kernel once more, slowly, in NumPy, and throw-away kernels that
use it.

Written from the description of the layout (flashinfer/layout.py repeats it), not from the core's
code: it packs where the core unpacks, and it goes word by word where the core permutes axes.
"""

from collections.abc import Callable

import numpy as np
import torch

from hopper_mxfp4 import CheckpointFamily, ExpertWeights, PreparedExperts
from hopper_mxfp4.contract import Call, Run
from hopper_mxfp4.kernels.flashinfer.layout import (
    unpack_sm90_scale_by_k,
    unpack_sm90_scale_folded,
    unpack_sm90_weight,
)
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.plugin import Layout, hookimpl
from random_layers import decode_scale

Array = np.ndarray

# Where a half word holds the sign, the exponent's high and low bit and the mantissa of each of its
# four values.
PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13))


def _scattered(code: int, places: tuple[int, ...]) -> int:
    return sum((code >> (3 - n) & 1) << place for n, place in enumerate(places))


_SCATTERED = np.array(
    [[_scattered(code, places) for code in range(16)] for places in PLACES], dtype=np.uint32
)


def pack_weight(w: Array) -> Array:
    """uint8 [E, rows, K/2] to the same shape, interleaved."""
    e, rows, half_k = w.shape
    codes = np.stack((w & 15, w >> 4), axis=-1).reshape(e, rows // 16, 16, half_k // 32, 64)
    words = np.empty((e, rows // 16, 16, half_k // 32, 8), dtype="<u4")
    for r in range(8):
        for h in range(2):
            for c in range(8):
                t, j = c % 4, 2 * (c // 4) + h
                k0 = 16 * j + 2 * t
                word = np.uint32(0)
                for pair, (row, k) in enumerate(
                    ((r, k0), (r + 8, k0), (r, k0 + 8), (r + 8, k0 + 8))
                ):
                    word = (
                        word
                        | _SCATTERED[pair][codes[:, :, row, :, k]]
                        | _SCATTERED[pair][codes[:, :, row, :, k + 1]] << 16
                    )
                words[:, :, r + 8 * h, :, c] = word
    return words.view(np.uint8).reshape(w.shape)


def pack_scale_folded(s: Array) -> Array:
    """uint8 [E, rows, K/32] to [E, rows/64, K/128, 16, 16]."""
    e, rows, groups = s.shape
    out = np.empty((e, rows // 64, groups // 4, 16, 16), dtype=np.uint8)
    for f in range(16):
        for m in range(4):
            for g in range(4):
                out[:, :, :, f, 4 * m + g] = s[:, 16 * m + f :: 64, g::4]
    return out


def pack_scale_by_k(s: Array) -> Array:
    """uint8 [E, rows, K/32] to [E, K/128, rows * 4]: the four groups of a row stand together."""
    e, rows, groups = s.shape
    out = np.empty((e, groups // 4, rows * 4), dtype=np.uint8)
    for block in range(groups // 4):
        for g in range(4):
            out[:, block, g::4] = s[:, :, 4 * block + g]
    return out


PACK_SCALE = {"folded": pack_scale_folded, "by_k": pack_scale_by_k}
UNPACK_SCALE = {"folded": unpack_sm90_scale_folded, "by_k": unpack_sm90_scale_by_k}


def expected(
    w: ExpertWeights, family: CheckpointFamily, scales: str | None
) -> dict[str, torch.Tensor]:
    """What preparing must give: every tensor, for the SM90 kernel with that scale layout, or
    unpacked and unpadded for None.
    """
    multiple = 128 if scales else 32
    h, i = w.w2.shape[1], w.w13.shape[1] // 2
    padded_h, padded_i = (-(-n // multiple) * multiple for n in (h, i))

    def padded(t: Array, rows: int, columns: int, fill: int) -> Array:
        out = np.full((t.shape[0], rows, columns), fill, dtype=t.dtype)
        out[:, : t.shape[1], : t.shape[2]] = t
        return out

    def halves(t: Array, columns: int, fill: int) -> Array:
        up_and_gate = (
            (t[:, 1::2], t[:, 0::2]) if family.rows == "interleaved" else (t[:, i:], t[:, :i])
        )
        return np.concatenate(
            [padded(half, padded_i, columns, fill) for half in up_and_gate], axis=1
        )

    weights = {
        "w13": halves(w.w13.contiguous().view(torch.uint8).numpy(), padded_h // 2, 0),
        "w2": padded(w.w2.contiguous().view(torch.uint8).numpy(), padded_h, padded_i // 2, 0),
    }
    scale_arrays = {
        "w13_scale": halves(decode_scale(w.w13_scale).numpy(), padded_h // 32, 127),
        "w2_scale": padded(decode_scale(w.w2_scale).numpy(), padded_h, padded_i // 32, 127),
    }
    if scales:
        weights = {name: pack_weight(t) for name, t in weights.items()}
        scale_arrays = {name: PACK_SCALE[scales](t) for name, t in scale_arrays.items()}
    out = {name: torch.from_numpy(t) for name, t in (weights | scale_arrays).items()}
    if family.bias:
        bits = {
            name: getattr(w, name).contiguous().view(torch.int16).numpy()[:, :, None]
            for name in ("w13_bias", "w2_bias")
        }
        out["w13_bias"] = torch.from_numpy(halves(bits["w13_bias"], 1, 0)[:, :, 0]).view(
            torch.bfloat16
        )
        out["w2_bias"] = torch.from_numpy(padded(bits["w2_bias"], padded_h, 1, 0)[:, :, 0]).view(
            torch.bfloat16
        )
    return out


def _on_tensors(pack: Callable[[Array], Array]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.from_numpy(pack(t.numpy()))


class Sm90Kernel:
    """Wants its weights as FlashInfer does, and computes with the reference's maths, so that it
    runs on a CPU.
    """

    auto_devices = frozenset()
    activations = frozenset({"bf16"})

    def __init__(self, scales: str) -> None:
        self.name = f"sm90-{scales}"
        self._layout = Layout(
            name=self.name,
            multiple=128,
            pack_weight=_on_tensors(pack_weight),
            pack_scale=_on_tensors(PACK_SCALE[scales]),
            unpack_weight=unpack_sm90_weight,
            unpack_scale=UNPACK_SCALE[scales],
        )

    def unsupported_reason(self, shape, device, deterministic=False) -> None:
        return None

    def warm_up(self, p):
        pass

    def layout(self, device: torch.device) -> Layout:
        return self._layout

    def workspace_bytes(self, p: PreparedExperts, num_tokens: int, top_k: int) -> int:
        return 0

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        return ReferenceKernel().make_runner(p, num_tokens, top_k)


def watched(run: Run, see: Callable[[Call], object]) -> Run:
    """run, told of every call before it."""

    def seen(call: Call, p: PreparedExperts) -> None:
        see(call)
        run(call, p)

    return seen


class Plugin:
    """Registers kernels; what a package that adds one would offer as its entry point."""

    def __init__(self, *kernels) -> None:
        self.kernels = kernels

    @hookimpl
    def register_kernels(self, register) -> None:
        for kernel in self.kernels:
            register(kernel)
