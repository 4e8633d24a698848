"""What is lost when a share of all parameters goes, by each method, before and after healing: sizes, texts, draws.

    FFNKIT_DATA=... python benchmarks/sizes.py MODEL [--removed 0.1 0.2 0.3] [--draws 3] [--tokens 8192]
        [--novel FILE] [--only ARM ...] [--heal 200k] [--out FOLDER]

All FFNs of MODEL, a folder, keep one share of their neurons, such that this share of all parameters is gone; or a block
of adjacent layers goes, those whose output is most like their input, as many as come nearest to it. Half of the
calibration tokens are WikiText-2's validation split, half ffnkit's text of many kinds; draws are of both. The closed
forms read one file of statistics a draw. Perplexity on the same windows of 512 tokens for every arm: of WikiText-2's
test split, and of FILE, of which calibration has nothing. With --heal each arm then learns from the uncompressed model
on as many tokens of the same texts, and results are told apart. They are kept after each arm: run again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import common
from carry_over import WINDOW, perplexity
from closed_forms import calibrating, held_out
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.io.loading import no_bars
from ffnkit.settings.amounts import amount
from ffnkit.tasks.models import load_tokenizer
from ffnkit.tune.healing.data import healing_data
from ffnkit.tune.healing.settings import HealSettings

REFIT = {"refit": True, "ridge": 0.1}  # one ridge, as GRAIL has
# Name: method, settings, and what it reads: nothing, the batches, or the statistics.
ARMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "magnitude": ("magnitude", {}, ""),
    "rms, cut": ("importance", {}, "statistics"),
    "rms, refit (GRAIL)": ("importance", REFIT, "batches"),
    "leverage, refit (MoDeGPT)": ("modegpt", {"pull": 0.1}, "statistics"),
    "OBS (SlimGPT)": ("obs", {"block": 32}, "statistics"),
    "a block of layers": ("layer-drop", {}, "batches"),
    "ours, effort=fast": ("calibrated-fusion", {"effort": "fast"}, "statistics"),
    "ours": ("calibrated-fusion", {}, "batches"),
    "ours, effort=fast, select=loss": ("calibrated-fusion", {"effort": "fast", "select": "loss"}, "statistics"),
    "ours, select=loss": ("calibrated-fusion", {"select": "loss"}, "batches"),
    "ours, select=leverage, sequential=False": ("calibrated-fusion", {"select": "leverage"}, "statistics"),
}


def healed_page(results: dict[str, Any]) -> str:
    """The Markdown page: a row an arm, before and after in the columns of each size."""
    said = results["conditions"]
    texts, rows = said["texts"], results["rows"]
    sizes = [size for size in said["removed"] if any(row["removed"] == size for row in rows)]
    lines = [["", *(f"-{size:.0%} {text}" for size in sizes for text in texts), "healing, min of the processor"]]
    lines.append([":--", *["--:"] * (len(lines[0]) - 1)])
    whole = rows[0]
    lines.append(["uncompressed", *(f"{whole[text]:.1f}" for _ in sizes for text in texts), ""])
    for name in dict.fromkeys(row["name"] for row in rows[1:]):
        here = {row["removed"]: row for row in rows if row["name"] == name}
        cells = [
            f"{here[size]['start'][text]:.1f} -> {here[size][text]:.1f}" if size in here else ""
            for size in sizes
            for text in texts
        ]
        minutes = sorted({round(row["healing"]["processor seconds"] / 60) for row in here.values()})
        lines.append([name, *cells, " to ".join(str(each) for each in {minutes[0]: 0, minutes[-1]: 0})])
    notes = [
        f"- {said['model']}, {said['tokens']:,} tokens of calibration (half WikiText-2, half of many kinds), then"
        f" {said['heal']:,} of healing on the same texts at today's settings; perplexity on {said['measured']:,} tokens"
        f" of each text in windows of {WINDOW}; one draw.",
        *common.footer(results),
    ]
    return f"# What a size costs after healing ({said['model']})\n\n{common.table(lines)}\n\n" + "\n".join(notes) + "\n"


def page(results: dict[str, Any]) -> str:
    """The Markdown page: a row an arm, a pair of columns a size; a mean with its spread where there are draws."""
    said = results["conditions"]
    texts, sizes = said["texts"], said["removed"]
    heads = [f"-{size:.0%} {text}" for size in sizes for text in texts]
    lines = [["", *heads, "planning, s of the processor"], [":--", *["--:"] * (len(heads) + 1)]]
    whole = next((row for row in results["rows"] if row["name"] == "uncompressed"), None)
    if whole:
        lines.append(["uncompressed", *(f"{whole[text]:.1f}" for _ in sizes for text in texts), ""])
    for name in dict.fromkeys(row["name"] for row in results["rows"] if row["name"] != "uncompressed"):
        rows = [row for row in results["rows"] if row["name"] == name]
        cells = [told([row[text] for row in rows if row["removed"] == size]) for size in sizes for text in texts]
        busy = [row["processor seconds"] for row in rows]
        lines.append([name, *cells, f"{min(busy):.0f} to {max(busy):.0f}"])
    table = common.table(lines)
    notes = [
        f"- {said['model']}, {said['tokens']:,} tokens of calibration (half WikiText-2, half of many kinds), no tuning;"
        f" perplexity on {said['measured']:,} tokens of each text in windows of {WINDOW}; mean of {said['draws']} draws"
        " of the calibration text ± their standard deviation; without it one draw.",
        "- Planning is without the pass for the statistics that leverage, OBS and effort=fast share; the others make"
        " passes of their own.",
        *common.footer(results),
    ]
    return f"# What a size costs ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def means(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The mean of each arm and size over the draws."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["name"], row["removed"]), []).append(row)
    texts = results["conditions"]["texts"]
    return [
        {"name": name, "removed": size, "draws": len(rows)}
        | {text: statistics.fmean(row[text] for row in rows) for text in texts}
        for (name, size), rows in found.items()
    ]


def told(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    shown = f"{mean:,.1f}" if mean < 1e4 else f"{mean:.1e}"
    return shown if len(values) < 2 else f"{shown} ± {statistics.stdev(values):.1f}"


def sized(name: str, model: Any, removed: float) -> Any:
    """The method of an arm, such that ``removed`` of all parameters of ``model`` go."""
    method, more, _ = ARMS[name]
    whole = sum(p.numel() for p in model.parameters())
    if method == "layer-drop":
        layer = model.model.layers[0]
        count = round(removed * whole / sum(p.numel() for p in layer.parameters()))
        return methods.build(method, window=count, **more)
    inside = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    return methods.build(method, width=1 - removed * whole / inside, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--novel", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--heal", type=amount, default=0)
    parser.add_argument("--work", type=Path, default=Path("sizes_work"))
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"sizes_{given.model.name.lower()}" + "_healed" * bool(given.heal)
    tokenizer = load_tokenizer(given.model)
    held = held_out(tokenizer, given.novel, given.windows)
    conditions = {
        **{"model": given.model.name, "removed": given.removed, "draws": given.draws, "tokens": given.tokens},
        **{"measured": min(ids.numel() for ids in held.values()), "texts": [*held]},
        **({"heal": given.heal} if given.heal else {}),
    }
    results = common.resumed(given.out, name, conditions)

    def opened() -> Any:
        with no_bars():
            return AutoModelForCausalLM.from_pretrained(given.model).eval()

    def keep(row: dict[str, Any], model: Any) -> None:
        row |= {text: perplexity(model, ids) for text, ids in held.items()}
        print(row, flush=True)
        results["rows"].append(row)
        if not given.heal:
            results["means"] = means(results)
        common.write(given.out, name, results, healed_page if given.heal else page)

    def healed(model: Any, draw: int) -> dict[str, Any]:
        before = {text: perplexity(model, ids) for text, ids in held.items()}
        settings = HealSettings.model_validate({"tokens": given.heal})
        parts, decide = healing_data(model, tokenizer, settings, calibrating(given.tokens), seed=draw)
        busy = time.process_time()
        found = fk.heal(model, opened(), parts, settings, held=decide, seed=draw)
        busy = time.process_time() - busy
        return {"start": before, "healing": found.to_dict() | {"processor seconds": busy}}

    if not results["rows"]:
        keep({"name": "uncompressed", "removed": 0.0}, opened())
    done = {(row["name"], row["removed"], row.get("draw")) for row in results["rows"]}
    wanted = [(draw, arm, size) for draw in range(given.draws) for arm in given.only for size in given.removed]
    for draw, arm, size in wanted:
        reads = ARMS[arm][2]
        if (arm, size, draw) in done or (not reads and draw):
            continue
        model = opened()
        data: Any = tune.calibration_batches(model, tokenizer, calibrating(given.tokens), seed=draw) if reads else None
        if reads == "statistics":
            file = given.work / f"draw{draw}.safetensors"
            if not file.exists():
                given.work.mkdir(parents=True, exist_ok=True)
                fk.calibrate(model, data).save(file)
            data = fk.StatisticsFile(file)
        start, busy = time.perf_counter(), time.process_time()
        whole = sum(p.numel() for p in model.parameters())
        plan = fk.plan(model, sized(arm, model, size), data=data)
        took = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
        fk.fold(fk.apply(model, plan))
        gone = 1 - sum(p.numel() for p in model.parameters()) / whole
        row = {"name": arm, "removed": size, "draw": draw, "gone": gone, **took}
        keep(row | (healed(model, draw) if given.heal else {}), model)


if __name__ == "__main__":
    main()
