"""Which layers do alike: CKA of FFN and attention outputs, and how well the neurons of two FFNs can be matched."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.features import Features, layers_of
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import ffns, place
from ffnkit.model.targets import select
from ffnkit.ops.matching import assign, correlation, matched, spread
from ffnkit.ops.similarity import (
    correlation_norm,
    gram_cka,
    gram_norm,
    linear_cka,
    rbf_gram,
    standardized_cka,
    unbiased_cka,
    unbiased_hsic,
)
from ffnkit.settings import WhichLayers

Matrix = list[list[float]]
RBF_ROWS = 2000  # whose distances to one another are held for each layer
TITLES = {
    "cka_ffn": "CKA, FFN outputs",
    "cka_ffn_unbiased": "unbiased CKA, FFN outputs",
    "cka_ffn_standardized": "CKA of standardized FFN outputs",
    "cka_ffn_rbf": "RBF CKA, FFN outputs",
    "cka_attention": "CKA, attention outputs",
    "cka_attention_unbiased": "unbiased CKA, attention outputs",
    "cka_attention_standardized": "CKA of standardized attention outputs",
    "cka_attention_rbf": "RBF CKA, attention outputs",
    "matched_neurons": "correlation of matched neurons",
}


@dataclass(frozen=True)
class Similarity:
    """Matrices layer by layer, symmetric, for each stack of a model, and from one stack to the next.

    Attributes:
        layers: names of the FFNs, by stack. tokens: that were compared, by stack.
        largest: by stack and by name ("ffn", "attention"), for each layer the share of the variance of its outputs that
            the largest dimension has: where it is near 1, plain CKA tells of that dimension alone.
        matrices: by stack and by name ("cka_ffn", "cka_ffn_unbiased", "cka_ffn_standardized": of dimensions that have
            one variance each, and the same with "attention";
            "matched_neurons": the mean correlation of the outputs of up, neurons matched; with ``rbf`` also
            "cka_ffn_rbf" and "cka_attention_rbf").
        across: by "encoder to decoder" and by name, a row for each layer of the first stack and a column for each of
            the second. What is compared are means over each text, for tokens of two stacks have no partners.
        texts: how many were compared across stacks.
        seconds: of the forward passes ("features"), of the matrices ("pairs"), the assignments in them ("assignments").
    """

    model: str
    layers: dict[str, list[str]]
    tokens: dict[str, int]
    matrices: dict[str, dict[str, Matrix]]
    seconds: dict[str, float] = field(default_factory=dict)
    across: dict[str, dict[str, Matrix]] = field(default_factory=dict)
    texts: int = 0
    largest: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "layers": self.layers,
            "tokens": self.tokens,
            "largest_dimension": self.largest,
            "matrices": self.matrices,
            "seconds": self.seconds,
            "across": self.across,
            "texts": self.texts,
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: similarity of its layers"]
        for stack, names in self.layers.items():
            head = f"{stack}, " if stack else ""
            for kind, shares in self.largest.get(stack, {}).items():
                told = " ".join(f"{value:5.2f}" for value in shares)
                lines.append(f"  {head}share of the largest dimension, {kind} outputs\n    {told}")
            for key, matrix in self.matrices[stack].items():
                lines.append(f"  {head}{TITLES[key]} ({self.tokens[stack]:,} tokens)")
                lines += ["    " + " ".join(f"{value:5.2f}" for value in row) for row in matrix]
            pairs: list[tuple[float, int]] = []
            for key in ("matched_neurons", "cka_ffn"):  # FFNs of unlike widths have no neurons that match
                near = self.matrices[stack].get(key)
                near_ones = [(near[i][i + 1], i) for i in range(len(names) - 1)] if near else []
                pairs = pairs or [(value, i) for value, i in near_ones if not math.isnan(value)]
            if pairs:
                _, best = max(pairs)
                lines.append(f"  {head}most alike neighbours: {names[best]} and {names[best + 1]}")
        for pair, own in self.across.items():
            for key, matrix in own.items():
                lines.append(f"  {pair}, {TITLES[key]} (means of {self.texts:,} texts)")
                lines += ["    " + " ".join(f"{value:5.2f}" for value in row) for row in matrix]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Heat maps, a row a stack."""
        from ffnkit.analysis.heatmaps import draw

        draw(self, path)


