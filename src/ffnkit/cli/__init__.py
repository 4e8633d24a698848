"""The command line. Starting it and printing help import neither torch nor transformers."""

from __future__ import annotations

from ffnkit.cli.app import app, main

__all__ = ["app", "main"]
