"""Figures of DSEE's page are those of the stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "dsee.md").read_text(encoding="utf-8")
ARMS = {
    "full": "full",
    "LoRA r 8": "lora",
    "DSEE r 8, 64 entries": "dsee",
    "50% of weights, WABS": "half-wabs",
    "50% of weights, W": "half-w",
    "50% of weights, ABS": "half-abs",
    "50% of weights, ABS; updates of query and value alone": "half-qv-abs",
    "DSEE, updates of query and value alone": "dsee-qv",
    "25% of heads, 25% of neurons (FLOPs 0.782)": "heads-25-neurons-25",
}
ON_MINILM = {
    "LoRA r 16": "lora",
    "DSEE": "dsee",
    "50% of weights, ABS": "half-abs",
    "50%, one-shot magnitude": "half-one-shot",
    "25% of heads": "heads-25",
    "25% of heads, 25% of neurons": "heads-25-neurons-25",
}
METRICS = ("bleu", "nist", "meteor", "rougeL", "cider", "perplexity")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(first: str) -> list[list[str]]:
    """The rows of the page's table that begins with these words."""
    lines = PAGE[PAGE.index(first) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(text: str, value: float) -> bool:
    """Whether a figure is a value as it is rounded there."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5000001 * 10**-digits


def test_e2e() -> None:
    rows = {row["arm"]: row for row in results("dsee_e2e")["rows"]}
    found = table("| arm | BLEU |")
    assert {ARMS[name] for name, *_ in found} == set(rows), "every arm that ran, and no other"
    for name, *cells in found:
        metrics = rows[ARMS[name]]["metrics"]
        odd = [m for m, cell in zip(METRICS, cells, strict=True) if not shown(cell, metrics[m])]
        assert not odd, (name, odd)
    assert not shown("2.67", rows["half-wabs"]["metrics"]["perplexity"])  # the control


@pytest.mark.parametrize(("task", "column"), [("sst2", 1), ("mrpc", 3)])
def test_accuracy(task: str, column: int) -> None:
    rows = results(f"dsee_{task}")["rows"]
    for row in table("| arm | SST-2 |"):
        values = [each["metrics"]["accuracy"] for each in rows if each["arm"] == ON_MINILM[row[0]]]
        assert len(values) == 3 and shown(row[column].split(" ")[0], sum(values) / 3), row[0]


def test_zeros_that_merging_leaves() -> None:
    counted = results("dsee_counts")
    by_rule = {"50% of weights, ABS": "ABS", "50%, one-shot magnitude": "one-shot magnitude"}
    for row in table("| arm | SST-2 |"):
        if row[0] in by_rule:
            found = re.findall(r"([\d.]+)%", row[5])
            share = counted["zeros"][by_rule[row[0]]]
            assert shown(found[0], 100 * share["zeros"]) and shown(found[1], 100 * share["merged"]), row[0]
    assert f"none of {counted['overlap']['of']} entries" in " ".join(PAGE.split()) and not counted["overlap"]["common"]
