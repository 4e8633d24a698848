"""Table and plot of a study: what its runs measured, arm by arm, before and after tuning.

    ffnkit run recipes/merging_vit.yaml --out runs/merging-vit
    python benchmarks/study_table.py runs/merging-vit --plot --out benchmarks/results/merging_vit

Several folders, say of seeds that ran apart, are read as one study; arms and seeds of the recipe that did not run are
marked so. Writes OUT.md and OUT.json, with --plot OUT.png: there arms are SERIES-NUMBER, and a series is a line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

from ffnkit.io.files import write_text
from ffnkit.recipe.loading import load_recipe
from ffnkit.recipe.schema import Recipe
from ffnkit.report.table import Arm, Difference, Stat, summarize

KEPT = (
    *("arm", "seed", "metrics", "metrics_before", "dev_metric", "best_step", "steps", "seconds", "peak_memory_bytes"),
    *("parameters", "ffn_parameters", "trainable_parameters", "flops_per_token", "bytes_on_disk_compact", "settings"),
    *("latency_ratio", "latency_ratio_quartiles", "pruning", "neutral_loss"),
    *("updated_parameters", "trainable_body", "trainable_share", "samples_per_second", "steps_per_second"),
    *("process_memory_bytes", "heads_removed", "neurons_removed", "zeros", "zeros_merged"),
)
COLUMNS: dict[str, Callable[[Arm, Arm], str]] = {
    "parameters": lambda arm, first: f"{arm.values['parameters'].mean:,.0f}",
    "in FFNs": lambda arm, first: f"{arm.values['ffn_parameters'].mean:,.0f}",
    "trains": lambda arm, first: of(arm, "trainable_parameters", lambda mean: f"{mean:,.0f}"),
    "without head": lambda arm, first: of(arm, "trainable_body", lambda mean: f"{mean:,.0f}"),
    "a step": lambda arm, first: of(arm, "updated_parameters", lambda mean: f"{mean:,.0f}"),
    "samples/s": lambda arm, first: of(arm, "samples_per_second", lambda mean: f"{mean:.1f}"),
    "FLOPs": lambda arm, first: ratio(arm, first, "flops_per_token"),
    "latency": lambda arm, first: f"{arm.latency_ratio.mean:.2f}" if arm.latency_ratio else "",
    "zeros": lambda arm, first: of(arm, "zeros", lambda mean: f"{100 * mean:.1f}%"),
    "zeros merged": lambda arm, first: of(arm, "zeros_merged", lambda mean: f"{100 * mean:.1f}%"),
    "tuning": lambda arm, first: f"{sum(arm.seconds[k].mean for k in ('tune', 'recover') if k in arm.seconds):,.0f} s",
    "memory": lambda arm, first: of(arm, "peak_memory_bytes", lambda mean: f"{mean / 2**20:,.0f} MiB"),
}
WORDS = {
    "merged": "merged, neurons matched",
    "vanilla": "merged as they lie",
    "ffn-drop": "FFNs dropped",
    "layer-drop": "layers dropped",
    "narrow": "narrowed (calibrated-fusion)",
    "corrected": "merged, output layer refitted",
    "anchor": "the anchor's copy",
    "random-tie": "tied from random weights",
}
MARKERS = "osD^vPX*"


def read(folders: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the first run says of itself, and the finished rows of all of them; the first of two alike counts."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    heads = [json.loads((folder / "results.json").read_text()) for folder in folders]
    for head in heads:
        for row in head["rows"]:
            if row.get("status") == "done":
                rows.setdefault((row["arm"], row["seed"]), row)
    return heads[0], list(rows.values())


def of(arm: Arm, key: str, say: Callable[[float], str]) -> str:
    """A figure of an arm in words, where it was measured."""
    return say(arm.values[key].mean) if key in arm.values else ""


def ratio(arm: Arm, first: Arm, key: str) -> str:
    """A figure of an arm as a ratio to the first arm's."""
    return of(arm, key, lambda mean: f"{mean / first.values[key].mean:.3f}") if key in first.values else ""


def paired(rows: Sequence[dict[str, Any]], arm: str, other: str, metric: str) -> Difference | None:
    """The difference of two arms over the seeds of both."""
    two = [row for name in (other, arm) for row in rows if row["arm"] == name]
    return summarize(two, metric, arms=[other, arm]).arms[1].difference if {r["arm"] for r in two} >= {arm} else None


def shown(stat: Stat | None) -> str:
    """Mean and standard deviation."""
    if stat is None:
        return ""
    digits = 4 if abs(stat.mean) < 10 else 2 if abs(stat.mean) < 1000 else 0
    return f"{stat.mean:.{digits}f}" + (f" ± {stat.std:.{digits}f}" if stat.std is not None else "")


