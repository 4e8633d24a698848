"""Import a module right after another one's first import, and tell it of that."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute, then = spec.loader.exec_module, self.then

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _tell(then, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, then: str) -> None:
    """Import the module ``then`` as soon as the module ``name`` has been imported; at once where it has been.

    A function ``imported`` of that module is called with the module ``name``.
    """
    if name in sys.modules:
        _tell(then, sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


def _tell(then: str, module: ModuleType) -> None:
    getattr(import_module(then), "imported", lambda module: None)(module)
