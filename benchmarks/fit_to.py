"""One target for a model against narrowing alone and layers alone, before any tuning.

    FFNKIT_DATA=... python benchmarks/fit_to.py MODEL [--params 0.8] [--tokens 8192] [--text FILE] [--novel FILE]

MODEL, a folder, keeps this share of all its parameters in each arm: by ``fit-to``, by one width for all FFNs
(``calibrated-fusion``, by default and with effort=fast), and by a window of whole layers (``layer-drop``). Calibration:
half WikiText-2's validation split or the file ``--text``, half ffnkit's text of many kinds. Perplexity in windows of
512 tokens on WikiText-2's test split and on a text of another kind. Results are kept after each arm: run again, it goes
on.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

import common
import torch
from carry_over import SEED, perplexity, text_of, windows
from transformers import AutoModelForCausalLM

import ffnkit as fk
from ffnkit import tune
from ffnkit.budget.fitting import FitTo
from ffnkit.methods.drop.layers import LayerDrop
from ffnkit.tasks.models import load_tokenizer


def fitted(model: Any, share: float, data: Any) -> Any:
    return fk.plan(model, FitTo(params=share), data=data, progress=told)


def one_width(model: Any, share: float, data: Any, effort: str = "default") -> Any:
    total, ffn = sum(p.numel() for p in model.parameters()), fk.inspect(model).ffn_parameters
    widths = fk.allocate(model, ffn - round((1 - share) * total), uniform=True, multiple=8)
    return fk.plan(model, fk.CalibratedFusion(width=dict(widths), effort=effort), data=data)  # type: ignore[arg-type]


def window(model: Any, share: float, data: Any) -> Any:
    total = sum(p.numel() for p in model.parameters())
    layer = fk.plan(model, LayerDrop(layers="first:1")).saved_parameters
    return fk.plan(model, LayerDrop(window=math.ceil((1 - share) * total / layer)), data=data)


ARMS = {
    "fit-to": fitted,
    "calibrated-fusion at one width": one_width,
    "the same, effort=fast": functools.partial(one_width, effort="fast"),
    "a window of layers": window,
}


def told(done: int, total: int, what: str) -> None:
    print(f"{done}{f' of {total}' * bool(total)}: {what}", flush=True)


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said = results["conditions"]
    texts = said["texts"]
    lines = [["", "parameters", *texts, "planning, s of the processor"], [":--", "--:", *["--:"] * len(texts), "--:"]]
    for row in results["rows"]:
        seconds = f"{row['processor seconds']:.0f}" if "seconds" in row else ""
        lines.append([row["name"], f"{row['share']:.1%}", *(f"{row[name]:.1f}" for name in texts), seconds])
    table = common.table(lines)
    notes = [
        f"- {said['model']} in {said['dtype']}, {said['params']:g} of all parameters, {said['tokens']:,} tokens of"
        f" calibration, no tuning; perplexity on {said['measured']:,} tokens of each text in windows of 512; one draw.",
        *common.footer(results),
    ]
    return f"# One target ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--params", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--text", type=Path, help="calibration text; WikiText-2's validation split unless given")
    parser.add_argument("--novel", type=Path, help="a text of another kind; stories unless given")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    name = f"fit_to_{given.model.name.lower()}"
    tokenizer = load_tokenizer(given.model)
    other = given.novel.read_text(encoding="utf-8") if given.novel else text_of("tinystories", "validation")
    texts = {"WikiText-2": text_of("wikitext2", "test"), "a novel" if given.novel else "stories": other}
    held = {text: windows(tokenizer, content)[:: 16 // given.windows] for text, content in texts.items()}
    base = AutoModelForCausalLM.from_pretrained(given.model).eval()
    whole = sum(p.numel() for p in base.parameters())
    conditions = {
        "model": given.model.name, "params": given.params, "tokens": given.tokens, "seed": SEED, "texts": list(held),
        "text": given.text.parent.name if given.text else "wikitext2",
        "dtype": str(base.dtype).removeprefix("torch."), "measured": min(map(torch.Tensor.numel, held.values())),
    }  # fmt: skip
    results = common.resumed(given.out, name, conditions)
    file = given.text or Path(os.environ["FFNKIT_DATA"]) / "wikitext2" / "validation.txt"
    for arm in ("uncompressed", *ARMS):
        if any(row["name"] == arm for row in results["rows"]):
            continue
        model = AutoModelForCausalLM.from_pretrained(given.model).eval()
        row: dict[str, Any] = {"name": arm}
        if arm in ARMS:
            settings = tune.CalibrationSettings(tokens=given.tokens, text=str(file))
            data = tune.calibration_batches(model, tokenizer, settings, seed=SEED)
            start, busy = time.perf_counter(), time.process_time()
            plan = ARMS[arm](model, given.params, data)
            row |= {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
            row |= {"target": plan.report["target"]} if "target" in plan.report else {}
            fk.apply(model, plan)
        row["share"] = sum(p.numel() for p in model.parameters()) / whole
        row |= {text: perplexity(model, ids) for text, ids in held.items()}
        print(row, flush=True)
        results["rows"].append(row)
        common.write(given.out, name, results, page)


if __name__ == "__main__":
    main()
