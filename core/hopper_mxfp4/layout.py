"""Checkpoint layout to kernel layout and back, bit for bit, in bounded chunks of experts.

Every kernel reads the projections padded and with w13's rows as the halves [up; gate]; a `Layout`
says how far to pad and how the kernel wants the bytes arranged after that.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .families import CheckpointFamily
from .weights import GROUP, ExpertWeights, LayerShape, expert_chunks, round_up, scale_bytes

Repack = Callable[[torch.Tensor], torch.Tensor]
Pair = tuple[int, int]  # a size as it is, and padded
NEUTRAL_SCALE = 127  # E8M0 for 1.0


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


@dataclass(frozen=True)
class Layout:
    """How a kernel wants its bytes.

    name: identifies the arrangement; a kernel refuses weights prepared under another name.
    multiple: H and I are padded to it, each half of w13 on its own.
    pack_weight, pack_scale: from uint8 [e, rows, K/2] or [e, rows, K/32] to the kernel's arrangement of
        the same bytes, expert by expert: any shape whose first dimension is e. May return its argument.
    unpack_weight, unpack_scale: their inverses, in plain torch, on any device.
    least_scale: the smallest E8M0 byte that the kernel multiplies by exactly. Below it weights must be zero.
    """

    name: str
    multiple: int
    pack_weight: Repack = _same
    pack_scale: Repack = _same
    unpack_weight: Repack = _same
    unpack_scale: Repack = _same
    least_scale: int = 0


PLAIN = Layout("plain", GROUP)


def fits_in_place(w: ExpertWeights, layout: Layout) -> bool:
    """Whether every tensor already has the prepared size and dtype width, so that none need be new."""
    s = w.shape
    h, i = round_up(s.hidden_size, layout.multiple), round_up(s.intermediate_size, layout.multiple)
    sized = w.w2.shape[1] == h and w.w13.shape[1] == 2 * i
    return sized and all(
        t.is_contiguous() and t.dtype != torch.float32 for t in w.tensors().values()
    )


def prepare_tensors(
    w: ExpertWeights, family: CheckpointFamily, layout: Layout, in_place: bool
) -> dict[str, torch.Tensor]:
    """The six tensors (or four) as a kernel with this layout reads them, from checked weights.

    in_place: repack each where it is, at its own address (`fits_in_place`); else all are new. Peak
    extra memory, beyond new results, is two chunks of CHUNK_BYTES or of one expert's w13, whichever
    is larger.
    """
    s = w.shape
    h, i = round_up(s.hidden_size, layout.multiple), round_up(s.intermediate_size, layout.multiple)
    i_pair, h_pair = (s.intermediate_size, i), (s.hidden_size, h)

    def prepare(
        t: torch.Tensor,
        rows: str | None,
        row_pair: Pair,
        k_pair: Pair,
        per: int,
        fill: int,
        pack: Repack,
    ) -> torch.Tensor:
        return _prepare(
            t, rows, row_pair, (k_pair[0] // per, k_pair[1] // per), fill, pack, in_place
        )

    out = {
        "w13": prepare(w.w13, family.rows, i_pair, h_pair, 2, 0, layout.pack_weight),
        "w2": prepare(w.w2, None, h_pair, i_pair, 2, 0, layout.pack_weight),
        "w13_scale": prepare(
            w.w13_scale, family.rows, i_pair, h_pair, GROUP, NEUTRAL_SCALE, layout.pack_scale
        ),
        "w2_scale": prepare(
            w.w2_scale, None, h_pair, i_pair, GROUP, NEUTRAL_SCALE, layout.pack_scale
        ),
    }
    if w.w13_bias is not None and w.w2_bias is not None:
        out["w13_bias"] = prepare(
            w.w13_bias.unsqueeze(2), family.rows, i_pair, (1, 1), 1, 0, _same
        ).squeeze(2)
        out["w2_bias"] = prepare(w.w2_bias.unsqueeze(2), None, h_pair, (1, 1), 1, 0, _same).squeeze(
            2
        )
    return out


def restore_tensors(
    prepared: dict[str, torch.Tensor],
    shape: LayerShape,
    family: CheckpointFamily,
    layout: Layout,
    weight_dtype: torch.dtype,
    experts: slice = slice(None),
) -> ExpertWeights:
    """The inverse of `prepare_tensors` for a slice of experts: new tensors at the true sizes, uint8 scales."""
    h, i = shape.hidden_size, shape.intermediate_size

    def restore(
        name: str, rows: str | None, sizes: tuple[int, int], unpack: Repack
    ) -> torch.Tensor:
        return _restore(prepared[name][experts], rows, sizes, unpack)

    w = ExpertWeights(
        w13=restore("w13", family.rows, (i, h // 2), layout.unpack_weight).view(weight_dtype),
        w2=restore("w2", None, (h, i // 2), layout.unpack_weight).view(weight_dtype),
        w13_scale=restore("w13_scale", family.rows, (i, h // GROUP), layout.unpack_scale),
        w2_scale=restore("w2_scale", None, (h, i // GROUP), layout.unpack_scale),
    )
    if "w13_bias" in prepared:
        w13_bias = _restore(
            prepared["w13_bias"][experts].unsqueeze(2), family.rows, (i, 1), _same
        ).squeeze(2)
        w2_bias = _restore(prepared["w2_bias"][experts].unsqueeze(2), None, (h, 1), _same).squeeze(
            2
        )
        w = replace(w, w13_bias=w13_bias, w2_bias=w2_bias)
    return w


def gate_and_up(t: torch.Tensor, rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a checkpoint's w13 (or its scale or bias), [e, 2I, ..] each [e, I, ..]: (gate, up)."""
    if rows == "interleaved":
        return t[:, 0::2], t[:, 1::2]
    half = t.shape[1] // 2
    return t[:, :half], t[:, half:]


