"""The choice among what was tuned: on dev, then timed, exported, and reported once on rows that chose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ffnkit
from ffnkit.search.state import spec_of, write_rows

if TYPE_CHECKING:
    from ffnkit.search.job import Run

LAST = 6  # of those that keep enough, so many are timed
Row = dict[str, Any]


def results(run: Run) -> dict[str, Any]:
    """Everything that a search found; the chosen model is exported."""
    rows: list[Row] = []
    for number, found in run.folder.candidates().items():
        row = {"number": number, "name": str(spec_of(found)), **found}
        if (tuned := run.folder.newest(number, run.settings.rungs)) is not None:
            row |= {"tuned": tuned, "enough": run.enough(tuned)}
        rows.append(row)
    original = dict(run.first)
    good = sorted((row for row in rows if row.get("enough")), key=lambda row: (row["size"], row["number"]))
    if good and run.settings.objective == "latency":
        good = good[:LAST]
        original["latency_s"] = timed(run, good)
        good = sorted((row for row in good if row["latency"] < 1), key=lambda row: row["latency"])
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "metric": run.ground.metric,
        "floor": run.floor,
        "chosen": _told(run, good[0], original) if good else None,
        "timing": timing(run),
        "original": original,
        "candidates": rows,
    }


def timed(run: Run, rows: list[Row]) -> float:
    """Seconds of a batch of the original; the rows get ``latency_s`` and, to the original's, ``latency`` with its
    quartiles over the rounds.

    All are measured in turn, after everything else.
    """
    from ffnkit.recipe.timing import batch_for
    from ffnkit.report.measure import latencies

    how = run.recipe.measure
    models = {"original": run.original}
    models |= {str(row["number"]): run.ground.open(_checkpoint(run, row)) for row in rows}
    taken = latencies(models, batch_for(run.original, how.batch_size, how.length), repeats=how.repeats)
    for row in rows:
        ratio = taken.ratios[str(row["number"])]
        row["latency"], row["latency_quartiles"] = ratio.median, [ratio.lower, ratio.upper]
        row["latency_s"] = taken.seconds[str(row["number"])].median
    return float(taken.seconds["original"].median)


def timing(run: Run) -> dict[str, Any]:
    """How latencies are measured."""
    import torch

    how = run.recipe.measure
    plain = {"batch_size": how.batch_size, "length": how.length, "repeats": how.repeats}
    return plain | {"threads": torch.get_num_threads(), "device": run.ground.device.type}


def _checkpoint(run: Run, row: Row) -> Path:
    return run.folder.model(row["number"], row["tuned"]["rung"])


def _told(run: Run, row: Row, first: Row) -> Row:
    """The chosen one, exported, with its figures on the split that nothing was chosen on; ``first``: the original's."""
    from ffnkit.search.pages import card

    model = run.ground.open(_checkpoint(run, row))
    original, scored = run.ground.scored(run.original, "report"), run.ground.scored(model, "report")
    write_rows(run.folder.out / "original-report.npz", original.rows)
    kept, low = run.kept(scored.value, scored.rows, "report", original.value)
    chosen = row | {"report": {"value": scored.value, "original": original.value, "kept": kept, "low": low}}
    first["latency_s"] = timed(run, [chosen])  # again where the clock chose it: the fastest of several flatters
    for form, write in (("compact", ffnkit.save), ("standard", ffnkit.export)):
        text = card(run, model, chosen, form)
        write(model, run.folder.out / "model" / form, tokenizer=run.ground.tokenizer, card=text)
    return chosen
