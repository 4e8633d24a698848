"""A search against a grid by hand that gets the same time: widths one after the other, each healed as long as the best.

    python benchmarks/search_grid.py [--recipe FILE] [--model MODEL] [--work FOLDER] [--out FOLDER]

The search is the recipe's: benchmarks/search_grid_stories260k.yaml (text alone), or search_grid_sst2.yaml (MiniLM).
The grid takes one width for all layers by the same method with the same statistics, and heals each by as many tokens as
the search gives its best ones in all its rungs; widths halve the gaps, as a person would, until the seconds of the
processor that the search took are spent. The original is tuned once and counts for neither, and neither does what
follows the choice. Both choose by the search's rule, and the two chosen models are timed in turn at the end, on one
thread. MODEL is a checkpoint whose head is trained, to leave out the tuning.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, footer, resumed, table, write

GRID = [10, 15, 5, 12, 8, 18, 6, 14, 4, 16, 9, 11, 7, 13, 17]  # twentieths of the neurons, in their order
WORDS = {"search": "search", "grid": "grid by hand"}


def measured(arm: str, recipe: Any, work: Path, seconds: float) -> dict[str, Any]:
    """One row of the results: what an arm found, in ``seconds`` of the processor where it is the grid."""
    from ffnkit.search import choice
    from ffnkit.search.job import Run

    run = Run(recipe, work / arm, print)
    run.folder.begin(run.facts())
    if arm == "grid":  # a folder that the search has begun: it takes no other
        share_original(work / "search", work / arm)
    run.prepare()
    _ = run.original, run.statistics, run.batches, run.held  # read before the clock starts
    begin = time.process_time()
    if arm == "search":
        run.work()
    else:
        by_hand(run, begin + seconds)
    taken = time.process_time() - begin
    found = choice.results(run)
    tuned = [short(row, found) for row in found["candidates"] if "tuned" in row]
    return {
        "name": arm,
        "processor_s": taken,
        "metric": found["metric"],
        "floor": found["floor"],
        "original": found["original"]["value"],
        "measured": len(found["candidates"]),
        "tuned": sorted(tuned, key=lambda row: row["size"]),
        "chosen": found["chosen"] and short(found["chosen"], found) | {"report": found["chosen"]["report"]},
    }


def by_hand(run: Any, until: float) -> None:
    """Width after width, each made and healed, until this time of the processor."""
    from ffnkit.recipe.state import write_json
    from ffnkit.search.proposing import PROPOSED
    from ffnkit.search.state import Task

    asked = [{"how": "width", "share of width": share} for share in GRID]
    write_json(run.folder.out / PROPOSED, {"candidates": asked})
    for number in range(len(GRID)):
        if time.process_time() >= until:
            return
        for task in (Task(number), Task(number, 0)):
            if not run.folder.over(task):
                run.do(task)


def short(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    tuned = row["tuned"]
    return {
        "name": row["name"],
        "size": row["size"],
        "ffn": row["costs"]["ffn_params"] / found["original"]["costs"]["ffn_params"],
        "kept": tuned["kept"],
        "low": tuned["low"],
        "rung": tuned["rung"],
        "enough": row["enough"],
    }


def by_widths(recipe: Any) -> Any:
    """The grid's recipe: one rung that takes the tokens of all."""
    own = recipe.search
    tokens = sum(own.tokens * own.factor**rung for rung in range(own.rungs))
    return recipe.model_copy(
        update={"search": own.model_copy(update={"methods": ("width",), "rungs": 1, "tokens": tokens})}
    )


def share_original(source: Path, target: Path) -> None:
    """The original, its figures and its statistics, as the search made them."""
    for each in source.glob("original*"):
        if each.is_dir():
            shutil.copytree(each, target / each.name, dirs_exist_ok=True)
        else:
            shutil.copy(each, target / each.name)
    shutil.copy(source / "statistics.safetensors", target)


