"""What a language model loses on other text than it was calibrated on, before any tuning.

    FFNKIT_DATA=... python benchmarks/carry_over.py MODEL [--width 0.75] [--tokens 8192] [--only ARM ...] [--out FOLDER]

All FFNs of MODEL, a folder, keep this share of their neurons. Each arm is a method and a calibration text: WikiText-2's
validation split ("one kind"), ffnkit's text of many kinds ("many kinds"), or half of each ("both", as --text has it).
Perplexity in windows of 512 tokens, the same 8,192 tokens of each text for every arm: of WikiText-2's test split, of
stories, of mathematics, of film reviews. Results are kept after each arm: run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.tasks.models import load_tokenizer

WINDOW, WINDOWS, SEED = 512, 16, 0
TEXTS = {
    "WikiText-2": ("wikitext2", "test"),
    "stories": ("tinystories", "validation"),
    "mathematics": ("gsm8k", "test"),
    "reviews": ("sst2", "validation"),
}
MIXES = {"one kind": 0.0, "many kinds": 1.0, "both": 0.5}
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "importance": ("importance", "many kinds", {}),
    "one kind, refine=0": ("calibrated-fusion", "one kind", {"refine": 0}),
    "many kinds, refine=0": ("calibrated-fusion", "many kinds", {"refine": 0}),
    "both, refine=0": ("calibrated-fusion", "both", {"refine": 0}),
    "both, refine=0, leverage": ("calibrated-fusion", "both", {"refine": 0, "select": "leverage"}),
    "both, refine=0, greedy": ("calibrated-fusion", "both", {"refine": 0, "select": "greedy"}),
    "both, refine=0, ridge=0.01": ("calibrated-fusion", "both", {"refine": 0, "ridge": 0.01}),
    "both": ("calibrated-fusion", "both", {}),
    "one kind": ("calibrated-fusion", "one kind", {}),
}


def text_of(task: str, split: str) -> str:
    """All rows of a split, one after the other."""
    folder = Path(os.environ["FFNKIT_DATA"]) / task
    plain = folder / f"{split}.txt"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = [key for key in ("text", "question", "answer", "sentence") if key in rows[0]]
    return "\n\n".join("\n".join(row[key] for key in parts) for row in rows)


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """(WINDOWS, WINDOW) token numbers, spread evenly over the text."""
    ids = tokenizer(text[: 40 * WINDOW * WINDOWS], return_tensors="pt", verbose=False).input_ids[0]
    count = len(ids) // WINDOW
    chosen = [number * count // WINDOWS for number in range(min(WINDOWS, count))]
    return ids[: count * WINDOW].view(count, WINDOW)[chosen]


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    total = 0.0
    for rows in ids.split(4):
        logits = model(rows).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [["", *TEXTS, "planning, s"], [":--", *["--:"] * (len(TEXTS) + 1)]]
    for row in results["rows"]:
        lines.append([row["name"], *(f"{row[name]:.1f}" for name in TEXTS), f"{row.get('seconds', 0):.0f}"])
    table = common.table(lines)
    said = results["conditions"]
    notes = [
        f"- {said['model']}, all FFNs at {said['width']:g} of their width, {said['tokens']:,} tokens of calibration, no"
        f" tuning; perplexity on {WINDOWS * WINDOW:,} tokens of each text in windows of {WINDOW}; one draw.",
        "- One kind: WikiText-2's validation split; many kinds: ffnkit's own text; both: half of each.",
        *common.footer(results),
    ]
    return f"# What is lost on other text ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--width", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"carry_over_{given.model.name.lower()}"
    tokenizer = load_tokenizer(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    held = {text: windows(tokenizer, text_of(*place)) for text, place in TEXTS.items()}
    conditions = {"model": given.model.name, "width": given.width, "tokens": given.tokens, "seed": SEED}
    results = common.resumed(given.out, name, conditions)
    if not results["rows"]:
        results["rows"].append({"name": "uncompressed"} | {text: perplexity(base, ids) for text, ids in held.items()})
    file = Path(os.environ["FFNKIT_DATA"]) / "wikitext2" / "validation.txt"
    for arm in given.only:
        if any(row["name"] == arm for row in results["rows"]):
            continue
        method, kind, more = ARMS[arm]
        settings = tune.CalibrationSettings(tokens=given.tokens, text=str(file), mix=MIXES[kind], max_length=WINDOW)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        data = tune.calibration_batches(model, tokenizer, settings.model_copy(update={"batch_size": 4}), seed=SEED)
        start, busy = time.perf_counter(), time.process_time()
        plan = fk.plan(model, methods.build(method, width=given.width, **more), data=data)
        took = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
        fk.fold(fk.apply(model, plan))
        row = {"name": arm, **took} | {text: perplexity(model, ids) for text, ids in held.items()}
        print(row, flush=True)
        results["rows"].append(row)
        common.write(given.out, name, results, page)


if __name__ == "__main__":
    main()
