"""What healing gives back of a narrowed language model, beside tuning on the next token.

    FFNKIT_DATA=... python benchmarks/healing.py MODEL [--compressed FOLDER] [--other FILE] [--tokens 200000]
        [--only ARM ...] [--out FOLDER]

All FFNs of MODEL, a folder, keep ``--width`` of their neurons, by data-aware fusion on ``--calibration`` tokens of
WikiText-2's validation split and of ffnkit's text of many kinds (or FOLDER is such a checkpoint), in closed form alone,
in widths by layer, and by the neurons' importance ("cut"), with output layers refitted too. Then each learns on the
same tokens in the same order: from the uncompressed model ("healed"), or the next token (the same loop, rate, held-out
stop and parameters). Perplexity in windows of 512 tokens, of WikiText-2's test split and of another text (a FILE, say a
novel). Results are kept after each arm.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from carry_over import perplexity, text_of, windows
from torch import nn
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import methods, tune
from ffnkit.cli import console
from ffnkit.tasks.models import load_tokenizer
from ffnkit.tune.healing import heal as healing
from ffnkit.tune.healing.data import healing_data
from ffnkit.tune.healing.settings import HealSettings

WINDOW, SEED = 512, 0
WIDTHS = "calibrated-fusion, widths by layer"
CLOSED, REFITTED = "calibrated-fusion, in closed form", "importance, refitted"
STARTS = {"calibrated-fusion": "fusion", "importance": "cut", WIDTHS: "widths by layer"}
STARTS |= {CLOSED: "fusion in closed form", REFITTED: "cut and refitted"}
MORE = {CLOSED: {"effort": "fast"}, REFITTED: {"refit": True}}
ARMS = {
    "fusion, healed": ("calibrated-fusion", {}, False),
    "fusion, healed, a quarter layer by layer": ("calibrated-fusion", {"blocks": 0.25}, False),
    "fusion, healed, four texts a step": ("calibrated-fusion", {"batch_size": 4}, False),
    "fusion, next token": ("calibrated-fusion", {}, True),
    "widths by layer, healed": (WIDTHS, {}, False),
    "cut, healed": ("importance", {}, False),
    "fusion in closed form, healed": (CLOSED, {}, False),
    "cut and refitted, healed": (REFITTED, {}, False),
}


@contextmanager
def next_token(wanted: bool) -> Iterator[None]:
    """The loss of the next token in the place of the original's answers, in what is learned and in what decides."""
    distance = healing.whole_loss

    def loss(model: Any, original: Any, batch: Any, *how: Any) -> torch.Tensor:
        found: torch.Tensor = model(**batch, use_cache=False).loss
        return found

    healing.whole_loss = loss if wanted else distance
    try:
        yield
    finally:
        healing.whole_loss = distance


def narrowed(given: argparse.Namespace, method: str, calibration: tune.CalibrationSettings, tokenizer: Any) -> Any:
    """The compressed model, from a folder where it was made before."""
    folder = given.compressed if method == "calibrated-fusion" and given.compressed else given.work / method
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(given.model).eval()
        data = tune.calibration_batches(model, tokenizer, calibration, seed=SEED)
        width = fk.allocate(model, given.width, data=data) if method == WIDTHS else given.width
        plan = fk.plan(model, methods.build(method.split(",")[0], width=width, **MORE.get(method, {})), data=data)
        fk.save(fk.apply(model, plan), folder)
    return fk.load(folder).eval()


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said, texts = results["conditions"], results["texts"]
    lines = [["", *texts, "of the lost log-perplexity back", "tokens", "minutes"]]
    lines.append([":--", *["--:"] * (len(texts) + 3)])
    for row in results["rows"]:
        back = " / ".join(f"{row['back'][text]:.0%}" for text in texts) if "back" in row else ""
        minutes = f"{row['seconds'] / 60:.1f}" if "seconds" in row else ""  # of runs beside others it is not kept
        spent = [f"{row['tokens']:,}", minutes] if "tokens" in row else ["", ""]
        lines.append([row["name"], *(f"{row[text]:.1f}" for text in texts), back, *spent])
    table = common.table(lines)
    notes = [
        f"- {said['model']} in {said['dtype']}, all FFNs at {said['width']:g} of their width; perplexity on"
        f" {said['windows'] * WINDOW:,} tokens of each text in windows of {WINDOW}; one draw. Healing on half"
        " WikiText-2's validation split, half ffnkit's text of many kinds; a second text is of neither kind.",
        "- Minutes of the processor, one thread.",
        *common.footer(results),
    ]
    return f"# What healing gives back ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--width", type=float, default=0.75)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--compressed", type=Path)
    parser.add_argument(
        "--other", type=Path, help="a file of another text, or a task and its split: tinystories/validation"
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--work", type=Path, default=Path("healing_work"))
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"healing_{given.model.name.lower()}"
    tokenizer = load_tokenizer(given.model)
    texts = {"WikiText-2": text_of("wikitext2", "test")}
    if given.other is not None and given.other.is_file():
        texts[given.other.stem] = given.other.read_text(encoding="utf-8")
    elif given.other is not None:
        texts[given.other.parent.name] = text_of(given.other.parent.name, given.other.name)
    held = {name: windows(tokenizer, text)[: given.windows] for name, text in texts.items()}
    base: nn.Module = AutoModelForCausalLM.from_pretrained(given.model).eval()
    conditions = {
        **{"model": given.model.name, "width": given.width, "windows": given.windows, "tokens": given.tokens},
        **{"dtype": str(next(base.parameters()).dtype).removeprefix("torch."), "seed": SEED},
    }
    results = common.resumed(given.out, name, conditions)
    results.setdefault("texts", [*texts])

    def measured(name: str, model: nn.Module) -> dict[str, Any]:
        return next((row for row in results["rows"] if row["name"] == name), None) or keep(
            {"name": name} | {text: perplexity(model, ids) for text, ids in held.items()}
        )

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        print(row, flush=True)
        results["rows"].append(row)
        common.write(given.out, name, results, page)
        return row

    whole = measured("uncompressed", base)
    file = Path(os.environ["FFNKIT_DATA"]) / "wikitext2" / "validation.txt"
    calibration = tune.CalibrationSettings(tokens=given.calibration, text=str(file), max_length=WINDOW, batch_size=4)
    for arm in given.only:
        if any(row["name"] == arm for row in results["rows"]):
            continue
        method, more, plain = ARMS[arm]
        model = narrowed(given, method, calibration, tokenizer)
        start = measured(STARTS[method], model)
        settings = HealSettings.model_validate({"tokens": given.tokens, **more})
        parts, decide = healing_data(model, tokenizer, settings, calibration, seed=SEED)
        began = time.process_time()
        with next_token(plain), console.progress(arm) as step:
            found = fk.heal(model, base, parts, settings, held=decide, seed=SEED, progress=step)
        row = {"name": arm, **{text: perplexity(model, ids) for text, ids in held.items()}, **found.to_dict()}
        row["seconds"] = time.process_time() - began
        row["back"] = {text: math.log(start[text] / row[text]) / math.log(start[text] / whole[text]) for text in texts}
        keep(row)


if __name__ == "__main__":
    main()
