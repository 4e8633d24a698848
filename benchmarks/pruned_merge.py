"""What merging an update into a pruned weight costs, and what keeping the zeros costs: MiniLM on SST-2 by DSEE.

    python benchmarks/pruned_merge.py [--out benchmarks/results]

Rank 8 on query and value, 60 steps of 16 rows, half of both pools pruned by ABS, 60 steps more. The loss is of 256 rows
held out of train; three seeds draw batches, updates and the head.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, footer, started, write

import ffnkit as fk
from ffnkit import tasks
from ffnkit.io.quickstart import model_path
from ffnkit.report.sparsity import merge_costs, sparsity
from ffnkit.tasks.running import encoded_rows
from ffnkit.tune import seed_everything

SEEDS, STEPS, ROWS, HELD_OUT, LENGTH, RATE = (0, 1, 2), 60, 16, 256, 64, 1e-3


def batches(data: Any, collate: Any, order: list[int]) -> Iterator[Any]:
    """Batches of the rows in this order."""
    for start in range(0, len(order), ROWS):
        yield collate([data[i] for i in order[start : start + ROWS]])


def tuned(model: Any, found: Iterator[Any]) -> None:
    """A stage of training, over all batches that there are."""
    optimizer = torch.optim.AdamW(fk.trainable_parameters(model), lr=RATE, weight_decay=0.0)
    model.train()
    for batch in found:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def run(task: Any, splits: Any, seed: int) -> dict[str, tuple[float, float]]:
    """Loss and zeros of each state."""
    seed_everything(seed)
    tokenizer = task.load_tokenizer(model_path())
    model = task.load_model(model_path(), tokenizer=tokenizer)
    collate = task.collator(tokenizer, model)
    train, dev = (encoded_rows(task, rows, tokenizer, LENGTH, model) for rows in (splits.train, splits.dev))
    held_out = list(batches(dev, collate, list(range(len(dev)))))
    order = torch.randperm(len(train)).tolist()
    first, second = (order[start : start + STEPS * ROWS] for start in (0, STEPS * ROWS))
    fk.apply(model, fk.plan(model, fk.DSEE(rank=8, seed=seed)))
    tuned(model, batches(train, collate, first))
    states = {"tuned, not pruned": (merge_costs(model, held_out).apart, sparsity(model).share())}
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5, mode="ABS")))
    states["pruned, before the second tuning"] = merge_costs(model, held_out).apart, sparsity(model).share()
    tuned(model, batches(train, collate, second))
    costs = merge_costs(model, held_out)
    states["recovered, updates apart"] = costs.apart, costs.zeros["apart"]
    states["merged"] = costs.merged, costs.zeros["merged"]
    states["merged with zeros kept"] = costs.masked, costs.zeros["masked"]
    return states


def measured() -> list[dict[str, Any]]:
    """By state the losses, their mean and deviation, and the zeros, which all seeds share."""
    task = tasks.get("sst2")
    splits = task.splits(dev=HELD_OUT)
    runs = [run(task, splits, seed) for seed in SEEDS]
    found = []
    for name in runs[0]:
        losses = [each[name][0] for each in runs]
        found.append(
            {
                "name": name,
                "losses": losses,
                "loss": statistics.mean(losses),
                "deviation": statistics.stdev(losses),
                "zeros": statistics.mean(each[name][1] for each in runs),
            }
        )
    return found


def page(results: dict[str, Any]) -> str:
    rows = [
        f"| {row['name']} | {row['loss']:.3f} ± {row['deviation']:.3f} | {row['zeros']:.1%} |"
        for row in results["states"]
    ]
    head = ["# Merging into pruned weights (MiniLM, SST-2)", "", "| | loss | zeros |", "|:--|--:|--:|"]
    note = f"- {len(SEEDS)} seeds; loss of {HELD_OUT} rows held out of train, mean and deviation."
    return "\n".join([*head, *rows, "", note, *footer(results), ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    write(options.out, "pruned_merge", started() | {"states": measured()}, page)
