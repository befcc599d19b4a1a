"""Stands in for torchvision, which SGLang's image processors import and no text model uses.

The published wheels need the CUDA build of torch of the same day: beside a CPU torch they bring
gigabytes or fail to load. Here any submodule imports, and any name in it is a class that has any
attribute.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.modules[__name__].__class__ = StandIn
__path__: list[str] = []
sys.meta_path.insert(0, Finder())
