"""One MoE layer's expert weights as a checkpoint holds them, and every check on them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch

from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.contract import BLOCK, LayerShape

CHUNK_BYTES = (
    16 << 20
)  # tensors are checked and repacked in slices of whole experts of about this size
_E8M0_NAN = 255
WEIGHT_DTYPES = (torch.uint8, torch.int8)
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "w13": WEIGHT_DTYPES,
    "w2": WEIGHT_DTYPES,
    "w13_scale": SCALE_DTYPES,
    "w2_scale": SCALE_DTYPES,
    "w13_bias": (torch.bfloat16,),
    "w2_bias": (torch.bfloat16,),
}


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts, exactly as the checkpoint has them: this rank's shard.

    With E local experts, H = hidden size and I = intermediate size of this shard:

    w13 [E, 2I, H/2] uint8 or int8: two e2m1 values a byte, low nibble first; rows ordered as the
    family says. w2 [E, H, I/2] uint8 or int8.
    w13_scale [E, 2I, H/32], w2_scale [E, H, I/32]: E8M0 as uint8 or float8_e8m0fnu, or float32
    powers of two. w13_bias [E, 2I], w2_bias [E, H] bfloat16, both or neither; w13_bias's rows are
    ordered like w13's.

    hidden_size, intermediate_size: the true H and I where the tensors are allocated larger (see
    `allocate_weights`). Whatever lies beyond them is ignored.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    consumed: bool = field(
        default=False, init=False
    )  # prepared in place: the tensors hold a kernel's bytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}

    @property
    def shape(self) -> LayerShape:
        """The true sizes (of checked weights)."""
        return LayerShape(
            self.w13.shape[0],
            self.w2.shape[1] if self.hidden_size is None else self.hidden_size,
            self.w13.shape[1] // 2 if self.intermediate_size is None else self.intermediate_size,
        )


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def expert_chunks(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension, each of whole experts and about CHUNK_BYTES."""
    per_expert = max(tensor[0].numel() * tensor.element_size(), 1)
    step = max(CHUNK_BYTES // per_expert, 1)
    for start in range(0, tensor.shape[0], step):
        yield slice(start, min(start + step, tensor.shape[0]))


def scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes of a checked scale tensor; a view unless it is float32."""
    if scale.dtype != torch.float32:
        return scale.view(torch.uint8)
    # A float32's exponent field has E8M0's bias; 2**-127 is subnormal, with field 0, as E8M0 wants.
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def check_weights(w: ExpertWeights, family: CheckpointFamily) -> ExpertWeights:
    """Check everything about w, changing nothing, and return it detached from autograd.

    Raises ValueError in one sentence that names the tensor, what was seen and what was wanted.
    """
    if w.consumed:
        raise ValueError(
            "these weights were prepared in place and now hold the kernel's bytes; take the "
            "checkpoint's from restore_weights, "
            "or wrap newly loaded tensors in new ExpertWeights"
        )
    _check_presence(w, family)
    detached = {name: t.detach() for name, t in w.tensors().items()}
    w = ExpertWeights(**detached, hidden_size=w.hidden_size, intermediate_size=w.intermediate_size)
    _check_shapes(w)
    for name in ("w13_scale", "w2_scale"):
        _check_scale(name, getattr(w, name), _inside(w, name, family))
    for name in ("w13_bias", "w2_bias"):
        bias = getattr(w, name)
        if bias is not None:
            _refuse_first(
                name,
                bias,
                ~torch.isfinite(bias) & _inside(w, name, family)[:, 0],
                "give finite biases",
            )
    return w


def _check_presence(w: ExpertWeights, family: CheckpointFamily) -> None:
    for name in ("w13_bias", "w2_bias"):
        if family.bias and getattr(w, name) is None:
            raise ValueError(
                f"{name} is missing; {family.name} checkpoints have a bias for each expert, so "
                "give both"
            )
        if not family.bias and getattr(w, name) is not None:
            raise ValueError(
                f"{name} is given, but {family.name} experts have no bias; leave it None or use "
                "the right family"
            )
    for name in _DTYPES:
        value, optional = getattr(w, name), name.endswith("bias")
        if not isinstance(value, torch.Tensor) and not (optional and value is None):
            raise ValueError(f"{name} is {type(value).__name__}; give a torch.Tensor")


def _check_shapes(w: ExpertWeights) -> None:
    tensors = w.tensors()
    for name, t in tensors.items():
        rank = 2 if name.endswith("bias") else 3
        if t.dim() != rank:
            raise ValueError(
                f"{name} has shape {list(t.shape)}; give {rank} dimensions, experts first"
            )
    for name, t in tensors.items():
        if t.dtype not in _DTYPES[name]:
            raise ValueError(
                f"{name} is {t.dtype}; give {' or '.join(str(d) for d in _DTYPES[name])}"
            )
        if t.device != w.w13.device:
            raise ValueError(
                f"{name} is on {t.device} but w13 on {w.w13.device}; put all tensors of a layer on "
                "one device"
            )
    if w.w13.is_meta:
        raise ValueError("w13 is on the meta device, without data; load the weights first")
    e, rows, half_h = w.w13.shape
    h, i = 2 * half_h, rows // 2
    if e == 0:
        raise ValueError(
            f"w13 has shape {list(w.w13.shape)}, no expert; give at least one local expert"
        )
    if h == 0 or h % BLOCK:
        raise ValueError(
            f"w13 has shape {list(w.w13.shape)}, so hidden size {h}; give a positive multiple of "
            f"{BLOCK}"
        )
    if rows == 0 or rows % (2 * BLOCK):
        raise ValueError(
            f"w13 has {rows} rows, so intermediate size {rows / 2:g}; give a positive multiple of "
            f"{BLOCK}"
        )
    wanted_shapes = {
        "w13": [e, 2 * i, h // 2],
        "w2": [e, h, i // 2],
        "w13_scale": [e, 2 * i, h // BLOCK],
        "w2_scale": [e, h, i // BLOCK],
        "w13_bias": [e, 2 * i],
        "w2_bias": [e, h],
    }
    for name, t in tensors.items():
        if list(t.shape) != wanted_shapes[name]:
            raise ValueError(
                f"{name} has shape {list(t.shape)}; w13 of shape {list(w.w13.shape)} wants "
                f"{wanted_shapes[name]}"
            )
    for name, true, allocated in (
        ("hidden_size", w.hidden_size, h),
        ("intermediate_size", w.intermediate_size, i),
    ):
        if true is not None and not (0 < true <= allocated and true % BLOCK == 0):
            raise ValueError(
                f"{name} is {true}; give a positive multiple of {BLOCK} up to the {allocated} that "
                "the tensors hold"
            )


def _inside(w: ExpertWeights, name: str, family: CheckpointFamily) -> torch.Tensor:
    """bool [rows, columns]: which elements of an expert's scale or bias (one column) are within the
    true sizes.
    """
    t, s = getattr(w, name), w.shape
    row = torch.arange(t.shape[1], device=t.device)
    if name.startswith("w2"):
        row_ok, k = row < s.hidden_size, s.intermediate_size
    else:
        row_in_half = row // 2 if family.rows == "interleaved" else row % (t.shape[1] // 2)
        row_ok, k = row_in_half < s.intermediate_size, s.hidden_size
    columns = torch.arange(1 if t.dim() == 2 else t.shape[2], device=t.device)
    return row_ok[:, None] & (columns < k // BLOCK)


def _check_scale(name: str, scale: torch.Tensor, inside: torch.Tensor) -> None:
    for part in expert_chunks(scale):
        chunk = scale[part]
        if scale.dtype == torch.float32:
            bits = chunk.view(torch.int32)
            normal = (bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 0x7F800000)
            bad = ~(normal | (bits == 0x400000))  # the last is 2**-127, E8M0's smallest
            wanted = "give an exact power of two from 2**-127 to 2**127"
        else:
            bad = chunk.view(torch.uint8) == _E8M0_NAN
            wanted = "which is NaN in E8M0; give a byte from 0 to 254"
            chunk = chunk.view(torch.uint8)
        _refuse_first(name, chunk, bad & inside, wanted, first_expert=part.start)


def check_least_scale(w: ExpertWeights, family: CheckpointFamily, kernel: str, least: int) -> None:
    """Check, of checked weights, that a group whose scale byte is below least is all zeros, as
    quantisers leave dead groups.

    Raises ValueError that names the first other one and the kernel.
    """
    for name in ("w13_scale", "w2_scale"):
        scale, weight = getattr(w, name), getattr(w, name.removesuffix("_scale"))
        inside = _inside(w, name, family)
        for part in expert_chunks(scale):
            if not (scale_bytes(scale[part]) < least).any():
                continue
            # Rare: the weights themselves, in smaller chunks, since they are sixteen times as
            # large.
            for small in expert_chunks(weight[part]):
                found = scale_bytes(scale[part][small])
                codes = weight[part][small].view(torch.uint8) & 0x77  # a zero may have a sign
                bad = (found < least) & codes.unflatten(-1, (-1, BLOCK // 2)).any(-1).bool()
                wanted = (
                    f"which kernel {kernel} takes for a scale of zero, and the group's weights are "
                    "not zero; use kernel='reference'"
                )
                _refuse_first(
                    name, found, bad & inside, wanted, first_expert=part.start + small.start
                )


def check_greatest_scale(
    w: ExpertWeights, family: CheckpointFamily, kernel: str, greatest: int
) -> None:
    """Check, of checked weights, that no scale byte is above greatest.

    Raises ValueError that names the first one and the kernel.
    """
    for name in ("w13_scale", "w2_scale"):
        scale, inside = getattr(w, name), _inside(w, name, family)
        for part in expert_chunks(scale):
            found = scale_bytes(scale[part])
            wanted = (
                f"an E8M0 byte above {greatest}, which kernel {kernel} cannot multiply by exactly; "
                "use kernel='reference'"
            )
            _refuse_first(name, found, (found > greatest) & inside, wanted, first_expert=part.start)


def check_scale_spread(
    w: ExpertWeights, family: CheckpointFamily, kernel: str, greatest: int
) -> None:
    """Check, of checked weights, that no two scale bytes of a row are farther apart than that.

    Raises ValueError that names the first row where they are and the kernel.
    """
    for name in ("w13_scale", "w2_scale"):
        scale, inside = getattr(w, name), _inside(w, name, family)
        rows = inside.any(1)
        for part in expert_chunks(scale):
            found = scale_bytes(scale[part])
            # Columns within the true size are the first ones, in every row that is.
            found = found[..., : int(inside.any(0).sum())].int()
            least, most = found.aminmax(dim=-1)
            bad = (most - least > greatest) & rows
            if bad.any():
                e, row = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}[{part.start + e}, {row}] has E8M0 bytes from {least[e, row]} to "
                    f"{most[e, row]}; kernel {kernel} multiplies exactly where those of a row are "
                    f"at most {greatest} apart, so use activations='bf16' or kernel='reference'"
                )


def _refuse_first(
    name: str, values: torch.Tensor, bad: torch.Tensor, wanted: str, first_expert: int = 0
) -> None:
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = values[tuple(where)].item()
        where[0] += first_expert
        raise ValueError(f"{name}{where} is {value}; {wanted}")
