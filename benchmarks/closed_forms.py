"""What the closed forms lose on a language model before any tuning: each method, and the same with refitted outputs.

    FFNKIT_DATA=... python benchmarks/closed_forms.py MODEL [--width 0.75] [--tokens 8192] [--novel FILE]
        [--only ARM ...] [--out FOLDER]

All FFNs of MODEL, a folder, keep this share of their neurons (or the parameters of that many); half of the calibration
tokens are WikiText-2's validation split, half ffnkit's text of many kinds. Perplexity in windows of 512 tokens, the
same for every arm: of WikiText-2's test split, and of FILE, of which calibration has nothing. Results are kept after
each arm: run again, it goes on.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import common
from carry_over import SEED, WINDOW, perplexity, text_of, windows
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.io.loading import no_bars
from ffnkit.tasks.models import load_tokenizer

REFIT = {"refit": True, "ridge": 0.1}  # one ridge, as published forms have; by default several are mixed
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "importance": ("importance", {}),
    "importance, refit": ("importance", REFIT),
    "importance, refit, ridges mixed": ("importance", {"refit": True}),
    "modegpt": ("modegpt", {}),
    "modegpt, pull=0.1": ("modegpt", {"pull": 0.1}),
    "obs, block=32": ("obs", {"block": 32}),
    "svd, whiten": ("svd", {"whiten": True}),
    "obs, block=32, ridge=0.1": ("obs", {"block": 32, "ridge": 0.1}),
    "importance, refit, sequential": ("importance", REFIT | {"sequential": True}),
    "magnitude": ("magnitude", {}),
    "magnitude, refit": ("magnitude", REFIT),
    "obs": ("obs", {}),
    "svd": ("svd", {}),
    "random": ("random", {}),
    "random, refit": ("random", REFIT),
    "fusion": ("fusion", {"restarts": 1}),
    "fusion, refit": ("fusion", {"restarts": 1} | REFIT),
    "calibrated-fusion, effort=fast": ("calibrated-fusion", {"effort": "fast"}),
    "calibrated-fusion": ("calibrated-fusion", {}),
}


def held_out(tokenizer: Any, novel: Path | None, count: int) -> dict[str, Any]:
    """Windows of WikiText-2's test split, and of the novel where one is named: ``count`` of each."""
    texts = {"WikiText-2": text_of("wikitext2", "test")}
    texts |= {"novel": novel.read_text(encoding="utf-8")} if novel else {}
    return {key: windows(tokenizer, text)[:: max(1, 16 // count)] for key, text in texts.items()}


def calibrating(tokens: int) -> tune.CalibrationSettings:
    """Half WikiText-2's validation split, half ffnkit's text of many kinds."""
    file = Path(os.environ["FFNKIT_DATA"]) / "wikitext2" / "validation.txt"
    return tune.CalibrationSettings(tokens=tokens, text=str(file), mix=0.5, max_length=WINDOW, batch_size=4)


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said = results["conditions"]
    texts = said["texts"]
    lines = [["", *texts, "planning, s of the processor"], [":--", *["--:"] * (len(texts) + 1)]]
    for row in results["rows"]:
        told = (f"{row[name]:,.1f}" if row[name] < 1e4 else f"{row[name]:.1e}" for name in texts)
        lines.append([row["name"], *told, f"{row.get('processor seconds', 0):.0f}"])
    table = common.table(lines)
    notes = [
        f"- {said['model']}, all FFNs at {said['width']:g} of their width, {said['tokens']:,} tokens of calibration"
        f" (half WikiText-2, half of many kinds), no tuning; perplexity on {said['measured']:,} tokens of each text in"
        f" windows of {WINDOW}; one draw.",
        *common.footer(results),
    ]
    return f"# Closed forms ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--width", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--novel", type=Path)
    parser.add_argument("--dtype", default="auto", help="as the model lies there, unless named")
    parser.add_argument("--only", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"closed_forms_{given.model.name.lower()}"
    tokenizer = load_tokenizer(given.model)
    held = held_out(tokenizer, given.novel, given.windows)
    conditions = {
        "model": given.model.name,
        "width": given.width,
        "tokens": given.tokens,
        "measured": min(ids.numel() for ids in held.values()),
        "texts": [*held],
        "dtype": given.dtype,
        "seed": SEED,
    }
    results = common.resumed(given.out, name, conditions)
    settings = calibrating(given.tokens)
    for arm in ["uncompressed", *given.only]:
        if any(row["name"] == arm for row in results["rows"]):
            continue
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
        took: dict[str, float] = {}
        if arm in ARMS:
            method, more = ARMS[arm]
            data = tune.calibration_batches(model, tokenizer, settings, seed=SEED)
            start, busy = time.perf_counter(), time.process_time()
            made = methods.build(method, width=given.width, **more)
            plan = fk.plan(model, made, data=data if getattr(made, "needs_data", False) else None)
            took = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
            fk.fold(fk.apply(model, plan))
        row = {"name": arm, **took} | {text: perplexity(model, ids) for text, ids in held.items()}
        print(row, flush=True)
        results["rows"].append(row)
        common.write(given.out, name, results, page)


if __name__ == "__main__":
    main()
