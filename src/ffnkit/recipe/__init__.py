"""The main job: a YAML recipe of arms and seeds on one task, or a table of such recipes, run as resumable units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffnkit.recipe.job import run
    from ffnkit.recipe.loading import load_any, load_recipe, quickstart
    from ffnkit.recipe.many import run_table
    from ffnkit.recipe.results import Results
    from ffnkit.recipe.schema import Recipe
    from ffnkit.recipe.tables import Table

__all__ = ["Recipe", "Results", "Table", "load_any", "load_recipe", "quickstart", "run", "run_table"]
_HOMES = {
    "Recipe": "schema",
    "Results": "results",
    "Table": "tables",
    "load_any": "loading",
    "load_recipe": "loading",
    "quickstart": "loading",
    "run": "job",
    "run_table": "many",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
