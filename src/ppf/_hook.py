"""Tells transformers' AutoConfig of the pruned models at the moment when it is loaded, and not before.

`import ppf` must stay light, so nothing is imported here: a finder waits for `transformers.models.auto.configuration_auto`,
which every auto class needs. That module is often loaded in the midst of others, so only stand-ins are registered then.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers now if AutoConfig is loaded already, else as soon as it is."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("ppf.llm.stand_ins").register_stand_ins()


class _Finder(importlib.abc.MetaPathFinder):
    """Steps aside for every module but one, whose loader it wraps."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then the registration."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
