"""Checkpoint layout to kernel layout and back, bit for bit, in bounded chunks of experts.

Every kernel reads the projections padded and with w13's rows as the halves [up; gate]; a `Layout`
says how far to pad and how the kernel wants the bytes arranged after that.
"""

from dataclasses import replace

import torch

from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.checkpoint.weights import ExpertWeights, expert_chunks, round_up, scale_bytes
from hopper_mxfp4.contract import (
    BLOCK,
    NEUTRAL_SCALE,
    LayerShape,
    Layout,
    PreparedExperts,
    Repack,
    same_bytes,
)

Extent = tuple[int, int]  # a size as it is, and padded


def fits_in_place(w: ExpertWeights, layout: Layout) -> bool:
    """Whether every tensor already has the prepared size and dtype width, so that none need be
    new.
    """
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
    is larger, and what the layout's packing of one takes.
    """
    s = w.shape
    h, i = round_up(s.hidden_size, layout.multiple), round_up(s.intermediate_size, layout.multiple)
    i_pair, h_pair = (s.intermediate_size, i), (s.hidden_size, h)

    def prepare(
        t: torch.Tensor,
        rows: str | None,
        row_pair: Extent,
        k_pair: Extent,
        per: int,
        fill: int,
        pack: Repack,
    ) -> torch.Tensor:
        return _prepare(
            t, rows, row_pair, (k_pair[0] // per, k_pair[1] // per), fill, pack, in_place
        )

    w13, w2 = layout.packing("w13"), layout.packing("w2")
    out = {
        "w13": prepare(w.w13, family.rows, i_pair, h_pair, 2, 0, w13.pack_weight),
        "w2": prepare(w.w2, None, h_pair, i_pair, 2, 0, w2.pack_weight),
        "w13_scale": prepare(
            w.w13_scale, family.rows, i_pair, h_pair, BLOCK, layout.padding_scale, w13.pack_scale
        ),
        "w2_scale": prepare(
            w.w2_scale, None, h_pair, i_pair, BLOCK, layout.padding_scale, w2.pack_scale
        ),
    }
    if w.w13_bias is not None and w.w2_bias is not None:
        out["w13_bias"] = prepare(
            w.w13_bias.unsqueeze(2), family.rows, i_pair, (1, 1), 1, 0, same_bytes
        ).squeeze(2)
        out["w2_bias"] = prepare(
            w.w2_bias.unsqueeze(2), None, h_pair, (1, 1), 1, 0, same_bytes
        ).squeeze(2)
    return out


def restore_tensors(
    prepared: dict[str, torch.Tensor],
    shape: LayerShape,
    family: CheckpointFamily,
    layout: Layout,
    weight_dtype: torch.dtype,
    experts: slice = slice(None),
) -> ExpertWeights:
    """The inverse of `prepare_tensors` for a slice of experts: new tensors at the true sizes, uint8
    scales.
    """
    h, i = shape.hidden_size, shape.intermediate_size

    def restore(
        name: str, rows: str | None, sizes: tuple[int, int], unpack: Repack
    ) -> torch.Tensor:
        return _restore(prepared[name][experts], rows, sizes, unpack)

    w13, w2 = layout.packing("w13"), layout.packing("w2")
    w = ExpertWeights(
        w13=restore("w13", family.rows, (i, h // 2), w13.unpack_weight).view(weight_dtype),
        w2=restore("w2", None, (h, i // 2), w2.unpack_weight).view(weight_dtype),
        w13_scale=restore("w13_scale", family.rows, (i, h // BLOCK), w13.unpack_scale),
        w2_scale=restore("w2_scale", None, (h, i // BLOCK), w2.unpack_scale),
    )
    if "w13_bias" in prepared:
        w13_bias = _restore(
            prepared["w13_bias"][experts].unsqueeze(2), family.rows, (i, 1), same_bytes
        ).squeeze(2)
        w2_bias = _restore(
            prepared["w2_bias"][experts].unsqueeze(2), None, (h, 1), same_bytes
        ).squeeze(2)
        w = replace(w, w13_bias=w13_bias, w2_bias=w2_bias)
    return w


def gate_and_up(t: torch.Tensor, rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a checkpoint's w13 (or its scale or bias), [e, 2I, ..] each [e, I, ..]: (gate,
    up).
    """
    if rows == "interleaved":
        return t[:, 0::2], t[:, 1::2]
    half = t.shape[1] // 2
    return t[:, :half], t[:, half:]


def _prepare(
    source: torch.Tensor,
    rows: str | None,
    row_pair: Extent,
    column_pair: Extent,
    fill: int,
    pack: Repack,
    in_place: bool,
) -> torch.Tensor:
    """One tensor [E, rows, columns]; the pairs are (true, padded), rows those of one half where
    there are two.
    """
    halves = 2 if rows else 1
    (true_rows, padded_rows), (columns, padded_columns) = row_pair, column_pair
    prepared_shape = (source.shape[0], halves * padded_rows, padded_columns)
    if source.element_size() == 1:
        source = source.view(torch.uint8)
    if (
        in_place
        and rows is None
        and pack is same_bytes
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


def restore_weights(p: PreparedExperts, experts: slice = slice(None)) -> ExpertWeights:
    """The checkpoint's tensors again, of some experts or all: new, at their true sizes, bit for bit
    (scales as uint8).
    """
    prepared = {"w13": p.w13, "w2": p.w2, "w13_scale": p.w13_scale, "w2_scale": p.w2_scale}
    if p.w13_bias is not None and p.w2_bias is not None:
        prepared |= {"w13_bias": p.w13_bias, "w2_bias": p.w2_bias}
    return restore_tensors(prepared, p.shape, p.family, p.layout, p.weight_dtype, experts)


def restore_in_place(p: PreparedExperts) -> ExpertWeights:
    """The checkpoint's tensors again, in the prepared ones' own memory, for a loader to overwrite
    some or all of.

    The inverse of preparing what `allocate_weights` gave: the same addresses, shapes and bytes
    (scales as uint8), neutral beyond the true sizes. Until prepared again the memory is no
    kernel's: nothing may run it meanwhile. Extra memory: a few experts at a time.
    """
    e, rows, half_h = p.w13.shape
    h, i = 2 * half_h, rows // 2
    w = ExpertWeights(
        w13=p.w13.view(p.weight_dtype),
        w2=p.w2.view(p.weight_dtype),
        w13_scale=p.w13_scale.view(e, rows, h // BLOCK),
        w2_scale=p.w2_scale.view(e, h, i // BLOCK),
        w13_bias=p.w13_bias,
        w2_bias=p.w2_bias,
        hidden_size=p.shape.hidden_size,
        intermediate_size=p.shape.intermediate_size,
    )
    for part in expert_chunks(p.w13):
        restored = restore_weights(p, part)
        for name, source in restored.tensors().items():
            target = getattr(w, name)[part]
            target.fill_(NEUTRAL_SCALE if name.endswith("scale") else 0)
            split = name.startswith("w13")
            pairs = zip(
                gate_and_up(target, p.family.rows),
                gate_and_up(source, p.family.rows),
                strict=True,
            )
            for place, piece in pairs if split else [(target, source)]:
                place[tuple(slice(n) for n in piece.shape)] = piece
    return w
