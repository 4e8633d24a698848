"""What data-aware fusion loses on a language model before any tuning, by effort and by each of its parts.

    FFNKIT_DATA=... python benchmarks/efforts.py MODEL [--widths 0.75 0.5 0.25] [--tokens 16384] [--only ARM ...]
        [--task tinystories] [--mix 0] [--out FOLDER]

All FFNs of MODEL, a folder, keep these shares of their neurons. Calibration: the task's train split, by a share ``mix``
ffnkit's text of many kinds; perplexity on its validation split. Results are kept after each arm: run again, it goes on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from carry_over import SEED, perplexity, text_of, windows
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import tune
from ffnkit.tasks.models import load_tokenizer

LENGTH = 256
ARMS: dict[str, dict[str, Any]] = {
    "effort=fast": {"effort": "fast"},
    "effort=default": {},
    "effort=best": {"effort": "best"},
    "fast, metric=fisher": {"effort": "fast", "metric": "fisher"},
    "fast, sequential": {"effort": "fast", "sequential": True},
    "fast, sequential, metric=fisher": {"effort": "fast", "sequential": True, "metric": "fisher"},
    "fast, refine=100": {"effort": "fast", "refine": 100},
    "fast, select=leverage": {"effort": "fast", "select": "leverage"},
    "fast, sequential, select=leverage": {"effort": "fast", "sequential": True, "select": "leverage"},
    "fast, refine=100, select=leverage": {"effort": "fast", "refine": 100, "select": "leverage"},
    "default, select=leverage": {"select": "leverage"},
    "best, select=leverage": {"effort": "best", "select": "leverage"},
    "best, refine_metric=norm": {"effort": "best", "refine_metric": "norm"},
    "best, four times the text": {"effort": "best"},
    "best, refine=1500, four times the text": {"effort": "best", "refine": 1500},
    "fast, select=loss": {"effort": "fast", "select": "loss"},
    "default, select=loss": {"select": "loss"},
    "best, select=loss": {"effort": "best", "select": "loss"},
    "best, select=loss, four times the text": {"effort": "best", "select": "loss"},
}
TIMES = {name: 4 for name in ARMS if name.endswith("four times the text")}  # the tokens, of arms that see more


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said = results["conditions"]
    widths = [f"{width:g}" for width in said["widths"]]
    lines = [["", *widths, "planning, s of the processor"], [":--", *["--:"] * (len(widths) + 1)]]
    for row in results["rows"]:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append([row["name"], *(f"{row[width]:.2f}" for width in widths), seconds])
    table = common.table(lines)
    notes = [
        f"- {said['model']}, every FFN at a share of its width, {said['tokens']:,} tokens of {said['task']}'s train"
        f" split for calibration ({said['mix']:.0%} of them ffnkit's text), no tuning; perplexity on its validation"
        f" split in windows of {LENGTH}; one draw. Seconds are the mean over the widths.",
        f"- *four times the text*: {4 * said['tokens']:,} tokens for calibration.",
        *common.footer(results),
    ]
    return f"# Data-aware fusion by effort ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--task", default="tinystories")
    parser.add_argument("--mix", type=float, default=0.0)
    parser.add_argument("--only", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"efforts_{given.model.name.lower()}"
    tokenizer = load_tokenizer(given.model)
    held = windows(tokenizer, text_of(given.task, "validation"))[:, :LENGTH]
    conditions = {"model": given.model.name, "widths": given.widths, "tokens": given.tokens, "task": given.task}
    conditions |= {"mix": given.mix, "seed": SEED}
    results = common.resumed(given.out, name, conditions)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text_of(given.task, "train"))
        file.flush()
        settings = tune.CalibrationSettings(text=file.name, mix=given.mix, max_length=LENGTH, batch_size=4)
        for arm in ["uncompressed", *given.only]:
            if any(row["name"] == arm for row in results["rows"]):
                continue
            row: dict[str, Any] = {"name": arm}
            seen = settings.model_copy(update={"tokens": given.tokens * TIMES.get(arm, 1)})
            busy = 0.0
            for width in given.widths:
                model = AutoModelForCausalLM.from_pretrained(given.model).eval()
                if arm in ARMS:
                    data = tune.calibration_batches(model, tokenizer, seen, seed=SEED)
                    start = time.process_time()
                    fk.fold(fk.apply(model, fk.plan(model, fk.CalibratedFusion(width, **ARMS[arm]), data=data)))
                    busy += time.process_time() - start
                row[f"{width:g}"] = perplexity(model, held)
            print(row := row | ({"seconds": busy / len(given.widths)} if busy else {}), flush=True)
            results["rows"].append(row)
            common.write(given.out, name, results, page)


if __name__ == "__main__":
    main()
