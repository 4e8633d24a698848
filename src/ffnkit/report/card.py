"""The model card of a checkpoint: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ffnkit.errors import FfnkitError
from ffnkit.io.markdown import inline
from ffnkit.report.citations import FFNKIT, OF_METHOD, OWN
from ffnkit.report.cost import Cost

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class LayerWidth:
    """Hidden neurons of one FFN (of each expert, in a mixture) before and after; None: shared with another, or gone.

    Attributes:
        written: how many there are in the file, where zeros pad it; None: as many as after.
    """

    name: str
    before: int
    after: int | None
    written: int | None = None


@dataclass(frozen=True)
class Metric:
    """One measured figure.

    Attributes:
        name, value: the metric and its value, a mean where ``seeds`` is above 1.
        dataset, split: what it was measured on; a hub id such as "nyu-mll/glue" goes into the front matter.
        config: configuration of the dataset, such as "sst2" of glue.
        task: the hub's name of the kind of task.
        std: standard deviation over seeds.
        seeds: number of seeds behind the value.
        baseline: the same figure of the uncompressed model, tuned in the same way.
    """

    name: str
    value: float
    dataset: str
    split: str = "validation"
    config: str | None = None
    task: str = "text-classification"
    std: float | None = None
    seeds: int = 1
    baseline: float | None = None


Form = Literal["compact", "standard", "nemotron-nas", "apart", "added"]


@dataclass(frozen=True)
class CardInfo:
    """What a model card says; what is empty is said to be not known or not measured, never guessed.

    Attributes:
        base_model: hub id, or the folder of the model that was changed.
        form: "compact" (opens with ffnkit), "standard" (opens with plain transformers), "nemotron-nas" (with the code
            beside it), "apart" (a base and what is tuned beside it) or "added" (a base, and what no weight can hold).
        method, settings: the method and its settings; method None: the FFNs were left as they were.
        layers: width of every FFN before and after.
        metrics: measured figures.
        training: settings of tuning and distillation, as names and values.
        cost: what the compression lost, as :meth:`ffnkit.report.cost.Cost.to_dict` gives it.
        healing: settings of the healing after it, as names and values.
        figures: other measured values by name ("parameters", "latency of a batch of 32"), already in words.
        versions: of packages, as ``ffnkit.report.measure.versions`` gives them.
        citations: BibTeX entries beyond those of the method and ffnkit.
        notes: limitations and remarks, one sentence each.
        name: of the checkpoint, as its title.
        auto_class: the transformers class that opens it.
        own_class: the model's class is ffnkit's, so that in either form ffnkit has to be imported.
        license, datasets, language, pipeline_tag: for the front matter, where known.
    """

    base_model: str
    form: Form = "compact"
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[LayerWidth] = ()
    metrics: Sequence[Metric] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    healing: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    citations: Sequence[str] = ()
    notes: Sequence[str] = ()
    name: str | None = None
    auto_class: str = "AutoModel"
    own_class: bool = False
    license: str | None = None
    datasets: Sequence[str] = ()
    language: str | None = None
    pipeline_tag: str | None = None

    @property
    def base_name(self) -> str:
        """The base model without the folders of whoever made the checkpoint."""
        return self.base_model if _on_hub(self.base_model) else Path(self.base_model).name or "a local model"

    @property
    def title(self) -> str:
        parts = (self.base_name.split("/")[-1], self.method, self.form)
        return self.name or "-".join(part for part in parts if part)


def layer_widths(
    before: Iterable[Any], after: Iterable[Any], written: Mapping[str, int] | None = None
) -> tuple[LayerWidth, ...]:
    """Widths of two inventories, row by row; rows have ``name`` and ``width``, as attributes or keys.

    Args:
        written: widths in the file, by name, where they may be others.
    """
    now, held = {_get(row, "name"): _get(row, "width") for row in after}, written or {}
    rows = ((_get(row, "name"), _get(row, "width")) for row in before)
    return tuple(LayerWidth(name, width, now.get(name), held.get(name)) for name, width in rows)


def _get(row: Any, key: str) -> Any:
    return row[key] if isinstance(row, Mapping) else getattr(row, key)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of an id on the hub."""
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def _on_hub(model: str) -> bool:
    """Whether ``model`` is taken from the hub: a folder of that name would come first."""
    return is_hub_id(model) and not os.path.exists(Path(model))


