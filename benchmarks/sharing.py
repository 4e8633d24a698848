"""What fitted sharing loses before any tuning: perplexity of a story teller and a language model, and MiniLM on STS-B.

    FFNKIT_DATA=... FFNKIT_MODELS=... python benchmarks/sharing.py [--tokens 16384] [--only stories minilm smollm2]
        [--model FOLDER] [--out FOLDER]

stories260K: every group of adjacent layers shares one FFN (``calibrated-merging``, calibrated on stories of the train
split), beside the same pair without one of its FFNs (``ffn-drop``, the better of the two) and beside merging with the
output layer refitted. Perplexity on 8,192 tokens of the validation split in windows of 512. MiniLM: Spearman on STS-B's
validation split, cosine of mean embeddings; half of the FFNs saved by three pairs, by a search for as many, and by
leaving out three FFNs; with the regression and without it (``refine=0``); and each FFN narrowed in their place.
Calibration there: sentences of the train split. SmolLM2 in FOLDER: some pairs of layers, calibrated on WikiText-2's
validation split; perplexity on its test split. Results are kept after each arm: run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from carry_over import SEED, WINDOW, WINDOWS, perplexity, text_of, windows
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import ffnkit as fk
from ffnkit import methods
from ffnkit.io.quickstart import model_path
from ffnkit.tasks.models import load_tokenizer

BATCH = 64
PAIRS = ["0-1", "1-2", "2-3", "3-4"]
RUNS = ["0-2", "1-3", "2-4", "0-4"]
THREE_PAIRS = {"groups": ["0-1", "2-3", "4-5"]}
Made = Callable[[], Any]


def sharing(**which: Any) -> Made:
    return lambda: fk.CalibratedMerging(**which)


def story_arms() -> Iterator[tuple[str, str, Made]]:
    """(layers, how, the method)."""
    for layers in (*PAIRS, *RUNS):
        yield layers, "shared, fitted", sharing(layers=layers)
        yield layers, "merged, refitted", lambda layers=layers: fk.Merging(layers=layers, correct="output")
    for layer in range(5):
        yield str(layer), "left out", lambda layer=layer: methods.build("ffn-drop", layers=str(layer))
    for keep in (4, 3, 2):
        yield f"{5 - keep} of 5", "shared, searched", sharing(keep=keep)


def sentence_arms() -> Iterator[tuple[str, str, Made]]:
    yield "0-1, 2-3, 4-5", "shared, fitted", sharing(**THREE_PAIRS)
    yield "0-1, 2-3, 4-5", "merged, refitted", lambda: fk.Merging(**THREE_PAIRS, correct="output")
    yield "0-1, 2-3, 4-5", "shared, refine=0", sharing(**THREE_PAIRS, refine=0)
    yield "3 of 6", "shared, searched", sharing(keep=3, tries=3)
    yield "3 of 6", "left out, searched", lambda: methods.build("ffn-drop", window=3)
    yield "3 of 6", "left out, searched, refitted", lambda: methods.build("ffn-drop", window=3, refit=True)
    for width in (0.5, 0.25):
        for select in ("leverage", "loss", "balanced"):
            for more in ({}, {"refine_metric": "norm"}):
                if more and select == "leverage":
                    continue
                said = {"select": select} | more
                how = f"each at {width:.0%} of its width, " + ", ".join(f"{key}={value}" for key, value in said.items())
                yield "all", how, lambda width=width, said=said: fk.CalibratedFusion(width=width, **said)


def language_arms() -> Iterator[tuple[str, str, Made]]:
    for layers in ("2-3", "10-11", "20-21"):
        yield layers, "shared, fitted", sharing(layers=layers)
        yield layers, "merged, refitted", partial(fk.Merging, layers=layers, correct="output")


def language(
    folder: Path, tokens: int, fit: tuple[str, str], told: tuple[str, str], *, rows: int, some: slice, **opened: Any
) -> tuple[Callable[[], Any], list[dict[str, Any]], Callable[[Any], float]]:
    """What opens the model, its calibration batches of so many rows, and what measures it.

    Args:
        fit, told: data set and split to calibrate on, and to measure on. some: which windows are measured.
    """
    tokenizer = load_tokenizer(folder)
    held = windows(tokenizer, text_of(*told))[some]
    ids = tokenizer(text_of(*fit), return_tensors="pt", verbose=False).input_ids[0]
    pieces = ids[: tokens // WINDOW * WINDOW].view(-1, WINDOW)
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in pieces.split(rows)]
    return (
        lambda: AutoModelForCausalLM.from_pretrained(folder, **opened).eval(),
        data,
        lambda model: perplexity(model, held),
    )


def stories(tokens: int) -> tuple[Callable[[], Any], list[dict[str, Any]], Callable[[Any], float]]:
    folder, own = Path(os.environ["FFNKIT_MODELS"]) / "stories260K", "tinystories"
    splits = (own, "train"), (own, "validation")
    return language(folder, tokens, *splits, rows=4, some=slice(None), dtype=torch.float32)


def smollm2(folder: Path, tokens: int) -> tuple[Callable[[], Any], list[dict[str, Any]], Callable[[Any], float]]:
    splits = ("wikitext2", "validation"), ("wikitext2", "test")
    return language(folder, tokens, *splits, rows=1, some=slice(None, None, 2))


def sentences(tokens: int) -> tuple[Callable[[], Any], list[dict[str, Any]], Callable[[Any], float]]:
    folder = model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, rows = (
        [json.loads(line) for line in (Path(os.environ["FFNKIT_DATA"]) / "stsb" / f"{split}.jsonl").open()]
        for split in ("train", "validation")
    )
    texts = [row[key] for row in train for key in ("sentence1", "sentence2")]
    data, seen = [], 0
    for start in range(0, len(texts), BATCH):
        data.append(dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")))
        seen += int(data[-1]["attention_mask"].sum())
        if seen >= tokens:
            break

    @torch.no_grad()
    def embedded(model: Any, key: str) -> torch.Tensor:
        parts = []
        for start in range(0, len(rows), BATCH):
            texts = [row[key] for row in rows[start : start + BATCH]]
            given = tokenizer(texts, padding=True, return_tensors="pt")
            mask = given["attention_mask"][..., None].float()
            parts.append((model(**given).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    def measured(model: Any) -> float:
        likeness = torch.cosine_similarity(embedded(model, "sentence1"), embedded(model, "sentence2"))
        return float(spearmanr(likeness.numpy(), [row["label"] for row in rows]).statistic)

    return lambda: AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), data, measured


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    said = results["conditions"]
    lines = [["layers", "how", said["metric"], "parameters saved", "planning, s of the processor"]]
    lines.append([":--", ":--", "--:", "--:", "--:"])
    for row in results["rows"]:
        saved, took = f"{row.get('saved', 0):,}", f"{row.get('processor seconds', 0):.0f}"
        lines.append([row.get("found", row["layers"]), row["how"], f"{row['value']:.{said['digits']}f}", saved, took])
    table = common.table(lines)
    means = [f"- Geometric mean of the pairs, {how}: {value:.2f}." for how, value in results.get("pairs", {}).items()]
    notes = [
        f"- {said['model']}, {said['tokens']:,} tokens of calibration, no tuning; {said['measured']}; one draw.",
        *means,
        *common.footer(results),
    ]
    return f"# Fitted sharing ({said['model']})\n\n{table}\n\n" + "\n".join(notes) + "\n"


def pairs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The geometric mean over adjacent pairs of each way; of leaving out, the better FFN of each pair."""
    by = {(row["layers"], row["how"]): row["value"] for row in rows}
    found: dict[str, list[float]] = {}
    for pair in PAIRS:
        for how in ("shared, fitted", "merged, refitted"):
            found.setdefault(how, []).extend(by[pair, how] for _ in range((pair, how) in by))
        alone = [by[one, "left out"] for one in pair.split("-") if (one, "left out") in by]
        found.setdefault("the better FFN left out", []).extend(min(alone) for _ in range(len(alone) == 2))
    whole = {how: values for how, values in found.items() if len(values) == len(PAIRS)}
    return {how: math.exp(sum(map(math.log, values)) / len(values)) for how, values in whole.items()}


