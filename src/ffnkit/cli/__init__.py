"""The command line. Starting it and printing help import neither torch nor transformers."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``app`` and ``main`` bring all commands with them, and are there on first use."""
    if name not in ("app", "main"):
        raise AttributeError(f"module 'ffnkit.cli' has no attribute '{name}'")
    from ffnkit.cli import program

    return getattr(program, name)
