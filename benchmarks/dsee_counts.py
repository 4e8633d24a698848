"""What of DSEE can be counted without training: zeros that merging leaves, entries that two supports have in common.

    python benchmarks/dsee_counts.py [--out benchmarks/results]

On MiniLM: half of the weights go by one-shot magnitude, in one pool, or by the update of query and value, in a pool of
their own, and the update, dense as any that trained, is merged. Supports are of 64 entries in query and value of the
first three layers.
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
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.ops import support
from ffnkit.report.sparsity import sparsity

RANK, COUNT, LAYERS = 16, 64, 3


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
            *footer(results),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    write(options.out, "dsee_counts", started() | {"zeros": zeros(), "overlap": overlap()}, page)