def model_card(info: CardInfo) -> str:
    """README.md of a checkpoint: front matter, what it is, how to open it, measured figures, tuning, limits, citation.

    Raises:
        FfnkitError: ``form`` is none of these.
    """
    if info.form not in get_args(Form):
        do = f"Use {', '.join(get_args(Form))}"
        raise FfnkitError(f"a model card of form '{info.form}'", "there is no such form", do)
    sections = [
        f"# {inline(info.title)}",
        _what(info),
        "## How to open it\n\n" + _opening(info),
        "## Measured figures\n\n" + _figures(info),
        *(["## What the compression cost\n\n" + _cost(info.cost)] if info.cost else []),
        *(["## How it was healed\n\n" + _pairs(info.healing)] if info.healing else []),
        "## How it was tuned\n\n" + (_pairs(info.training) or "Not tuned, or not recorded."),
        "## Limitations\n\n" + _limits(info),
        *(["## Versions\n\n" + _pairs(info.versions)] if info.versions else []),
        "## Citation\n\n" + _citation(info),
    ]
    return f"---\n{front_matter(info).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


# -------------------------------------------------------------------------------------------- front matter
def front_matter(info: CardInfo) -> ModelCardData:
    """The metadata; ids that the hub would refuse (folders, names of files) are left to the text."""
    from huggingface_hub import ModelCardData

    results = [_result(metric) for metric in info.metrics if math.isfinite(metric.value)]
    named = [metric.dataset for metric in info.metrics if "/" in metric.dataset]  # a bare name may be a user's file
    data = [name for name in dict.fromkeys([*info.datasets, *named]) if is_hub_id(name)]
    return ModelCardData(
        base_model=info.base_model if _on_hub(info.base_model) else None,
        library_name="transformers",
        tags=["ffnkit", *([info.method] if info.method else []), f"ffnkit-{info.form}"],
        license=info.license,
        language=info.language,
        pipeline_tag=info.pipeline_tag,
        datasets=data or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=info.title if results else None,
        eval_results=results or None,
    )


def _result(metric: Metric) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=metric.task,
        dataset_type=metric.dataset,
        dataset_name=f"{metric.dataset} ({metric.config})" if metric.config else metric.dataset,
        dataset_config=metric.config,
        dataset_split=metric.split,
        metric_type=metric.name,
        metric_name=metric.name,
        metric_value=float(metric.value),
    )


# ------------------------------------------------------------------------------------------------ sections
def _what(info: CardInfo) -> str:
    base = inline(info.base_name)
    origin = f"`{base}`"  # the hub links the base model from the front matter
    if info.method:
        text = f"{origin} with its feed-forward blocks changed by the method **{inline(info.method)}** of ffnkit."
    else:
        text = f"{origin}; its feed-forward blocks were left as they were."
    given = {key: value for key, value in info.settings.items() if value is not None}
    settings = f"\n\nSettings:\n\n{_pairs(given)}" if given else ""
    return text + settings + _unlike_papers(info) + _widths(info.layers)


def _unlike_papers(info: CardInfo) -> str:
    from ffnkit import methods

    found = methods.unlike_papers(info.method, info.settings) if info.method else []
    return "\n\n" + "\n".join(f"- {inline(line)}" for line in found) if found else ""


def _widths(layers: Sequence[LayerWidth]) -> str:
    """A table in which neighbours of equal widths share a line."""
    if not layers:
        return ""
    padded = any(layer.written not in (None, layer.after) for layer in layers)
    more, rule = (" in this file |", " --: |") if padded else ("", "")
    lines = ["", "", f"| FFN | hidden neurons before | after |{more}", f"| :-- | --: | --: |{rule}"]
    for (before, after, held), group in groupby(layers, key=lambda each: (each.before, each.after, each.written)):
        names = [layer.name for layer in group]
        shown = f"`{names[0]}`" if len(names) == 1 else f"`{names[0]}` to `{names[-1]}` ({len(names)})"
        written = f" {'left out' if held == 0 else after if held is None else held} |" if padded else ""
        lines.append(f"| {shown} | {before} | {'shared or dropped' if after is None else after} |{written}")
    if padded:
        lines += ["", "More in the file are neurons of zeros, or what is shared written out: outputs are equal."]
    return "\n".join(lines)


