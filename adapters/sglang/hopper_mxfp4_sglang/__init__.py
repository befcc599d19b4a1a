"""The SGLang adapter: HOPPER_MXFP4=on|auto, or `--moe-runner-backend hopper_mxfp4`.

The second is for SGLangs that take names of backends from outside, 0.5.19 and later.
"""

import logging
import pkgutil
from collections.abc import Callable
from typing import Any

from hopper_mxfp4 import env

logger = logging.getLogger(__name__)


def register() -> None:
    """SGLang's entry point.

    Called once in every process it starts, before arguments are parsed and before any CUDA call.

    SGLang logs what a plugin raises and goes on without it. So a failure is a SystemExit with
    HOPPER_MXFP4=on, as is a value that is not one of its choices, and a line in the log with auto;
    otherwise it is raised.
    """
    try:
        mode = env.MODE.read()
    except ValueError as error:
        raise SystemExit(f"hopper-mxfp4: {error}") from error
    try:
        install()
    except Exception as error:
        reason = (
            f"the plugin hopper-mxfp4 failed ({type(error).__name__}: {error}); "
            "`hopper-mxfp4 check` looks into it"
        )
        if mode == "on":
            raise SystemExit(
                f"{reason}, or unset {env.MODE.name} to serve with stock SGLang"
            ) from error
        if mode != "auto":
            raise
        logger.warning("%s; SGLang stays stock", reason)


def install() -> None:
    """Put the hooks in place in this process. More than once is as good as once.

    For what never loads SGLang's plugins (a Ray actor, bench_one_batch): call it before the model
    is made. What the layers then do is up to HOPPER_MXFP4 and the command line.

    Raises whatever SGLang's imports raise, and RuntimeError where SGLang did not apply a hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # This imports all that is hooked; SGLang's registry would hide why it could not.
    from .hooks import BEFORE, hooks, offer_backend

    missing = {
        target: hook
        for target, hook in hooks().items()
        if not holds(pkgutil.resolve_name(target), hook)
    }
    for target, hook in missing.items():
        HookRegistry.register(target, hook, HookType.BEFORE if hook in BEFORE else HookType.AFTER)
    HookRegistry.apply_hooks()  # now: load_plugins does it later, and only logs a failure
    failed = [
        target for target, hook in missing.items() if not holds(pkgutil.resolve_name(target), hook)
    ]
    if failed:
        raise RuntimeError(
            f"SGLang did not apply the hooks on {', '.join(failed)}; another plugin may have come "
            "first: see SGLANG_PLUGINS"
        )
    offer_backend()


def holds(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether a function is SGLang's wrapper around that hook, or a wrapper of one."""
    while function is not None:
        if any(cell.cell_contents is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def check() -> str:
    """For `hopper-mxfp4 check`: load the plugins as SGLang does and say what came of it.

    Raises RuntimeError if ours was not loaded.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from .hooks import hooks, offer_backend

    if not all(holds(pkgutil.resolve_name(target), hook) for target, hook in hooks().items()):
        register()  # for the reason, which load_plugins only logged
        raise RuntimeError("SGLang loaded its plugins without this one")
    flag = ", or --moe-runner-backend hopper_mxfp4" if offer_backend() else ""
    return f"plugin loads; switch it on with {env.MODE.name}=on{flag}"