def times(recipe: Any, work: Path, results: dict[str, Any]) -> None:
    """The chosen models' time of a batch, to the original's, all in turn."""
    from ffnkit.recipe.timing import batch_for
    from ffnkit.report.measure import latencies
    from ffnkit.search.ground import ground_of

    ground, how = ground_of(recipe), recipe.measure
    original = ground.original(work / "search" / "original")  # of text alone the model itself
    chosen = [row for row in results["rows"] if row["chosen"]]
    models = {"original": original} | {row["name"]: ground.open(work / row["name"] / "model/compact") for row in chosen}
    taken = latencies(models, batch_for(original, how.batch_size, how.length), repeats=how.repeats)
    for row in chosen:
        row["chosen"]["latency"] = taken.ratios[row["name"]].median


def page(results: dict[str, Any]) -> str:
    recipe, first = results["conditions"]["recipe"], results["rows"][0]
    own = recipe["search"]
    rows = [["", "processor", "measured", "tuned", "chosen", "size", "FFN parameters", "kept on dev", "at least"]]
    rows[0] += ["kept of the rest", "at least", "latency"]
    rows.append(["---", *["---:"] * 3, "---", *["---:"] * 7])
    lines, both = [], []
    for row in results["rows"]:
        cells = [WORDS[row["name"]], f"{row['processor_s'] / 60:.1f} min", str(row["measured"]), str(len(row["tuned"]))]
        if best := row["chosen"]:
            told = best["report"]
            cells += [best["name"], f"{best['size']:.1%}", f"{best['ffn']:.1%}", f"{best['kept']:.2%}"]
            cells += [f"{best['low']:.2%}", f"{told['kept']:.2%}", f"{told['low']:.2%}"]
            cells += [f"{best['latency']:.2f}" if "latency" in best else ""]
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
        both += [(row["name"], each) for each in row["tuned"]]
    lines.append(["", "of", "model", "size", "FFN parameters", "kept on dev", "at least"])
    lines.append(["---", "---", "---", *["---:"] * 4])
    for arm, each in sorted(both, key=lambda pair: pair[1]["size"]):
        beaten = any(
            other["size"] <= each["size"] and other["kept"] >= each["kept"] and other is not each for _, other in both
        )
        figures = [f"{each['size']:.1%}", f"{each['ffn']:.1%}", f"{each['kept']:.2%}", f"{each['low']:.2%}"]
        lines.append(["" if beaten else "\\*", WORDS[arm], each["name"], *figures])
    tokens = [own["tokens"] * own["factor"] ** rung for rung in range(own["rungs"])]
    notes = [
        f"- kept: {first['metric']} on dev, to the original's ({first['original']:.4g}). Asked for:"
        f" {first['floor']:.4g} of it, surely {2 * first['floor'] - 1:.4g}; size: {own['objective']}. kept of the rest:"
        " on what chose nothing.",
        f"- search: {own['candidates']} candidates, {own['tuned']} tuned, rungs of"
        f" {' and '.join(f'{each:,}' for each in tokens)} tokens. grid: {sum(tokens):,} tokens for each width.",
        "- processor: seconds of one thread for proposing, making, healing and scoring; tuning the original, the last"
        " timing and the report count for neither.",
        "- \\*: no other of both is smaller and better.",
    ]
    head = f"# {recipe['name']}: a search against a grid by hand in the same time"
    return "\n".join([head, "", table(rows), "", table(lines), "", *notes, *footer(results, 1), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("search_grid_stories260k.yaml"))
    parser.add_argument("--model")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ffnkit-search-grid")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch

    from ffnkit.search.settings import read_search

    torch.set_num_threads(1)
    recipe = read_search(args.recipe)
    if recipe is None:
        parser.error(f"{args.recipe} holds no search of models")
    told = recipe.model_dump(mode="json", exclude_none=True)
    if args.model:
        recipe = recipe.model_copy(update={"model": args.model})
    name = args.recipe.stem
    results = resumed(args.out, name, {"recipe": told})
    have = {row["name"]: row for row in results["rows"]}
    if "search" not in have:
        have["search"] = measured("search", recipe, args.work, 0.0)
        results["rows"] = [have["search"]]
        write(args.out, name, results, page)
    if "grid" not in have:
        have["grid"] = measured("grid", by_widths(recipe), args.work, have["search"]["processor_s"])
    results["rows"] = [have["search"], have["grid"]]
    times(recipe, args.work, results)
    write(args.out, name, results, page)


if __name__ == "__main__":
    main()
