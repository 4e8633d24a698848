"""The smallest or fastest model that keeps a share of the metric: proposed, ranked, tuned with growing budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffnkit.search.job import Found, search
    from ffnkit.search.settings import SearchRecipe, SearchSettings

__all__ = ["Found", "SearchRecipe", "SearchSettings", "search"]
_HOMES = {"Found": "job", "search": "job", "SearchRecipe": "settings", "SearchSettings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