def difference(found: Difference | None) -> str:
    """Mean difference with its interval."""
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def before(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Stat]:
    """The metric before tuning, by arm."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found = (row.get("metrics_before") or {}).get(metric)
        if found is not None and math.isfinite(found):
            values[row["arm"]].append(found)
    return {arm: Stat.of(column) for arm, column in values.items()}


def table(
    recipe: Recipe, rows: list[dict[str, Any]], metrics: Sequence[str], against: Sequence[str], columns: Sequence[str]
) -> str:
    """The table in Markdown: of ``metrics`` the first is compared."""
    arms = summarize(rows, metrics[0], arms=list(recipe.arms)).arms
    first = arms[0].name
    untuned = before(rows, metrics[0])
    others = [first, *against]
    heads = ["arm", "seeds", *([f"{metrics[0]} before"] if untuned else []), *metrics, *columns]
    heads += [f"{metrics[0]} to {other}, paired [95%]" for other in others]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for arm in arms:
        if not arm.run:
            lines.append(f"| {arm.name} | 0 | not run |{' |' * (len(heads) - 3)}")
            continue
        cells = [arm.name, str(len(arm.seeds)), *([shown(untuned.get(arm.name))] if untuned else [])]
        cells += [shown(arm.metrics.get(metric)) for metric in metrics]
        cells += [COLUMNS[name](arm, arms[0]) for name in columns]
        cells += [
            difference(paired(rows, arm.name, other, metrics[0])) if wanted(arm.name, other, against) else ""
            for other in others
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def wanted(arm: str, other: str, against: Sequence[str]) -> bool:
    """Whether two arms are compared: of the arms given with --against, those of the same size (name's last part)."""
    return arm != other and (other not in against or arm.rpartition("-")[2] == other.rpartition("-")[2])


def plot(recipe: Recipe, rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """The metric against the share of parameters that is left: before tuning and after."""
    from matplotlib.figure import Figure

    summary = summarize(rows, metric, arms=list(recipe.arms))
    whole = summary.arms[0]
    untuned = before(rows, metric)
    series: dict[str, list[Arm]] = defaultdict(list)
    for arm in summary.arms[1:]:
        match = re.fullmatch(r"(.+)-\d+", arm.name)
        if match and arm.run:
            series[match[1]].append(arm)
    panels = [
        ("before tuning", untuned),
        ("after equal tuning", {a.name: a.metrics[metric] for a in summary.arms if a.run}),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    values = [stat.mean for _, by_arm in panels for stat in by_arm.values()]
    for ax, (title, by_arm) in zip(axes, panels, strict=True):
        for marker, (name, arms) in zip(MARKERS, series.items(), strict=False):
            have = [arm for arm in arms if arm.name in by_arm]
            x = [100 * arm.values["parameters"].mean / whole.values["parameters"].mean for arm in have]
            y = [by_arm[arm.name].mean for arm in have]
            spread = [by_arm[arm.name].std or 0.0 for arm in have]
            ax.errorbar(x, y, spread, marker=marker, label=WORDS.get(name, name), capsize=2, lw=1.2, ms=5)
        if whole.name in by_arm:
            ax.axhline(by_arm[whole.name].mean, color="0.6", lw=1, ls="--", label=whole.name)
        ax.set(title=title, xlabel="parameters left (%)", ylabel=metric)
        if max(values) > 20 * min(values) > 0:
            ax.set_yscale("log")
        ax.grid(alpha=0.25)
        ax.invert_xaxis()
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the runs, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that ffnkit run wrote")
    parser.add_argument("--recipe", type=Path, help="the whole study, where the runs hold a part of it")
    parser.add_argument("--out", type=Path, help=f"results without ending [{RESULTS.name}/ and the first run's name]")
    parser.add_argument("--metrics", help="columns, the first is compared, e.g. accuracy,f1 [all of the runs]")
    parser.add_argument(
        "--against", action="append", default=[], help="an arm that those of its size are compared with"
    )
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="an arm of another study")
    parser.add_argument("--note", action="append", default=[], help="a line below the table")
    parser.add_argument("--columns", default="parameters,in FFNs", help=f"beside them, of {', '.join(COLUMNS)}")
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    head, rows = read(given.runs)
    recipe = load_recipe(given.recipe) if given.recipe else Recipe.model_validate(head["recipe"])
    renamed = dict(pair.split("=", 1) for pair in given.rename)
    rows = [{**row, "arm": renamed.get(row["arm"], row["arm"])} for row in rows]
    rows = [row for row in rows if row["arm"] in recipe.arms]
    known = list(dict.fromkeys([head["metric"], *(name for row in rows for name in row["metrics"])]))
    metrics = given.metrics.split(",") if given.metrics else known
    out = given.out or RESULTS / given.runs[0].name
    lines = [f"# {recipe.name}\n", table(recipe, rows, metrics, given.against, given.columns.split(",")), ""]
    if given.plot:
        plot(recipe, rows, metrics[0], out.with_suffix(".png"))
        lines += [f"![{metrics[0]} against parameters]({out.name}.png)", ""]
    machine = rows[0].get("machine", {})
    notes = [
        *filter(None, [recipe.notes]),
        "Mean and standard deviation over seeds; differences are paired by seed, the interval is 95% (t, n - 1).",
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
