"""Imported by every Python that ``ffnkit exec`` starts, and by those which that one starts."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def _next() -> None:
    """Run the module of this name that would have been imported otherwise."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path or ".") != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_next()
try:
    import ffnkit  # noqa: F401
except ImportError:  # a tool of another environment
    home = os.environ.get("FFNKIT_HOME", "")
    print(f"ffnkit exec: {sys.executable} has no ffnkit; install it there ({home})", file=sys.stderr)