def similarity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: WhichLayers = "all",
    tokens: int = 10000,
    attention: bool = True,
    neurons: bool = True,
    rbf: bool = False,
) -> Similarity:
    """Compare all layers of each stack with one another, from one pass over the data.

    Features lie in memory-mapped files where they are large; they are compared pair by pair.

    Args:
        batches: keyword arguments for ``model(**batch)``; text, images or pairs. Padding is left out.
        layers: which FFNs. tokens: at most so many a stack. attention: compare attention outputs too.
        neurons: match the neurons of every pair of FFNs of one shape (the assignment problem for each).
        rbf: CKA under an RBF kernel too, of the first 2,000 tokens; a matrix (tokens, tokens) is held for each layer.

    Raises:
        FfnkitError: mixtures of experts, a layer without attention, fewer than 4 tokens.
    """
    chosen = select(ffns(model), layers)
    found = [layer for ffn in chosen for layer in layers_of(ffn)]
    place(found, model)
    found.sort(key=lambda ffn: ffn.layer)  # those that share stand together up to here
    kinds = ["output", *(["attention"] if attention else []), *(["up"] if neurons else [])]
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len({f.stack for f in found}) > 1
    if paired:
        kinds += ["texts", *(["attention texts"] if attention else [])]
    start = time.perf_counter()
    held = Features(model, batches, chosen, {ffn.name: kinds for ffn in chosen}, tokens)
    middle = time.perf_counter()
    by_stack: dict[str, list[FFN]] = {ffn.stack: [] for ffn in chosen}
    for ffn in found:
        by_stack[ffn.stack].append(ffn)
    short = next((stack for stack in by_stack if held.tokens[stack] < 4), None)
    if short is not None:
        raise FfnkitError("comparing layers", f"{held.tokens[short]} tokens", "Give at least 4, better thousands")
    matrices: dict[str, dict[str, Matrix]] = {}
    largest: dict[str, dict[str, list[float]]] = {}
    assigning = 0.0
    for stack, rows in by_stack.items():
        own, shares = matrices.setdefault(stack, {}), largest.setdefault(stack, {})
        for kind in ("output", "attention") if attention else ("output",):
            name = "ffn" if kind == "output" else kind
            titles = (f"cka_{name}", f"cka_{name}_unbiased", f"cka_{name}_standardized")
            found_here, shares[name] = _alignments(held, [f.name for f in rows], kind)
            own |= dict(zip(titles, found_here, strict=True))
            if rbf:
                own[f"cka_{name}_rbf"] = _rbf(held, [f.name for f in rows], kind)
        if neurons:
            own["matched_neurons"], seconds = _matchings(held, rows)
            assigning += seconds
    seconds_of = {
        "features": middle - start,
        "pairs": time.perf_counter() - middle,
        "assignments": assigning,
    }
    names = {stack: [ffn.name for ffn in rows] for stack, rows in by_stack.items()}
    across, texts = _across(held, by_stack, attention=attention, rbf=rbf) if paired else ({}, 0)
    return Similarity(type(model).__name__, names, held.tokens, matrices, seconds_of, across, texts, largest)


def _across(
    held: Features, by_stack: dict[str, list[FFN]], *, attention: bool, rbf: bool
) -> tuple[dict[str, dict[str, Matrix]], int]:
    """CKA of every layer of a stack with every layer of the next, of means over texts; and how many texts."""
    found: dict[str, dict[str, Matrix]] = {}
    texts = 0
    for (one, first), (other, second) in pairwise(by_stack.items()):
        texts = len(held.get(first[0].name, "texts"))
        if texts < 4:
            break
        own = found[f"{one} to {other}"] = {}
        for kind in ("texts", "attention texts") if attention else ("texts",):
            name = "ffn" if kind == "texts" else "attention"
            pairs = [[(held.get(a.name, kind), held.get(b.name, kind)) for b in second] for a in first]
            own[f"cka_{name}"] = [[linear_cka(x, y) for x, y in row] for row in pairs]
            own[f"cka_{name}_unbiased"] = [[unbiased_cka(x, y) for x, y in row] for row in pairs]
            own[f"cka_{name}_standardized"] = [[standardized_cka(x, y) for x, y in row] for row in pairs]
            if rbf:
                grams = {f.name: rbf_gram(held.get(f.name, kind)[:RBF_ROWS]) for f in (*first, *second)}
                own[f"cka_{name}_rbf"] = [[gram_cka(grams[a.name], grams[b.name]) for b in second] for a in first]
    return found, texts


def _rbf(held: Features, names: list[str], kind: str) -> Matrix:
    grams = [rbf_gram(held.get(name, kind)[:RBF_ROWS]) for name in names]
    return [[gram_cka(one, other) for other in grams] for one in grams]


def _alignments(held: Features, names: list[str], kind: str) -> tuple[list[Matrix], list[float]]:
    """CKA, unbiased CKA and CKA of standardized features of all pairs; the share of each one's largest dimension."""
    features = [held.get(name, kind) for name in names]
    spreads = [spread(x) for x in features]
    norms: list[Matrix] = []
    for product in (gram_norm, unbiased_hsic, correlation_norm):
        values = [[0.0] * len(names) for _ in names]
        for i, x in enumerate(features):
            for j in range(i, len(features)):
                values[i][j] = values[j][i] = product(x, features[j], spreads[i], spreads[j])
        norms.append(values)
    shares = [float(s.size.square().max() / s.size.square().sum().clamp_min(1e-300)) for s in spreads]
    return [[[_share(m, i, j) for j in range(len(m))] for i in range(len(m))] for m in norms], shares


def _share(values: Matrix, i: int, j: int) -> float:
    own = values[i][i] * values[j][j]
    return values[i][j] / math.sqrt(own) if own > 0 else 0.0


def _matchings(held: Features, rows: list[FFN]) -> tuple[Matrix, float]:
    """The mean correlation of matched neurons of all pairs (NaN for unlike widths), and the solver's seconds."""
    spreads = [spread(held.get(ffn.name, "up")) for ffn in rows]
    result = [[1.0] * len(rows) for _ in rows]
    seconds = 0.0
    for i, first in enumerate(rows):
        for j in range(i + 1, len(rows)):
            other = rows[j]
            if other.width != first.width:
                result[i][j] = result[j][i] = math.nan
                continue
            table = correlation(held.get(first.name, "up"), held.get(other.name, "up"), spreads[i], spreads[j])
            start = time.perf_counter()
            order = assign(table)
            seconds += time.perf_counter() - start
            result[i][j] = result[j][i] = matched(table, order)
    return result, seconds
