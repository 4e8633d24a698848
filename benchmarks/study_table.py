"""Table and plot of a study for benchmarks/results, those of the report, from one or several runs.

    ffnkit run merging_vit --out runs/merging-vit
    python benchmarks/study_table.py runs/merging-vit --plot --out benchmarks/results/merging_vit

Several folders, say of seeds that ran apart, are read as one study; arms and seeds of the recipe that did not run are
marked so. Writes OUT.md and OUT.json, with --plot OUT.png. Of what is stored the plot alone is drawn anew:

    python benchmarks/study_table.py benchmarks/results/merging_vit.json --plot
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

from ffnkit.io.files import write_text
from ffnkit.recipe.loading import load_recipe
from ffnkit.recipe.schema import Recipe
from ffnkit.report.columns import difference
from ffnkit.report.formats import to_markdown
from ffnkit.report.plot import drawn, heading
from ffnkit.report.table import summarize

KEPT = (
    *("arm", "seed", "metrics", "metrics_before", "dev_metric", "best_step", "steps", "seconds", "peak_memory_bytes"),
    *("parameters", "ffn_parameters", "trainable_parameters", "flops_per_token", "bytes_on_disk_compact", "settings"),
    *("latency_ratio", "latency_ratio_quartiles", "pruning", "neutral_loss", "layers", "parameters_removed"),
    *("updated_parameters", "trainable_body", "trainable_share", "samples_per_second", "steps_per_second"),
    *("learning_rate", "search", "process_memory_bytes", "heads_removed", "neurons_removed", "zeros", "zeros_merged"),
)


def read(folders: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the first run says of itself, and the finished rows of all of them; the first of two alike counts."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    heads = [json.loads((folder / "results.json").read_text()) for folder in folders]
    for head in heads:
        for row in head["rows"]:
            if row.get("status") == "done":
                rows.setdefault((row["arm"], row["seed"]), row)
    return heads[0], list(rows.values())


def compared(recipe: Recipe, rows: list[dict[str, Any]], metric: str, other: str) -> list[str]:
    """Lines of a table: the arms of the size of ``other`` (the name's last part), their paired differences to it."""
    lines = [f"| {metric} to {other} | paired [95%] |", "|:--|--:|"]
    for arm in recipe.arms:
        two = [row for name in (other, arm) for row in rows if row["arm"] == name]
        if arm == other or arm.rpartition("-")[2] != other.rpartition("-")[2] or {r["arm"] for r in two} < {arm, other}:
            continue
        lines.append(f"| {arm} | {difference(summarize(two, metric, arms=[other, arm]).arms[1].difference)} |")
    return lines


def redraw(stored: Path) -> None:
    """The plot of a stored result, beside it."""
    head = json.loads(stored.read_text())
    summary = summarize(head["rows"], next(iter(head["rows"][0]["metrics"])), arms=list(head["recipe"]["arms"]))
    drawn(summary).savefig(stored.with_suffix(".png"), dpi=110)


def main() -> None:
    """Read the runs, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that ffnkit run wrote, or stored results")
    parser.add_argument("--recipe", type=Path, help="the whole study, where the runs hold a part of it")
    parser.add_argument("--out", type=Path, help=f"results without ending [{RESULTS.name}/ and the first run's name]")
    parser.add_argument("--metrics", help="columns, the first is compared, e.g. accuracy,f1 [all of the runs]")
    parser.add_argument(
        "--against", action="append", default=[], help="an arm that those of its size are compared with"
    )
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="an arm of another study")
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    if given.plot and all(path.is_file() for path in given.runs):
        for path in given.runs:
            redraw(path)
        return
    head, rows = read(given.runs)
    recipe = load_recipe(given.recipe) if given.recipe else Recipe.model_validate(head["recipe"])
    renamed = dict(pair.split("=", 1) for pair in given.rename)
    rows = [{**row, "arm": renamed.get(row["arm"], row["arm"])} for row in rows]
    rows = [row for row in rows if row["arm"] in recipe.arms]
    known = list(dict.fromkeys([head["metric"], *(name for row in rows for name in row["metrics"])]))
    metrics = given.metrics.split(",") if given.metrics else known
    out = given.out or RESULTS / given.runs[0].name
    shown = [{**row, "metrics": {name: row["metrics"][name] for name in metrics}} for row in rows]
    summary = summarize(shown, metrics[0], arms=list(recipe.arms))
    lines = [f"# {recipe.name}\n", to_markdown(summary)]
    for other in given.against:
        lines += [*compared(recipe, rows, metrics[0], other), ""]
    if given.plot:
        drawn(summary).savefig(out.with_suffix(".png"), dpi=110)
        lines += [f"![{heading(summary)}]({out.name}.png)", ""]
    machine = rows[0].get("machine", {})
    notes = [
        *filter(None, [recipe.notes]),
        *given.note,
        f"{machine.get('cpu')}, {machine.get('torch_threads')} thread; torch {rows[0]['versions']['torch']}.",
    ]
    lines += [f"- {' '.join(note.split())}" for note in notes]
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    slim = [{key: row[key] for key in KEPT if row.get(key) is not None} for row in rows]
    about = {"name": recipe.name, "machine": machine, "versions": rows[0]["versions"]}
    whole = recipe.to_dict()
    write_text(out.with_suffix(".json"), json.dumps({**about, "recipe": whole, "rows": slim}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