def _prepare(
    source: torch.Tensor,
    rows: str | None,
    row_pair: Pair,
    column_pair: Pair,
    fill: int,
    pack: Repack,
    in_place: bool,
) -> torch.Tensor:
    """One tensor [E, rows, columns]; the pairs are (true, padded), rows those of one half where there are two."""
    halves = 2 if rows else 1
    (true_rows, padded_rows), (columns, padded_columns) = row_pair, column_pair
    prepared_shape = (source.shape[0], halves * padded_rows, padded_columns)
    if source.element_size() == 1:
        source = source.view(torch.uint8)
    if (
        in_place
        and rows is None
        and pack is _same
        and (true_rows, columns) == (padded_rows, padded_columns)
    ):
        return source  # nothing would change
    dtype = torch.uint8 if source.dtype == torch.float32 else source.dtype
    result = source if in_place else torch.empty(prepared_shape, dtype=dtype, device=source.device)
    for part in expert_chunks(max(source, result, key=lambda t: t.nbytes)):
        chunk = source[part]
        staged = torch.full(
            (chunk.shape[0], *prepared_shape[1:]), fill, dtype=dtype, device=source.device
        )
        if rows:
            gate, up = gate_and_up(chunk, rows)
            pairs = [(up, staged[:, :padded_rows]), (gate, staged[:, padded_rows:])]
        else:
            pairs = [(chunk, staged)]
        for piece, place in pairs:
            piece = piece[:, :true_rows, :columns]
            place[:, :true_rows, :columns] = (
                scale_bytes(piece) if piece.dtype == torch.float32 else piece
            )
        packed = pack(staged)
        result[part] = packed.reshape(staged.shape)
    return result.view(result.shape[0], *packed.shape[1:])


