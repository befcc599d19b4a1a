"""Compiling in threads, while a server does other things, such as loading its weights."""

import logging
import threading
from functools import cache

from hopper_mxfp4.contract import Compilation

logger = logging.getLogger(__name__)


@cache
def begin(compilation: Compilation) -> None:
    """Have a thread run it, once a process, so that its result is in the cache when it is needed.
    Whoever needs it sooner waits for it.

    NVRTC compiles without Python's lock. A process ends only when its threads have: NVRTC crashes
    where it is unloaded at work. What fails is only logged: it fails again, and is raised, where it
    is needed.
    """
    threading.Thread(target=_run, args=(compilation,), name="hopper_mxfp4-compile").start()


def _run(compilation: Compilation) -> None:
    try:
        compilation.run()
    except Exception:
        logger.debug("compiling ahead failed", exc_info=True)