def study(name: str, arms: Any, opened: Any, tokens: int, said: dict[str, Any], out: Path) -> None:
    open_model, data, measure = opened(tokens)
    conditions = said | {"tokens": tokens, "seed": SEED}
    results = common.resumed(out, name, conditions)
    if not results["rows"]:
        results["rows"].append({"layers": "", "how": "uncompressed", "value": measure(open_model())})
    for layers, how, make in arms():
        if any((row["layers"], row["how"]) == (layers, how) for row in results["rows"]):
            continue
        model = open_model()
        before = sum(p.numel() for p in model.parameters())
        start, busy = time.perf_counter(), time.process_time()
        method = make()
        plan = fk.plan(model, method, data=data if method.needs_data else None)
        row = {"layers": layers, "how": how}
        row |= {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
        fk.apply(model, plan)
        row |= {"value": measure(model), "saved": before - sum(p.numel() for p in model.parameters())}
        row |= {"found": plan.report["layers"], "search": plan.report["search"]} if "search" in plan.report else {}
        print(row, flush=True)
        results["rows"].append(row)
        if name.endswith("stories260k"):
            results["pairs"] = pairs(results["rows"])
        common.write(out, name, results, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", nargs="+", choices=["stories", "minilm", "smollm2"], default=["stories", "minilm"])
    parser.add_argument("--model", type=Path, help="of smollm2")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    if "stories" in given.only:
        measured = f"perplexity on {WINDOW * WINDOWS:,} tokens of other stories in windows of {WINDOW}"
        said = {"model": "stories260K", "metric": "perplexity", "digits": 2, "measured": measured}
        study("sharing_stories260k", story_arms, stories, given.tokens, said, given.out)
    if "minilm" in given.only:
        measured = "Spearman on STS-B's validation split, cosine of mean embeddings"
        said = {"model": "all-MiniLM-L6-v2", "metric": "Spearman", "digits": 4, "measured": measured}
        study("sharing_minilm", sentence_arms, sentences, given.tokens, said, given.out)
    if "smollm2" in given.only:
        measured = f"perplexity on {WINDOW * WINDOWS // 2:,} tokens of WikiText-2's test split in windows of {WINDOW}"
        said = {"model": "SmolLM2-135M", "metric": "perplexity", "digits": 1, "measured": measured}
        study("sharing_smollm2", language_arms, partial(smollm2, given.model), given.tokens, said, given.out)


if __name__ == "__main__":
    main()
