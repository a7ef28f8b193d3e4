"""Registers the format with transformers once that is imported, and does not import it itself.

``import streamcomp`` is all that ``from_pretrained`` needs to load a compressed model, in whatever
order the two are imported. transformers itself takes seconds and hundreds of megabytes to import,
which ``streamcomp --help`` has no use for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_transformers"]

# Holds the table of quantisation methods; every loading of a model imports it.
_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers has its table of quantisation methods already, else with it."""
    if _TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("streamcomp.integrations.transformers")


class _Finder(MetaPathFinder):
    """Finds the table as everyone else does, but with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads with the ``original`` loader, which is also the one that the module gets to see."""

    def __init__(self, original: Loader, finder: _Finder) -> None:
        self._original, self._finder = original, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._original
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        self._original.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()
