"""Which kernel serves a layer."""

import logging

import torch

from hopper_mxfp4 import env
from hopper_mxfp4.contract import ACTIVATIONS, Kernel, KernelUnavailable, LayerShape
from hopper_mxfp4.kernels.support import log_once
from hopper_mxfp4.registry import kernels

logger = logging.getLogger(__name__)


def reason_against(
    kernel: Kernel, shape: LayerShape, device: torch.device, deterministic: bool, activations: str
) -> str | None:
    """Why the kernel can't serve this layer with these activations; None if it can."""
    reason = kernel.unsupported_reason(shape, device, deterministic)
    if reason is None and activations not in kernel.activations:
        does = " or ".join(sorted(kernel.activations))
        return (
            f"it multiplies {does} activations, and {activations} ones are to run here; set "
            f"{env.ACTIVATIONS.name}={does}, or name no kernel"
        )
    return reason


def activations_asked(given: str | None) -> str:
    """One of ACTIVATIONS: what is given, or else what HOPPER_MXFP4_ACTIVATIONS says.

    Raises ValueError for anything else.
    """
    if given is None:
        asked = env.ACTIVATIONS.read()
        return "bf16" if asked == "auto" else asked
    if given not in ACTIVATIONS:
        raise ValueError(f"activations is {given!r}; give {' or '.join(map(repr, ACTIVATIONS))}")
    return given


def choose_kernel(
    name: str,
    shape: LayerShape,
    device: torch.device,
    *,
    deterministic: bool | None = None,
    activations: str | None = None,
) -> Kernel:
    """The kernel of that name, or for "auto" the first registered one meant for this device that
    can serve it.

    deterministic: whether equal calls must give equal bytes; None: what HOPPER_MXFP4_DETERMINISTIC
    and HOPPER_MXFP4_BATCH_INVARIANT say. activations: one of ACTIVATIONS; None: what
    HOPPER_MXFP4_ACTIVATIONS says.
    HOPPER_MXFP4_KERNEL replaces "auto". Raises ValueError for a name nobody registered and
    KernelUnavailable, with each candidate's reason, where none can serve the layer.
    """
    known = kernels()
    if deterministic is None:
        deterministic = env.DETERMINISTIC.enabled() or env.BATCH_INVARIANT.enabled()
    activations = activations_asked(activations)
    asked_by = ""
    if name == "auto":
        name, asked_by = env.KERNEL.read(), f" ({env.KERNEL.name})"
    if name == "auto":
        candidates = [k for k in known.values() if device.type in k.auto_devices]
    elif name in known:
        candidates = [known[name]]
    else:
        raise ValueError(
            f"no kernel is called {name!r}{asked_by}; registered are auto, {', '.join(known)}"
        )
    # Kernels by what stops them: one that is built on another shares its reason.
    reasons: dict[str, list[str]] = {}
    for kernel in candidates:
        reason = reason_against(kernel, shape, device, deterministic, activations)
        if reason is None:
            if reasons:
                log_once(logger, logging.INFO, f"kernel {kernel.name} serves: {_joined(reasons)}")
            return kernel
        reasons.setdefault(reason, []).append(kernel.name)
    if not reasons:
        raise KernelUnavailable(
            f"no kernel is meant for {device.type} tensors; move the weights to a Hopper GPU or "
            "the CPU"
        )
    raise KernelUnavailable(_joined(reasons))


def _joined(reasons: dict[str, list[str]]) -> str:
    return "; ".join(
        f"kernel {' and '.join(names)} can't run: {reason}" for reason, names in reasons.items()
    )
