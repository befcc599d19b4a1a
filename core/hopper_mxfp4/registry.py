"""The one PluginManager. The package's own families and kernels are plugins too, loaded by name.

It imports nothing that is registered in it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from hopper_mxfp4 import hookspecs
from hopper_mxfp4.hookspecs import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from hopper_mxfp4.checkpoint.families import CheckpointFamily
    from hopper_mxfp4.contract import Kernel


@dataclass(frozen=True)
class Adapter:
    """How a framework finds this package, for `hopper-mxfp4 check` and `demo`.

    framework: the framework's import name.
    distributions: the distributions that may hold it.
    group, entry_point: where the framework looks for plugins and under which name ours stands.
    allowlist: the environment variable that limits which plugins the framework loads; all_allowed:
        its values that don't.
    switch: what a user types to turn it on.
    demo: a module that is run with a job file, see demo.py; None if there is none.
    baselines: a module whose BASELINES are the framework's own kernels, for `hopper-mxfp4 bench`,
        see bench/baselines.py; importing it must not import the framework. None if there is none.
    engine: a module that is run with a job file and times a whole model, for `hopper-mxfp4 bench
        --engine`, see bench/engine.py; None if there is none.
    check: "module:function" that loads the plugin as the framework does and says what came of it,
        or raises with the reason; None to call the entry point and no more.
    """

    framework: str
    distributions: tuple[str, ...]
    group: str
    entry_point: str
    allowlist: str
    switch: str
    demo: str | None = None
    baselines: str | None = None
    engine: str | None = None
    check: str | None = None
    all_allowed: tuple[str | None, ...] = (None,)


manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
manager.add_hookspecs(hookspecs)
DEFAULT_PLUGINS = ("hopper_mxfp4.builtins",)  # modules; they register first
_loaded = False


def _collect(hook: str, key: Callable[[Any], str]) -> dict[str, Any]:
    """Everything the plugins register through a hook, by name; built-ins first, a name taken twice
    is an error.
    """
    global _loaded
    if not _loaded:
        for module in DEFAULT_PLUGINS:
            if not manager.has_plugin(module):  # an entry point that raised may have come after
                manager.register(importlib.import_module(module), name=module)
        manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
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


def config_get(config: Any, name: str, default: Any = None) -> Any:
    """A field of a Hugging Face config, which may be an object or a dict."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def family_for(hf_config: Any) -> "CheckpointFamily":
    """The family that a model's Hugging Face config (object or dict) belongs to.

    Raises ValueError, with the model_type seen and those known, if no registered family claims it.
    """
    model_type = config_get(hf_config, "model_type")
    known = families()
    for family in known.values():
        if model_type in family.model_types:
            return family
    types = sorted(t for f in known.values() for t in f.model_types)
    raise ValueError(
        f"no checkpoint family for model_type {model_type!r}; known are {', '.join(types)}"
    )