def _restore(
    prepared: torch.Tensor, rows: str | None, sizes: tuple[int, int], unpack: Repack
) -> torch.Tensor:
    halves = 2 if rows else 1
    true_rows, columns = sizes
    result = torch.empty(
        prepared.shape[0], halves * true_rows, columns, dtype=prepared.dtype, device=prepared.device
    )
    for part in expert_chunks(prepared):
        chunk = unpack(prepared[part])
        if rows:
            half = chunk.shape[1] // 2
            gate, up = gate_and_up(result[part], rows)
            up.copy_(chunk[:, :true_rows, :columns])
            gate.copy_(chunk[:, half : half + true_rows, :columns])
        else:
            result[part] = chunk[:, :true_rows, :columns]
    return result


# --- FlashInfer's SM90 mixed-input layout -------------------------------------------------------
# The helpers of flashinfer.fused_moe make it; these undo it. Weights, per expert, in blocks of 16
# rows x 64 values (32 bytes a row): the 32-bit word c of row r + 8h of a block (r < 8, h < 2,
# c < 8) holds, with t = c mod 4 and k0 = 16 * (2 * (c div 4) + h) + 2t, the values k0, k0+1, k0+8
# and k0+9 of rows r and r + 8. Its low and high 16 bits hold the even and the odd k of a pair, each
# as scattered bits of a bfloat16 (sign at 15, exponent at 8..7, mantissa at 6).


def unpack_sm90_weight(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's `interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4")`.

    packed: uint8 [e, rows, K/2], rows a multiple of 16 and K of 64. Returns a new tensor of that shape.
    """
    e, rows, half_k = packed.shape
    words = (
        packed.contiguous().view(torch.int32).view(e, rows // 16, 2, 8, half_k // 32, 2, 4)
    )  # e, R, h, r, B, c div 4, t
    out = torch.empty(
        (e, rows // 16, 2, 8, half_k // 32, 2, 2, 2, 4), dtype=torch.uint8, device=packed.device
    )  # e,R,s,r,B,c,h,q,t
    for q in range(2):  # k0 or k0 + 8
        for s in range(2):  # row r or r + 8
            byte = _nibble(words, 2 * q + s) | _nibble(words >> 16, 2 * q + s) << 4
            out[:, :, s, :, :, :, :, q] = byte.to(torch.uint8).permute(0, 1, 3, 4, 5, 2, 6)
    return out.view(e, rows, half_k)


def _nibble(words: torch.Tensor, pair: int) -> torch.Tensor:
    """The e2m1 value of pair 0..3 in the low 16 bits of each word; higher bits are ignored."""
    scattered = words << 1 & 0x8000 | words >> 3 & 0x0180 | words >> 7 & 0x0040
    bits = scattered if pair == 3 else words << 3 * pair
    return bits >> 12 & 8 | bits >> 6 & 7


def unpack_sm90_scale_folded(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's scale helper of 0.6.16 to .post2 and from 0.6.18.

    packed: uint8 [e, rows/64, K/128, 16, 16]; byte [f, 4m + g] of a block is row 16m + f, group g.
    Returns uint8 [e, rows, K/32].
    """
    e, row_blocks, k_blocks = packed.shape[:3]
    blocks = packed.reshape(e, row_blocks, k_blocks, 16, 4, 4)
    return blocks.permute(0, 1, 4, 3, 2, 5).reshape(e, row_blocks * 64, k_blocks * 4)


def unpack_sm90_scale_by_k(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of FlashInfer's scale helper of 0.6.10 to 0.6.15, 0.6.16.post3, .post4 and 0.6.17.

    packed: uint8 [e, K/128, rows * 4]. Returns uint8 [e, rows, K/32].
    """
    e, k_blocks, width = packed.shape
    return (
        packed.reshape(e, k_blocks, width // 4, 4)
        .permute(0, 2, 1, 3)
        .reshape(e, width // 4, k_blocks * 4)
    )


UNPACK_SM90_SCALE = {"folded": unpack_sm90_scale_folded, "by_k": unpack_sm90_scale_by_k}
