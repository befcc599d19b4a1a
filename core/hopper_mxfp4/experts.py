"""Prepare a layer's experts once, then run them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from . import env
from .families import CheckpointFamily
from .kernels import WORKSPACE_ALIGNMENT, Call, Kernel, Run, in_parts, remember
from .kernels.policy import choose_kernel
from .layout import (
    NEUTRAL_SCALE,
    Layout,
    fits_in_place,
    gate_and_up,
    prepare_tensors,
    restore_tensors,
)
from .swiglu import SwiGLU
from .weights import (
    GROUP,
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    ExpertWeights,
    LayerShape,
    check_least_scale,
    check_weights,
    expert_chunks,
    round_up,
)
from .workspace import current_device, on
from .workspace import workspace as own_workspace

_IDS = (torch.int32, torch.int64)
MOST_TOKENS = (
    1 << 14
)  # at a time: bounds scratch memory, and keeps tokens * top-k * columns within a kernel's 32-bit offsets


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """One layer's experts as a kernel reads them. Made by `prepare_experts`; every tensor's first dimension is E.

    shape: the true sizes. weight_dtype: what the checkpoint's weights were.
    With Ip and Hp the padded sizes: w13 [E, 2Ip, Hp/2], w2 [E, Hp, Ip/2] uint8; scales uint8 in the
    layout's shape; w13_bias [E, 2Ip], w2_bias [E, Hp] bf16 or None. w13's rows are [up; gate].
    alpha, beta, limit: SwiGLU's parameters, float32 [E]; limit None where there is no clamp.
    deterministic: equal calls give equal bytes: a token's experts are summed in a fixed order.
    batch_invariant: also, a token's bytes do not depend on the tokens beside it.
    ep_size: over how many ranks a token's experts are spread.
    plans: what kernels keep between calls. ways: how calls run, by (tokens, top-k). Both empty when made.
    """

    kernel: Kernel
    layout: Layout
    family: CheckpointFamily
    swiglu: SwiGLU
    shape: LayerShape
    weight_dtype: torch.dtype
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    alpha: torch.Tensor
    beta: torch.Tensor
    limit: torch.Tensor | None
    deterministic: bool
    batch_invariant: bool = False
    ep_size: int = 1
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    ways: dict[tuple[int, int], "Way"] = field(default_factory=dict, repr=False)

    def reset_constants(self) -> None:
        """Write alpha, beta and limit again, in place.

        For frameworks whose sleep mode drops a layer's memory and then reloads the weights alone.
        """
        for name in ("alpha", "beta", "limit"):
            values, value = getattr(self, name), getattr(self.swiglu, name)
            if values is not None:
                values.fill_(value)

    def restore(self, experts: slice = slice(None)) -> ExpertWeights:
        """The checkpoint's tensors of some experts, new, bit for bit (scales as uint8)."""
        prepared = {
            "w13": self.w13,
            "w2": self.w2,
            "w13_scale": self.w13_scale,
            "w2_scale": self.w2_scale,
        }
        if self.w13_bias is not None and self.w2_bias is not None:
            prepared |= {"w13_bias": self.w13_bias, "w2_bias": self.w2_bias}
        return restore_tensors(
            prepared, self.shape, self.family, self.layout, self.weight_dtype, experts
        )

    def restore_in_place(self) -> ExpertWeights:
        """The checkpoint's tensors again, in the prepared ones' own memory, for a loader to overwrite some or all of.

        The inverse of preparing what `allocate_weights` gave: the same addresses, shapes and bytes (scales
        as uint8), neutral beyond the true sizes. Until prepared again the memory is no kernel's: nothing
        may run it meanwhile. Extra memory: a few experts at a time.
        """
        e, rows, half_h = self.w13.shape
        h, i = 2 * half_h, rows // 2
        w = ExpertWeights(
            w13=self.w13.view(self.weight_dtype),
            w2=self.w2.view(self.weight_dtype),
            w13_scale=self.w13_scale.view(e, rows, h // GROUP),
            w2_scale=self.w2_scale.view(e, h, i // GROUP),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
        )
        for part in expert_chunks(self.w13):
            restored = self.restore(part)
            for name, source in restored.tensors().items():
                target = getattr(w, name)[part]
                target.fill_(NEUTRAL_SCALE if name.endswith("scale") else 0)
                split = name.startswith("w13")
                pairs = zip(
                    gate_and_up(target, self.family.rows),
                    gate_and_up(source, self.family.rows),
                    strict=True,
                )
                for place, piece in pairs if split else [(target, source)]:
                    place[tuple(slice(n) for n in piece.shape)] = piece
        return w


def allocate_weights(
    shape: LayerShape,
    *,
    family: CheckpointFamily,
    device: torch.device | str,
    kernel: str = "auto",
    weight_dtype: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.uint8,
) -> ExpertWeights:
    """Weights at the kernel's padded size, for a loader to fill, so that `prepare_experts` works in place.

    Weights (uint8 or int8) and biases are zero, scales (uint8 or float8_e8m0fnu) 1.0. Copy the
    checkpoint's tensors into the leading corner of each; for a family whose rows are ``gate_up``,
    gate from row 0 on and up from the middle row on.

    Raises ValueError for another dtype or sizes that no layer has, and KernelUnavailable or ValueError for the
    kernel as `prepare_experts` does.
    """
    sizes = (shape.hidden_size, shape.intermediate_size)
    if shape.num_experts < 1 or any(n < 1 or n % GROUP for n in sizes):
        raise ValueError(
            f"{shape} is no layer; give at least one expert and sizes that are positive multiples of {GROUP}"
        )
    for argument, dtype, wanted in (
        ("weight_dtype", weight_dtype, WEIGHT_DTYPES),
        ("scale_dtype", scale_dtype, SCALE_DTYPES[:2]),
    ):
        if dtype not in wanted:
            raise ValueError(f"{argument} is {dtype}; give {' or '.join(map(str, wanted))}")
    device = torch.device(device)
    multiple = choose_kernel(kernel, shape, device).layout(device).multiple
    e, h, i = (
        shape.num_experts,
        round_up(shape.hidden_size, multiple),
        round_up(shape.intermediate_size, multiple),
    )

    def scale(rows: int, k: int) -> torch.Tensor:
        return torch.full(
            (e, rows, k // GROUP), NEUTRAL_SCALE, dtype=torch.uint8, device=device
        ).view(scale_dtype)

    def bias(rows: int) -> torch.Tensor | None:
        return torch.zeros(e, rows, dtype=torch.bfloat16, device=device) if family.bias else None

    return ExpertWeights(
        w13=torch.zeros(e, 2 * i, h // 2, dtype=weight_dtype, device=device),
        w2=torch.zeros(e, h, i // 2, dtype=weight_dtype, device=device),
        w13_scale=scale(2 * i, h),
        w2_scale=scale(h, i),
        w13_bias=bias(2 * i),
        w2_bias=bias(h),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )


def prepare_experts(
    w: ExpertWeights,
    *,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    kernel: str = "auto",
    ep_size: int = 1,
    deterministic: bool | None = None,
    batch_invariant: bool | None = None,
) -> PreparedExperts:
    """Turn a checkpoint's tensors into what a kernel reads, on their device.

    kernel: a registered kernel's name, or "auto" for the fastest that can serve this layer on this
    device: hybrid on a Hopper GPU, reference on a CPU.
    ep_size: over how many ranks a token's experts are spread, w's being one rank's. Changes no result: which kernel is
    the faster depends on how many of a call's pairs of token and expert are no holes here.
    deterministic: equal calls give equal bytes. batch_invariant: also, a token's bytes do not depend on the tokens beside it.
    None: what HOPPER_MXFP4_DETERMINISTIC and HOPPER_MXFP4_BATCH_INVARIANT say.

    Where all tensors are contiguous and already have the padded size (as `allocate_weights` makes
    them, or where H and I need no padding) they are repacked in place: w is consumed, its tensors hold
    the kernel's bytes at the same addresses, and nothing else is allocated but two chunks of at most
    16 MiB or one expert each. Otherwise w is left alone and the result is new.

    Raises ValueError where a tensor is not as `ExpertWeights` and the family say or the kernel's name
    is unknown, and KernelUnavailable, with the reason, where the kernel can't serve the layer; both
    before anything is changed.
    """
    given, w = w, check_weights(w, family)
    if batch_invariant is None:
        batch_invariant = env.BATCH_INVARIANT.enabled()
    if deterministic is None:
        deterministic = env.DETERMINISTIC.enabled()
    deterministic |= batch_invariant
    chosen = choose_kernel(kernel, w.shape, w.w13.device, deterministic=deterministic)
    with on(w.w13.device):
        return _prepare(given, w, family, swiglu, chosen, ep_size, deterministic, batch_invariant)


def _prepare(
    given: ExpertWeights,
    w: ExpertWeights,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    chosen: Kernel,
    ep_size: int,
    deterministic: bool,
    batch_invariant: bool,
) -> PreparedExperts:
    layout = chosen.layout(w.w13.device)
    if layout.least_scale:
        check_least_scale(w, family, chosen.name, layout.least_scale)

    def per_expert(value: float) -> torch.Tensor:
        return torch.full((w.shape.num_experts,), value, dtype=torch.float32, device=w.w13.device)

    in_place = fits_in_place(w, layout)
    if in_place:
        object.__setattr__(given, "consumed", True)  # frozen otherwise
    prepared = prepare_tensors(w, family, layout, in_place)
    p = PreparedExperts(
        kernel=chosen,
        layout=layout,
        family=family,
        swiglu=swiglu,
        shape=w.shape,
        weight_dtype=w.w13.dtype,
        w13=prepared["w13"],
        w2=prepared["w2"],
        w13_scale=prepared["w13_scale"],
        w2_scale=prepared["w2_scale"],
        w13_bias=prepared.get("w13_bias"),
        w2_bias=prepared.get("w2_bias"),
        alpha=per_expert(swiglu.alpha),
        beta=per_expert(swiglu.beta),
        limit=None if swiglu.limit is None else per_expert(swiglu.limit),
        deterministic=deterministic,
        batch_invariant=batch_invariant,
        ep_size=ep_size,
    )
    chosen.load(p)
    return p


def restore_weights(p: PreparedExperts) -> ExpertWeights:
    """The checkpoint's tensors again, new, at their true sizes, bit for bit (scales as uint8)."""
    return p.restore()


def workspace_bytes(p: PreparedExperts, num_tokens: int, top_k: int) -> int:
    """Bytes of scratch that `fused_moe` needs for up to num_tokens tokens of top_k experts."""
    if not num_tokens:
        return 0
    way = p.ways.get((num_tokens, top_k))
    return (
        p.kernel.workspace_bytes(p, min(num_tokens, MOST_TOKENS), top_k)
        if way is None
        else way.nbytes
    )


def reserve_workspace(p: PreparedExperts, num_tokens: int, top_k: int) -> int:
    """Make the core's own scratch large enough for calls of up to num_tokens tokens now; returns the bytes they need.

    For the calling thread and the current stream of p's device, where all layers share it. Without it the
    scratch grows with the largest call so far.
    """
    needed = workspace_bytes(p, num_tokens, top_k)
    own_workspace(p.w13.device, needed)
    return needed


def fused_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    p: PreparedExperts,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output: each token's experts, weighted and summed.

    x [M, H] bf16, any strides, never written; topk_ids [M, K] int32 or int64, local expert ids: those
    < 0 or >= E add nothing, and a row of them alone gives zeros, an expert that a row names twice adds twice;
    topk_weights [M, K] float32, with any routed scaling factor already in them. M may be 0; beyond 16,384 tokens run in parts of so many.
    out: [M, H] bf16 contiguous, to write the result into; must share no memory with x. Returned if given.
    workspace: uint8 [at least `workspace_bytes`] on x's device, for callers that manage their own
    scratch, on a GPU aligned to 256 bytes; calls on different streams must not share one. None: the core's
    own, which all layers share (a buffer a stream and thread; within a CUDA graph, the graph's memory pool).

    No host synchronisation and safe under CUDA graphs, except with the reference kernel.

    Raises ValueError, naming the argument, what it is and what was wanted.
    """
    shape, chosen, device = x.shape, topk_ids.shape, p.w13.device
    # One expression for the common case: a call must cost the host little. What is wrong is found out afterwards.
    if not (
        len(shape) == 2
        and shape[1] == p.shape.hidden_size
        and x.dtype is torch.bfloat16
        and len(chosen) == 2
        and chosen[0] == shape[0]
        and topk_ids.dtype in _IDS
        and topk_weights.shape == chosen
        and topk_weights.dtype is torch.float32
        and x.device == topk_ids.device == topk_weights.device == device
    ):
        _refuse(x, topk_ids, topk_weights, p)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    elif not (
        out.shape == shape
        and out.dtype is torch.bfloat16
        and out.device == device
        and out.is_contiguous()
    ):
        raise ValueError(
            f"out is {_describe(out)}; give contiguous bfloat16 {list(shape)} on {device}"
        )
    elif shape[0] and _overlap(x, out):
        raise ValueError("out shares memory with x, which is never written; give another tensor")
    way = p.ways.get(chosen)
    if way is None:
        if 0 in chosen:  # no tokens, or no experts for any
            return out.zero_()
        with on(device):
            way = _way(p, *chosen)
    needed, run = way
    if workspace is None:
        workspace = own_workspace(device, needed)
    else:
        sized = workspace.dim() == 1 and workspace.is_contiguous() and workspace.numel() >= needed
        if not sized or workspace.dtype != torch.uint8 or workspace.device != device:
            raise ValueError(
                f"workspace is {_describe(workspace)}; give contiguous 1-D uint8 of at least {needed} bytes on {device}"
            )
        if workspace.is_cuda and workspace.data_ptr() % WORKSPACE_ALIGNMENT:
            raise ValueError(
                f"workspace begins at address {workspace.data_ptr():#x}; give one aligned to {WORKSPACE_ALIGNMENT} bytes"
            )
    call = Call(x, topk_ids, topk_weights, out, workspace)
    if (
        device.type != "cuda" or device.index == current_device()
    ):  # a context costs more than to ask
        run(call, p)
    else:
        with on(device):
            run(call, p)
    return out


class Way(NamedTuple):
    """How calls of one number of tokens and top-k run: the scratch they need, and what runs them."""

    nbytes: int
    run: Run


_MOST_WAYS = 1024  # a layer remembers before it starts anew


def _way(p: PreparedExperts, num_tokens: int, top_k: int) -> Way:
    run = in_parts(lambda tokens: p.kernel.runner(p, tokens, top_k), num_tokens, MOST_TOKENS)
    return remember(
        p.ways, (num_tokens, top_k), Way(workspace_bytes(p, num_tokens, top_k), run), _MOST_WAYS
    )


def _refuse(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, p: PreparedExperts
) -> NoReturn:
    """Say what is wrong with a call's inputs."""
    device = p.w13.device
    if (
        x.dim() != 2
        or x.shape[1] != p.shape.hidden_size
        or x.dtype != torch.bfloat16
        or x.device != device
    ):
        raise ValueError(
            f"x is {_describe(x)}; give bfloat16 [tokens, {p.shape.hidden_size}] on {device}"
        )
    m = x.shape[0]
    if (
        topk_ids.dim() != 2
        or topk_ids.shape[0] != m
        or topk_ids.dtype not in _IDS
        or topk_ids.device != device
    ):
        raise ValueError(
            f"topk_ids is {_describe(topk_ids)}; give int32 or int64 [{m}, top_k] on {device}"
        )
    raise ValueError(
        f"topk_weights is {_describe(topk_weights)}; give float32 {list(topk_ids.shape)} on {device}"
    )


def _overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether x's elements lie within the memory that a contiguous out covers."""
    if x.is_contiguous():
        return abs(x.data_ptr() - out.data_ptr()) < out.nbytes  # of the same shape and dtype
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    x_begin, out_begin = x.data_ptr(), out.data_ptr()
    return x_begin < out_begin + out.nbytes and out_begin < x_begin + (last + 1) * x.element_size()


def _describe(t: torch.Tensor) -> str:
    strides = "" if t.is_contiguous() else f" with strides {list(t.stride())}"
    return f"{t.dtype} {list(t.shape)}{strides} on {t.device}".replace("torch.", "")
