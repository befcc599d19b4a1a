"""Prepare a layer's experts: from a checkpoint's tensors to what a kernel reads."""

import torch

from hopper_mxfp4 import env
from hopper_mxfp4.arrange import fits_in_place, prepare_tensors
from hopper_mxfp4.checkpoint.families import CheckpointFamily
from hopper_mxfp4.checkpoint.swiglu import SwiGLU
from hopper_mxfp4.checkpoint.weights import (
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    ExpertWeights,
    check_greatest_scale,
    check_least_scale,
    check_scale_spread,
    check_weights,
    round_up,
)
from hopper_mxfp4.contract import (
    BLOCK,
    GREATEST_SCALE,
    NEUTRAL_SCALE,
    Kernel,
    KernelUnavailable,
    LayerShape,
    PreparedExperts,
)
from hopper_mxfp4.kernels.jit import ahead
from hopper_mxfp4.kernels.select import activations_asked, choose_kernel, reason_against
from hopper_mxfp4.scratch import device_guard


def _serving(
    kernel: str | Kernel,
    shape: LayerShape,
    device: torch.device,
    activations: str,
    deterministic: bool | None = None,
) -> Kernel:
    """The kernel of that name, or the one given, once it has said that it can serve the layer.

    deterministic: as in `choose_kernel`.
    """
    if isinstance(kernel, str):
        return choose_kernel(
            kernel, shape, device, deterministic=deterministic, activations=activations
        )
    if deterministic is None:
        deterministic = env.DETERMINISTIC.enabled() or env.BATCH_INVARIANT.enabled()
    reason = reason_against(kernel, shape, device, deterministic, activations)
    if reason is not None:
        raise KernelUnavailable(f"kernel {kernel.name} can't run: {reason}")
    return kernel


def _begin_compiling(kernel: Kernel, shape: LayerShape) -> None:
    compilations = getattr(kernel, "compilations", lambda shape: ())
    for compilation in compilations(shape):
        ahead.begin(compilation)


def allocate_weights(
    shape: LayerShape,
    *,
    family: CheckpointFamily,
    device: torch.device | str,
    kernel: str | Kernel = "auto",
    weight_dtype: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.uint8,
    activations: str | None = None,
) -> ExpertWeights:
    """Weights at the kernel's padded size, for a loader to fill, so that `prepare_experts` works in
    place.

    Weights (uint8 or int8) and biases are zero, scales (uint8 or float8_e8m0fnu) 1.0. Copy the
    checkpoint's tensors into the leading corner of each; for a family whose rows are ``gate_up``,
    gate from row 0 on and up from the middle row on.

    Raises ValueError for another dtype or sizes that no layer has, and KernelUnavailable or
    ValueError for the kernel as `prepare_experts` does.
    """
    sizes = (shape.hidden_size, shape.intermediate_size)
    if shape.num_experts < 1 or any(n < 1 or n % BLOCK for n in sizes):
        raise ValueError(
            f"{shape} is no layer; give at least one expert and sizes that are positive multiples "
            f"of {BLOCK}"
        )
    for argument, dtype, wanted in (
        ("weight_dtype", weight_dtype, WEIGHT_DTYPES),
        ("scale_dtype", scale_dtype, SCALE_DTYPES[:2]),
    ):
        if dtype not in wanted:
            raise ValueError(f"{argument} is {dtype}; give {' or '.join(map(str, wanted))}")
    device = torch.device(device)
    serving = _serving(kernel, shape, device, activations_asked(activations))
    _begin_compiling(serving, shape)
    multiple = serving.layout(device).multiple
    e, h, i = (
        shape.num_experts,
        round_up(shape.hidden_size, multiple),
        round_up(shape.intermediate_size, multiple),
    )

    def scale(rows: int, k: int) -> torch.Tensor:
        return torch.full(
            (e, rows, k // BLOCK), NEUTRAL_SCALE, dtype=torch.uint8, device=device
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
    kernel: str | Kernel = "auto",
    ep_size: int = 1,
    deterministic: bool | None = None,
    batch_invariant: bool | None = None,
    activations: str | None = None,
) -> PreparedExperts:
    """Turn a checkpoint's tensors into what a kernel reads, on their device.

    kernel: a registered kernel's name; or "auto" for the fastest that can serve this layer on this
    device: native on a Hopper GPU, reference on a CPU; or a kernel that `choose_kernel` gave.
    ep_size: over how many ranks a token's experts are spread, w's being one rank's. Changes no
    result: which kernel is the faster depends on how many of a call's pairs of token and expert are
        of this rank.
    deterministic: equal calls give equal bytes. batch_invariant: also, a token's bytes do not
        depend on the tokens beside it.
    activations: "bf16": tokens are multiplied as they come; or "fp8": quantised, as
        `reference_moe` says, which changes results by some per cent.
    None: what HOPPER_MXFP4_DETERMINISTIC, HOPPER_MXFP4_BATCH_INVARIANT and HOPPER_MXFP4_ACTIVATIONS
    say.

    Where all tensors are contiguous and already have the padded size (as `allocate_weights` makes
    them, or where H and I need no padding) they are repacked in place: w is consumed, its tensors
    hold the kernel's bytes at the same addresses, and nothing else is allocated but two chunks of
    at most 16 MiB or one expert each. Otherwise w is left alone and the result is new.

    Raises ValueError where a tensor is not as `ExpertWeights` and the family say or the kernel's
    name is unknown, and KernelUnavailable, with the reason, where the kernel can't serve the layer;
    both before anything is changed.
    """
    given, w = w, check_weights(w, family)
    if batch_invariant is None:
        batch_invariant = env.BATCH_INVARIANT.enabled()
    if deterministic is None:
        deterministic = env.DETERMINISTIC.enabled()
    deterministic |= batch_invariant
    activations = activations_asked(activations)
    chosen = _serving(kernel, w.shape, w.w13.device, activations, deterministic)
    _begin_compiling(chosen, w.shape)
    with device_guard(w.w13.device):
        return _prepare(
            given,
            w,
            family,
            swiglu,
            chosen,
            ep_size,
            deterministic,
            batch_invariant,
            activations,
        )


def _prepare(
    given: ExpertWeights,
    w: ExpertWeights,
    family: CheckpointFamily,
    swiglu: SwiGLU,
    chosen: Kernel,
    ep_size: int,
    deterministic: bool,
    batch_invariant: bool,
    activations: str,
) -> PreparedExperts:
    layout = chosen.layout(w.w13.device)
    if layout.least_scale:
        check_least_scale(w, family, chosen.name, layout.least_scale)
    if layout.greatest_scale < GREATEST_SCALE:
        check_greatest_scale(w, family, chosen.name, layout.greatest_scale)
    if layout.greatest_spread < GREATEST_SCALE:
        check_scale_spread(w, family, chosen.name, layout.greatest_spread)

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
        activations=activations,
    )
    chosen.warm_up(p)
    return p
