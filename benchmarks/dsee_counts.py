"""What of DSEE can be known without training: zeros that merging leaves, entries two supports share, time.

    python benchmarks/dsee_counts.py [--out benchmarks/results]

On MiniLM: half of the weights go by one-shot magnitude, in one pool, or by the update of query and value, in a pool of
their own, and the update, dense as any that trained, is merged. Supports are of 64 entries in query and value of the
first three layers. Forward passes of the merged models of dsee_sst2.yaml take turns, on one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import footer, started, write
from transformers import AutoModel

import ffnkit as fk
from ffnkit.io.quickstart import model_path
from ffnkit.methods import build
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.ops import support
from ffnkit.report.measure import latencies
from ffnkit.report.sparsity import sparsity

RANK, COUNT, LAYERS = 16, 64, 3
BATCH, LENGTH, REPEATS = 32, 64, 40


def updated(model: Any) -> Any:
    """The model with updates of query and value, as if trained."""
    fk.apply(model, fk.plan(model, fk.DSEE(rank=RANK, nonzeros=COUNT)))
    draw = torch.Generator().manual_seed(0)
    for layer in adapter_layers(model).values():
        for part in (layer.up, layer.values):
            part.data.normal_(0, 0.01, generator=draw)
    return model


def zeros() -> dict[str, dict[str, float]]:
    """Shares of zeros by rule: below the updates, merged, and merged with zeros kept."""
    first = AutoModel.from_pretrained(model_path())
    fk.apply(first, fk.plan(first, fk.Prune(sparsity=0.5)))
    models = {"one-shot magnitude": updated(fk.fold(first))}
    for mode in ("ABS", "WABS"):
        model = updated(AutoModel.from_pretrained(model_path()))
        models[mode] = fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5, mode=mode)))
    kinds = ("zeros", "merged", "masked")
    return {name: {kind: sparsity(model).share(kind) for kind in kinds} for name, model in models.items()}


def overlap() -> dict[str, Any]:
    """Entries that svd and GreBsmo have in common, and the seconds of each."""
    model, common, total = AutoModel.from_pretrained(model_path()), 0, 0
    seconds = {"svd": 0.0, "grebsmo": 0.0}
    for layer in model.encoder.layer[:LAYERS]:
        for linear in (layer.attention.self.query, layer.attention.self.value):
            found = {}
            for name in seconds:
                start, weight = time.perf_counter(), linear.weight.detach()
                by = support.svd(weight, RANK, COUNT, 0) if name == "svd" else support.grebsmo(weight, COUNT, seed=0)
                seconds[name] += time.perf_counter() - start
                found[name] = set(by.tolist())
            common, total = common + len(found["svd"] & found["grebsmo"]), total + COUNT
    return {"common": common, "of": total, "seconds": seconds}


def times() -> dict[str, dict[str, Any]]:
    """Of each shape the time of a forward pass to that of the whole model, merged LoRA: median, quartiles."""
    models = {"LoRA": AutoModel.from_pretrained(model_path())}
    models["DSEE"] = fk.fold(updated(AutoModel.from_pretrained(model_path())))
    for name, method in {
        "one-shot magnitude": fk.Prune(sparsity=0.5),
        "25% of heads": build("heads", remove=0.25),
        "25% of heads, 25% of neurons": fk.Combined([build("heads", remove=0.25), build("magnitude", width=0.75)]),
    }.items():
        model = AutoModel.from_pretrained(model_path())
        models[name] = fk.fold(fk.apply(model, fk.plan(model, method)))
    ids = torch.randint(999, 20_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ratios = latencies({name: model.eval() for name, model in models.items()}, batch, repeats=REPEATS, threads=1).ratios
    return {name: {"ratio": each.median, "quartiles": [each.lower, each.upper]} for name, each in ratios.items()}


def page(results: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {share['zeros']:.1%} | {share['merged']:.1%} | {share['masked']:.1%} |"
        for name, share in results["zeros"].items()
    ]
    found = results["overlap"]
    return "\n".join(
        [
            "# DSEE, counted (MiniLM)",
            "",
            "| half of the weights by | zeros below the updates | merged | merged with zeros kept |",
            "|:--|--:|--:|--:|",
            *rows,
            "",
            f"- Supports of {COUNT} entries, query and value of {LAYERS} layers: svd and grebsmo have"
            f" {found['common']} of {found['of']} in common; {found['seconds']['svd']:.2f} s and"
            f" {found['seconds']['grebsmo']:.2f} s.",
            f"- A forward pass of {BATCH} x {LENGTH} tokens on one thread, in turns, to merged LoRA (quartiles): "
            + ", ".join(
                f"{name} {each['ratio']:.2f} ({each['quartiles'][0]:.2f} to {each['quartiles'][1]:.2f})"
                for name, each in results["latency"].items()
                if name != "LoRA"
            )
            + ".",
            *footer(results),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    write(options.out, "dsee_counts", started() | {"zeros": zeros(), "overlap": overlap(), "latency": times()}, page)
