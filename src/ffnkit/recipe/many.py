"""Running a table: every cell's recipe in a folder of its own, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.job import run, sayer
from ffnkit.recipe.results import Results
from ffnkit.recipe.tables import Table


def run_table(table: Table, out: str | Path, progress: bool = True, **how: Any) -> dict[str, Results | FfnkitError]:
    """Run what is missing of every cell in ``out/CELL``; a cell that cannot run leaves the others alone.

    Args:
        how: ``restart``, ``remeasure`` and ``isolate`` of :func:`ffnkit.recipe.run`.

    Returns:
        By cell its results, or why it has none.
    """
    say = sayer(progress)
    found: dict[str, Results | FfnkitError] = {}
    for number, (name, recipe) in enumerate(table.cells.items(), 1):
        say(f"== {name} ({number} of {len(table.cells)})")
        try:
            found[name] = run(recipe, Path(out) / name, progress, **how)
        except FfnkitError as error:
            say(f"  cannot run: {error}")
            found[name] = error
    return found
