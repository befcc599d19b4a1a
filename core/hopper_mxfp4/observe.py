"""What tools may ask of the core while it runs: to be told of calls, or to launch nothing.

Benchmarks, demos and tests use it instead of replacing the core's functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hopper_mxfp4.contract import Call, PreparedExperts

Watcher = Callable[["PreparedExperts", "Call"], None]
watchers: tuple[Watcher, ...] = ()
launching = True


def watch(watcher: Watcher) -> Callable[[], None]:
    """Have a function called before each call of `fused_moe` in this process, with the layer and
    the call.

    Replaying a CUDA graph calls nothing. Returns a function that ends it.
    """
    global watchers
    watchers = (*watchers, watcher)

    def end() -> None:
        global watchers
        watchers = tuple(w for w in watchers if w is not watcher)

    return end


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Calls within do all that they do on the host but hand the GPU no kernel, so that the host's
    share can be timed.
    """
    global launching
    launching = False
    try:
        yield
    finally:
        launching = True