def _opening(info: CardInfo) -> str:
    if info.form == "apart":
        return (
            "The base and the updates that were tuned beside its weights lie apart, so that what was pruned is as "
            "sparse as it was made. It needs `pip install ffnkit`.\n\n```python\nimport ffnkit\n\n"
            'model = ffnkit.load("path-of-this-checkpoint")  # base/ with adapter/ on it\n```\n\n'
            "`base` opens by itself too. Where there is a folder `lora`, it is the updates in peft's form: "
            '`PeftModel.from_pretrained(base_model, "lora")`. `ffnkit export` merges the updates into plain weights; '
            "that fills zeros."
        )
    if info.form == "added":
        return (
            "What was trained is no part of any weight: `base` is the model without it and opens by itself, `adapter` "
            "holds it. `pip install ffnkit` opens both as one model:\n\n```python\nimport ffnkit\n\n"
            'model = ffnkit.load("path-of-this-checkpoint")\n```'
        )
    if info.form == "nemotron-nas":
        return (
            "Each layer has a width of its own here (NVIDIA's form, `DeciLMForCausalLM`). transformers opens it with "
            "the code beside it, and ffnkit is not needed; vLLM with `--trust-remote-code`.\n\n```python\n"
            "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("
            '"path-or-hub-id-of-this-checkpoint", trust_remote_code=True)\n```'
        )
    compact = info.form == "compact"
    what = "read the compact form" if compact else "know the class of this model"
    lines = [f"import ffnkit  # lets from_pretrained {what}"] if compact or info.own_class else []
    lines += [f"from transformers import {info.auto_class}", ""]
    lines.append(f'model = {info.auto_class}.from_pretrained("path-or-hub-id-of-this-checkpoint")')
    code = "```python\n" + "\n".join(lines) + "\n```"
    if compact:
        return (
            "This is the compact form, the smallest on disk. It needs `pip install ffnkit`, and ffnkit imported before "
            f"it is opened; without it, opening fails.\n\n{code}\n\n`ffnkit export` turns it into the standard form, "
            "which plain transformers opens."
        )
    if info.own_class:
        return f"This is the standard form, of a class that only ffnkit has: import it first.\n\n{code}"
    return f"This is the standard form: plain transformers opens it, ffnkit is not needed.\n\n{code}"


def _figures(info: CardInfo) -> str:
    metrics = [metric for metric in info.metrics if math.isfinite(metric.value)]
    if not metrics:
        scores = f"Scores on a task: {NOT_MEASURED}."
    else:
        head = "| metric | data | this model | uncompressed, tuned alike | seeds |\n| :-- | :-- | --: | --: | --: |\n"
        scores = head + "\n".join(_metric_line(metric) for metric in metrics)
    lost = [metric.name for metric in info.metrics if not math.isfinite(metric.value)]
    left_out = f"\n\nNot finite, and so left out: {', '.join(lost)}." if lost else ""
    return scores + left_out + "\n\n" + (_pairs(info.figures) or f"Size, speed and memory: {NOT_MEASURED}.")


def _cost(data: Mapping[str, Any]) -> str:
    said = "On text that this run fitted nothing to. KL in nats a token."
    return f"{Cost.from_dict(data).markdown()}\n\n{said}"


def _metric_line(metric: Metric) -> str:
    data = " ".join(part for part in (metric.dataset, metric.config, metric.split) if part)
    value = f"{metric.value:.4f}" + (f" ± {metric.std:.4f}" if metric.std is not None else "")
    baseline = NOT_MEASURED if metric.baseline is None else f"{metric.baseline:.4f}"
    return f"| {inline(metric.name)} | {inline(data)} | {value} | {baseline} | {metric.seeds} |"


def _limits(info: CardInfo) -> str:
    notes = [inline(note) for note in info.notes]
    if info.method:
        notes.append("Narrower feed-forward blocks hold less: expect losses on what was not measured above.")
    notes.append(f"The limitations, biases and licence terms of {inline(info.base_name)} apply to this model as well.")
    if any(metric.seeds < 3 for metric in info.metrics):
        notes.append("Fewer than 3 seeds are behind some figures: small differences may be chance.")
    if info.license is None:
        notes.append("The licence is not stated here; it is that of the base model and of the data.")
    else:
        notes.append(f"Licence of the base model, as its card states it: {inline(info.license)}.")
    return "\n".join(f"- {note}" for note in notes)


def _citation(info: CardInfo) -> str:
    method = info.method or ""
    entries = dict.fromkeys([*OF_METHOD.get(method, ()), *info.citations, FFNKIT])
    said = f"{OWN[method]}\n\n" if method in OWN else ""
    return said + "```bibtex\n" + "\n\n".join(entry.strip() for entry in entries) + "\n```"


def _pairs(values: Mapping[str, Any]) -> str:
    named = {str(name).replace("_", " "): _value(value) for name, value in values.items()}
    return "\n".join(f"- {inline(name)}: {inline(value)}" for name, value in named.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return ", ".join(_value(item) for item in value) if isinstance(value, list | tuple) else str(value)
