"""Compiling in threads, while a server does other things, such as loading its weights."""

import logging
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


@cache
def begin(compile_kernel: Callable[..., Any], *arguments: Hashable) -> None:
    """Have a thread call compile_kernel, once a process, so that its result is in the cache when it
    is needed. Whoever needs it sooner waits for it.

    NVRTC compiles without Python's lock. A process ends only when its threads have: NVRTC crashes
    where it is unloaded at work. What fails is only logged: it fails again, and is raised, where it
    is needed.
    """
    threading.Thread(
        target=_call, args=(compile_kernel, arguments), name="hopper_mxfp4-compile"
    ).start()


def _call(compile_kernel: Callable[..., Any], arguments: tuple[Hashable, ...]) -> None:
    try:
        compile_kernel(*arguments)
    except Exception:
        logger.debug("compiling ahead failed", exc_info=True)
