"""Models and tokenizers for a task: the head, the padding token, and whether a trained head fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io import loading
from ffnkit.io.fitting import is_head

if TYPE_CHECKING:
    from ffnkit.tasks.classification.task import Task

logger = logging.getLogger(__name__)

HEADED = ("text-classification", "image-classification")
"""Kinds of task (the hub's names) whose models have a head of labels."""


def load_tokenizer(name_or_dir: str | Path, **kwargs: Any) -> Any:
    """See :meth:`Task.load_tokenizer`."""
    tokenizer = loading.load_tokenizer(name_or_dir, **kwargs)
    tokenizer.padding_side = "right"  # decoders number positions from the left
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if spare is None:
            found = "it has no padding token, and no end-of-text token to pad with"
            raise FfnkitError(f"tokenizer of {name_or_dir}", found, "Name another tokenizer with --tokenizer")
        tokenizer.pad_token = spare
    return tokenizer


def load_model(task: Task, name_or_dir: str | Path, *, tokenizer: Any, trained_head: bool, **kwargs: Any) -> Any:
    """See :meth:`Task.load_model`."""
    model = load_classifier(task, name_or_dir, trained_head=trained_head, **kwargs)
    set_padding(model, tokenizer, str(name_or_dir))
    return model


def load_classifier(task: Task, name_or_dir: str | Path, *, trained_head: bool, **kwargs: Any) -> Any:
    """A model of the task's class with the task's head, drawn anew where the checkpoint has no such head.

    Raises:
        FfnkitError: the model cannot be opened, or with ``trained_head`` has another head.
    """
    import torch

    kwargs = {"dtype": torch.float32, **kwargs, **_head(task)}
    stored = _stored_labels(name_or_dir, kwargs) if trained_head else []
    auto = task.auto_class(_config(name_or_dir, kwargs))
    # A body of another shape is refused by load_with_info; a head of another shape is judged here.
    model, info = loading.load_with_info(auto, name_or_dir, ignore_mismatched_sizes=True, **kwargs)
    redrawn = [key for key, *_ in info.get("mismatched_keys", ())]
    absent = [key for key in info.get("missing_keys", ()) if is_head(model, key)]
    if trained_head:
        _check_head(task, str(name_or_dir), redrawn, absent, stored)
    elif redrawn:
        logger.warning("%s: its head is for other labels than %s's, and is drawn anew", name_or_dir, task.name)
    return model


def _head(task: Task) -> dict[str, Any]:
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": task.id2label,
        "label2id": {name: index for index, name in task.id2label.items()},
        "problem_type": "single_label_classification",
    }


def _stored_labels(name_or_dir: str | Path, kwargs: dict[str, Any]) -> list[str]:
    """The class names of the checkpoint's config, by id."""
    return [str(label) for _, label in sorted((_config(name_or_dir, kwargs).id2label or {}).items())]


def _config(name_or_dir: str | Path, kwargs: dict[str, Any]) -> Any:
    from ffnkit.io.architectures import read_config

    known = {key: kwargs[key] for key in loading.HUB if key in kwargs}
    return read_config(str(name_or_dir), **known)


def _check_head(task: Task, name: str, redrawn: list[str], absent: list[str], stored: list[str]) -> None:
    asked, do = f"model {name} on task {task.name}", "Tune it on this task first, or choose the task it was tuned on"
    if redrawn:
        raise FfnkitError(asked, f"its head is for other labels: {redrawn[0]} has another shape", do)
    if absent:
        raise FfnkitError(asked, f"it has no trained head: {absent[0]} is missing from its files", do)
    if told := _other_order(task, stored):
        raise FfnkitError(asked, told, "Reorder the rows of its head, or tune it on this task")


def other_labels(task: Any, config: Any) -> str | None:
    """Why the head of an open model answers other questions than the task's; None where it fits, or the task has none.

    Args:
        config: the model's; it knows how many labels the head has, and what they are called.
    """
    own = getattr(config, "num_labels", None)
    if getattr(task, "pipeline_tag", None) not in HEADED or not hasattr(task, "num_labels"):
        return None
    if own != task.num_labels:
        return f"the model's head has {own} label{'s' * (own != 1)}, and {task.name} has {task.num_labels}"
    return _other_order(task, [str(label) for _, label in sorted((config.id2label or {}).items())])


def _other_order(task: Task, stored: list[str]) -> str | None:
    lower, own = [label.lower() for label in stored], [label.lower() for label in task.label_names]
    if sorted(lower) != sorted(own) or lower == own:
        return None
    return f"its head orders the labels {', '.join(stored)}, the task {', '.join(task.label_names)}"


def set_padding(model: Any, tokenizer: Any, name: str) -> None:
    """The tokenizer's padding token in the model's config; FfnkitError for a tokenizer that is too large for it."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None:
        if len(tokenizer) > vocabulary:
            found = f"the tokenizer knows {len(tokenizer)} tokens and the model {vocabulary}"
            do = "Use the model's own tokenizer; where tokens were added to it, resize the model's embeddings"
            raise FfnkitError(f"model {name}", found, do)
        pad = tokenizer.pad_token_id
    else:
        pad = next((each for each in (config.pad_token_id, config.eos_token_id) if each is not None), None)
        pad = pad[0] if isinstance(pad, list) else pad
    if pad is not None:
        config.pad_token_id = model.config.pad_token_id = pad
