"""Which FlashInfer is installed, whether it is safe on Hopper, and which layouts it speaks."""

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from hopper_mxfp4 import env
from hopper_mxfp4.contract import BLOCK
from hopper_mxfp4.kernels.flashinfer.layout import UNPACK_SM90_SCALE

INSTALL = "install flashinfer-python>=0.6.18"
OLDEST = Version("0.6.10")  # the first with the helpers that arrange weights and scales
# Arguments of cutlass_fused_moe that came with 0.6.15 and 0.6.16. Those before are unsafe, and run
# where that is allowed.
LATER = frozenset({"use_fused_finalize", "profile_ids", "workspace_buffer"})
# FlashInfer issue 5438: a kernel rewrites TMA descriptors that loads in flight still read, so that
# a tile now and then gets another expert's scales. 0.6.16 brought another main loop, .post3
# reverted it, 0.6.18 brought it back. Half-open ranges, by the version each release's sources hold.
UNSAFE = ((Version("0.6.10"), Version("0.6.16")), (Version("0.6.16.post3"), Version("0.6.18rc2")))


def flashinfer_version() -> Version | None:
    """The installed FlashInfer's version, without importing it; None if there is none."""
    if find_spec("flashinfer") is None:
        return None
    try:
        return Version(metadata.version("flashinfer-python"))
    except metadata.PackageNotFoundError:
        import flashinfer

        return Version(flashinfer.__version__)


def flashinfer_problem() -> str | None:
    """Why the installed FlashInfer can't be used and what to install, in a sentence; None if it
    can.
    """
    version = flashinfer_version()
    if version is None:
        return f"FlashInfer is not installed; {INSTALL}"
    if version < OLDEST:
        return f"FlashInfer {version} is too old; {INSTALL}"
    if is_unsafe(version) and not env.ALLOW_UNSAFE_FLASHINFER.enabled():
        return (
            f"FlashInfer {version} sometimes gives wrong results on Hopper (its issue 5438); "
            f"{INSTALL}, or set {env.ALLOW_UNSAFE_FLASHINFER.name}=1 to run it all the same"
        )
    return None


def is_unsafe(version: Version) -> bool:
    """Whether this FlashInfer release holds the race of its issue 5438."""
    return any(first <= version < fixed for first, fixed in UNSAFE)


def scale_layout(interleave: Callable[..., torch.Tensor]) -> str | None:
    """Which arrangement FlashInfer's scale helper makes: "folded", "by_k", or None for one not
    known.

    Asked of the helper itself on a small tensor, since releases changed it under one name.
    """
    experts, rows, groups = 2, 128, 8  # two blocks each way, so that the order of blocks shows too
    # 251 is prime: no two places that a wrong order could exchange hold the same value
    probe = (
        torch.arange(experts * rows * groups, device="cpu")
        .remainder(251)
        .to(torch.uint8)
        .view(experts, rows, groups)
    )
    packed = interleave(probe, group_size=BLOCK)
    shapes = {
        "folded": (experts, rows // 64, groups // 4, 16, 16),
        "by_k": (experts, groups // 4, rows * 4),
    }
    for name, shape in shapes.items():
        if packed.shape == shape and torch.equal(UNPACK_SM90_SCALE[name](packed), probe):
            return name
    return None


def lacking() -> frozenset[str]:
    """Which of LATER the installed FlashInfer's cutlass_fused_moe does not take. Raises whatever
    importing it raises.
    """
    parameters = inspect.signature(flashinfer_moe().cutlass_fused_moe).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return frozenset() if takes_any else LATER - parameters.keys()


@cache
def flashinfer_moe() -> Any:
    """The module flashinfer.fused_moe. Raises whatever importing it raises."""
    from flashinfer import fused_moe

    return fused_moe


def compiled_module() -> Path | None:
    """The compiled SM90 MoE module that FlashInfer would load, shipped or from its cache; None if
    it would build one.

    Raises ImportError where FlashInfer cannot be imported.
    """
    from flashinfer.jit import env as jit_env

    for name in ("fused_moe_90", "fused_moe_90_h20_prebuilt_d"):
        folders = [
            *getattr(jit_env, "FLASHINFER_AOT_DIRS", [jit_env.FLASHINFER_AOT_DIR]),
            jit_env.FLASHINFER_JIT_DIR,
        ]
        for folder in folders:
            path = Path(folder) / name / f"{name}.so"
            if path.exists():
                return path
    return None


@cache
def module_hash() -> str:
    """16 hex digits of the compiled SM90 MoE module's SHA-256; "none" where there is none yet.

    Raises ImportError where FlashInfer cannot be imported.
    """
    path = compiled_module()
    if path is None:
        return "none"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
