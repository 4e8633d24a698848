"""Running a table: every cell's recipe in a folder of its own, one after the other, then a table over the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.recipe.job import run, sayer
from ffnkit.recipe.results import Results
from ffnkit.recipe.tables import Table

if TYPE_CHECKING:
    from ffnkit.report.across import Across


def run_table(table: Table, out: str | Path, progress: bool = True, **how: Any) -> dict[str, Results | FfnkitError]:
    """Run what is missing of every cell in ``out/CELL``; a cell that cannot run leaves the others alone.

    Where there are several tasks, ``out/MODEL`` gets one table over them, as :func:`ffnkit.report.across.across` makes.

    Args:
        how: ``restart``, ``remeasure``, ``isolate``, ``jobs``, ``threads`` and ``ray`` of :func:`ffnkit.recipe.run`.

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
    from ffnkit.report.pages import write

    for model in table.rows:
        if (whole := over_tasks(table, found, out, model)) is not None:
            write(Path(out) / model, whole)
    return found


def over_tasks(table: Table, found: Mapping[str, Results | FfnkitError], out: str | Path, model: str) -> Across | None:
    """The table over a model's tasks; None where fewer than two have results."""
    from ffnkit.report.across import across

    done = [Path(out) / cell for cell in table.rows[model] if _finished(found.get(cell))]
    return across(done) if len(done) > 1 else None


def _finished(found: Results | FfnkitError | None) -> bool:
    return isinstance(found, Results) and any(row["status"] == "done" for row in found.rows)
