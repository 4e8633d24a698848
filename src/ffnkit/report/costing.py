"""Measuring what a compression cost: a model beside the one that it was, on text that was kept apart from every fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, evaluating, kept
from ffnkit.io.files import spooled
from ffnkit.io.progress import counted
from ffnkit.report.cost import GRAM, Cost, Figures
from ffnkit.tune.answers import Answers, Kind, answers, kind_of
from ffnkit.tune.distil_logits import softened_kl

CHUNK = 1 << 22  # numbers of float32 logits worked on at a time
NEW = 64  # tokens of a continuation
PROMPT, PROMPTS = 32, 8  # tokens of a prompt, and how many there are at most


class Before:
    """What a model says before it is changed, kept to be compared with what it says afterwards.

    Memory: the answers of the tokens measured, of a language model a logit for each word of the vocabulary, in the
    model's type; in a temporary file where that is large. No second model.

    Args:
        model: the uncompressed model.
        places: batches by place, such as "in" and "out" of the calibration text.
        names: what the places are, in words.
        metric: gives a task's metrics of a model, by name. rows: of that task.
        repetition: generate, where the model is a decoder.

    Raises:
        FfnkitError: the model gives neither logits nor hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Iterable[Batch]],
        *,
        names: Mapping[str, str] | None = None,
        metric: Callable[[nn.Module], Mapping[str, float]] | None = None,
        rows: int = 0,
        repetition: bool = True,
    ) -> None:
        self.places = {place: kept(batches) for place, batches in places.items()}
        self.metric = metric
        first = next((batches[0] for batches in self.places.values()), None)
        with evaluating(model):
            self.kind: Kind | None = kind_of(model, first) if first is not None else None
        self._answers: dict[str, list[Tensor]] = {}
        self.prompts = _prompts(model, self.places) if repetition and self.kind == "words" else None
        self.cost = Cost({}, {"task": rows} if metric is not None else {}, dict(names or {}))
        self.cost.stages["uncompressed"] = self._figures(model)

    def compare(self, model: nn.Module, stage: str = "compressed") -> Cost:
        """The figures of the model at a later stage, beside those of all stages before."""
        self.cost.stages[stage] = self._figures(model)
        return self.cost

    @torch.no_grad()
    def _figures(self, model: nn.Module) -> Figures:
        figures = Figures()
        with evaluating(model):
            for place, batches in self.places.items():
                figures.places[place] = self._place(model, place, batches)
            if self.prompts is not None:
                figures.repetition = repetition(model, self.prompts)
        if self.metric is not None:
            figures.metrics = dict(self.metric(model))
        return figures

    def _place(self, model: nn.Module, place: str, batches: list[Batch]) -> dict[str, float]:
        first = place not in self._answers
        sums = _Sums()
        held = self._answers.setdefault(place, [])
        for number, batch in enumerate(counted(batches, "what it costs")):
            said = answers(model, batch, self.kind)
            if first:
                held.append(spooled(said.values))
            sums.add(said, held[number])
        self.cost.rows[place] = sums.count
        return sums.figures(self.kind, first)


class _Sums:
    """Sums over rows, in float64."""

    def __init__(self) -> None:
        self.count = self.labelled = 0
        self.loss = self.kl = self.same = self.squared = self.energy = 0.0
        self.mean: Tensor | None = None

    def add(self, said: Answers, before: Tensor) -> None:
        rows, width = said.values.shape
        self.count += rows
        for part in torch.arange(rows).split(max(1, CHUNK // width)):
            ours = said.values[part.to(said.values.device)].float()
            theirs = before[part].to(ours.device).float()
            if said.kind in ("states", "numbers"):
                self.squared += float((ours - theirs).double().square().sum())
                self.energy += float(theirs.double().square().sum())
                total = theirs.double().sum(0)
                self.mean = total if self.mean is None else self.mean + total
                continue
            self.kl += float(softened_kl(ours, theirs, 1.0).double().sum())
            self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            if said.labels is not None:
                labels = said.labels[part.to(said.labels.device)]
                self.loss += float(nn.functional.cross_entropy(ours, labels, reduction="none").double().sum())
                self.labelled += len(part)

    def figures(self, kind: Kind | None, first: bool) -> dict[str, float]:
        if not self.count:
            return {}
        found: dict[str, float] = {}
        if self.labelled:
            found["perplexity"] = math.exp(min(self.loss / self.labelled, 700.0))
        if first:
            return found
        if self.mean is not None:
            spread = self.energy - float(self.mean.square().sum()) / self.count
            return {"error" if kind == "states" else "difference": self.squared / max(spread, 1e-30)}
        return found | {"kl": self.kl / self.count, "agreement": self.same / self.count}


def cost(
    original: nn.Module,
    compressed: nn.Module,
    data: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    repetition: bool = True,
) -> Cost:
    """What ``compressed`` lost of ``original`` on batches that no fit has seen.

    Args:
        data: batches for ``model(**batch)``, or several sets of them by name. Labels of a language model give the
            perplexity; without them there is KL and agreement.
        repetition: also generate greedily from the beginnings of some rows, where the model is a decoder.

    Raises:
        FfnkitError: no batches, or a model that gives neither logits nor hidden states.
    """
    places = data if isinstance(data, Mapping) and not _is_batch(data) else {"data": data}
    return Before(original, places, repetition=repetition).compare(compressed)  # type: ignore[arg-type]


def _is_batch(data: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in data.values())


def _prompts(model: nn.Module, places: Mapping[str, list[Batch]]) -> Tensor | None:
    """(prompts, PROMPT) beginnings of rows, without padding; None where the model does not write on."""
    from ffnkit.tune.distil_outputs import is_causal

    if not is_causal(model):
        return None
    found: list[Tensor] = []
    for batches in places.values():
        rows = [ids[:PROMPT] for batch in batches for ids in _whole(batch) if len(ids) >= PROMPT]
        found += rows[: PROMPTS // len(places)]
    return torch.stack(found) if found else None


def _whole(batch: Batch) -> list[Tensor]:
    """The rows of a batch without their padding."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor):
        return []
    return [row if mask is None else row[mask[number].bool()] for number, row in enumerate(ids)]


@torch.no_grad()
def repetition(model: Any, prompts: Tensor) -> float | None:
    """The share of 4-grams in greedy continuations that stood in the same continuation before; None: too short.

    Args:
        prompts: (prompts, tokens), without padding.
    """
    ids = prompts.to(next(model.parameters()).device)
    room = int(getattr(model.config, "max_position_embeddings", 0) or NEW + PROMPT) - ids.shape[1]
    if room < GRAM:
        return None
    from transformers import GenerationConfig

    length = min(NEW, room)  # the same of every prompt, past the end of a text
    plain = GenerationConfig(do_sample=False, max_new_tokens=length, min_new_tokens=length, pad_token_id=0)
    own = model.generation_config
    model.generation_config = GenerationConfig()  # what a config leaves open comes from here: penalties, beams
    try:
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = own
    written = written[:, ids.shape[1] :].tolist()
    grams = [[tuple(row[at : at + GRAM]) for at in range(len(row) - GRAM + 1)] for row in written]
    count = sum(map(len, grams))
    return 1 - sum(len(set(row)) for row in grams) / count if count else None
