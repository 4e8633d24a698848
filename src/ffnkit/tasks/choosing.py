"""The task that a user means: one by name, or files with the names of their columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks import get, labelled
from ffnkit.tasks.classification.label_words import WordsTask
from ffnkit.tasks.classification.own import file_task
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.embeddings import task as embeddings
from ffnkit.tasks.fields import TaskFields
from ffnkit.tasks.generation.own import template_parts
from ffnkit.tasks.generation.task import GenerationTask, generation_task
from ffnkit.tasks.images.files import ARCHIVES
from ffnkit.tasks.images.task import HUB, KIND, image_task
from ffnkit.tasks.instructions import chat, forms
from ffnkit.tasks.instructions import sets as dialogues
from ffnkit.tasks.instructions.task import KIND as INSTRUCTION
from ffnkit.tasks.instructions.task import InstructionTask, instruction_task
from ffnkit.tasks.language_modelling.task import LanguageTask, text_task
from ffnkit.tasks.protocol import AnyTask

PLAIN = (".txt", ".text", ".tokens", ".md")
"""Files of plain text, which have no columns."""
LANGUAGE = "language-modelling"


class Choice(TaskFields):
    """What is said of a task, and what of it does not go together."""

    def problem(self) -> tuple[str, str, str] | None:
        """The first field that is wrong or missing whatever the files hold: its name, what was found, what to do."""
        columns = ("text", "label", "inputs", "target", "template", "kind", "label_kind")
        given = [name for name in ("train", "validation", "test", *columns) if getattr(self, name) not in (None, ())]
        if self.name is not None:
            prompted = dialogues.known(self.name) or self.name in labelled()
            given = [name for name in given if name != "template" or not prompted]
            found = f"{self.name} is given and {given[0] if given else ''} too, not both will do"
            return ("name", found, "Give a task's name, or files with their columns") if given else None
        if self.train is None:
            return "train", "no task and no file is named", "Name a task (ffnkit tasks lists them), or a file"
        if self.is_images:
            if self.kind not in (None, KIND):
                return "kind", f"{self.train} holds images", f"Leave it out, or write {KIND}"
            own = () if str(self.train).startswith(HUB) else ("text", "label")
            wrong = (*own, "inputs", "target", "template", "label_kind", "stride", "head")
            other = next((name for name in wrong if getattr(self, name) not in (None, ())), None)
            return (other, "images have the class of their folder", "Leave it out") if other else None
        if self.is_instruction:
            wrong = ("text", "label", "inputs", "target", "label_kind", "stride", "head")
            other = next((name for name in wrong if getattr(self, name) not in (None, ())), None)
            return (other, f"dialogues have the columns {forms.FORMS}", "Leave it out") if other else None
        if self.inputs or self.target is not None:
            for name in ("inputs", "target"):
                if not getattr(self, name):
                    found = "is missing: a generation task of files needs inputs and target"
                    return name, found, f"Name a column; {self._columns}"
            other = next((name for name in ("text", "label", "kind", "label_kind") if name in given), None)
            return (other, "inputs and target make it a generation task", "Leave it out") if other else None
        if self.template is not None and self.label is None:
            return "template", "there are no inputs and no target, and no text and label", "Name their columns"
        if self.is_language:
            other = next((name for name in ("label", "label_kind") if name in given), None)
            return (other, "plain text has no labels", "Leave it out") if other else None
        if not self.text:
            found = "is missing: a task of files with labels needs train, text and label"
            do = "Name a column of text, or inputs and a target for a generation task"
            return "text", found, f"{do}; the columns of dialogues ({forms.FORMS}) were not found: {self._columns}"
        if self.is_triplets:
            other = next((name for name in ("metric", "label_kind", "kind", "template") if getattr(self, name)), None)
            return (other, "triplets have no labels, and one metric", "Leave it out") if other else None
        if self.label is None:
            do = f"Name one; for {LANGUAGE} give a .txt file or the kind {LANGUAGE}"
            return (
                "label",
                "is missing: a task of files with labels needs train, text and label",
                f"{do}; {self._columns}",
            )
        if len(self.text) > 2:
            return "text", f"names {len(self.text)} columns", "Give 1 or 2"
        return None

    @property
    def _columns(self) -> str:
        """The columns of the file to train on, in words."""
        there = forms.columns_at(str(self.train)) if self.train is not None else []
        return f"the file has {', '.join(map(repr, there))}" if there else "the file has no columns that can be read"

    @property
    def is_language(self) -> bool:
        """Whether files are for language modelling."""
        plain = self.train is not None and Path(self.train).suffix.lower() in PLAIN
        return self.kind == LANGUAGE or (plain and not self.inputs and not self.text and self.label is None)

    @property
    def is_instruction(self) -> bool:
        """Whether files hold dialogues: by ``kind``, or by their columns where none is named."""
        if self.train is None or self.name is not None or self.kind is not None:
            return self.kind == INSTRUCTION and self.name is None
        named = (self.inputs, self.target, self.text, self.label, self.label_kind, self.stride, self.head)
        if any(each not in (None, ()) for each in named):
            return False
        return forms.form_of(forms.columns_at(self.train)) is not None

    @property
    def is_triplets(self) -> bool:
        """Whether files hold an anchor, a near text and a far one in each row."""
        return self.head == embeddings.HEAD and self.label is None and len(self.text) == 3

    @property
    def is_images(self) -> bool:
        """Whether it is about images: a folder, an archive or a set of the hub, and no columns of tables."""
        if self.train is None or self.name is not None:
            return False
        path = Path(os.path.expandvars(str(self.train))).expanduser()
        plain = not self.inputs and not self.text and self.target is None and self.label is None
        there = os.path.exists(path)  # False, and no error, for names that no file can have
        looks = os.path.isdir(path) or path.suffix.lower() in ARCHIVES or not (path.suffix or there)
        return self.kind == KIND or str(self.train).startswith(HUB) or (plain and self.kind is None and looks)

    @property
    def where(self) -> str:
        """The task in words: its name, or its files and columns."""
        if self.name is not None:
            return self.name
        columns = {"text": self.text, "label": self.label, "inputs": self.inputs, "target": self.target}
        plain = "images" if self.is_images else "dialogues" if self.is_instruction else "plain text"
        reads = ", ".join(columns["inputs"] or columns["text"] or (plain,))
        right = self.target or self.label
        return f"{self.train} ({reads}{f' -> {right}' if right else ''})"


def choose(
    names: Mapping[str, str] | None = None, *, whole: bool = False, label_names: Sequence[str] = (), **fields: Any
) -> AnyTask:
    """The task of a :class:`Choice`, its files read and checked.

    Args:
        names: what the user calls the fields, for the errors ({"label": "--label-column"}).
        whole: to evaluate: where one file is named, as ``train`` or ``validation``, it is reported whole, and there is
            nothing to train on.
        label_names: the classes of the model that is evaluated; see :func:`ffnkit.tasks.classification.labels.decide`.
        fields: of :class:`Choice`.

    Raises:
        FfnkitError: fields that do not go together, no such task, files that cannot be used.
    """
    lone = whole and not (fields.get("train") and fields.get("validation"))
    if lone and fields.get("name") is None:
        fields |= {"train": fields.get("train") or fields.get("validation"), "validation": None}
    choice = Choice(**fields)
    if problem := choice.problem():
        field, found, do = problem
        raise FfnkitError((names or {}).get(field, field), found, do)
    if choice.name is not None:
        return _adapted(get(choice.name), choice)
    assert choice.train is not None
    files: dict[str, Any] = {"train": choice.train, "validation": choice.validation, "test": choice.test}
    if lone and not str(choice.train).startswith(HUB):  # a set of the hub brings its own splits
        files |= {"train": None, "validation": choice.train}
    task: AnyTask
    if choice.is_images:
        more: dict[str, Any] = {"image": next(iter(choice.text), None), "label": choice.label}
        task = image_task(**files, **more, label_names=label_names)
    elif choice.is_instruction:
        task = instruction_task(**files, template=choice.template, metrics=_several(choice.metric or ""))
    elif choice.target is not None:
        more = {"metrics": _several(choice.metric)} if choice.metric else {}
        task = generation_task(
            **files, inputs=tuple(choice.inputs), target=choice.target, template=choice.template, **more
        )
    elif choice.is_language:
        more = {"column": choice.text[0]} if choice.text else {}
        task = text_task(**files, **more)
    elif choice.is_triplets:
        return embeddings.triplet_task(**files, text=choice.text)
    else:
        assert choice.label is not None
        kind = "number" if choice.head == embeddings.HEAD else choice.label_kind
        more = {"metric": choice.metric, "label_kind": kind, "label_names": label_names}
        task = file_task(**files, text=tuple(choice.text), label=choice.label, **more)
    return _adapted(task, choice)


def _adapted(task: AnyTask, choice: Choice) -> AnyTask:
    """With the metric, stride, template and head that were asked for."""
    if choice.template is not None and choice.name is not None and isinstance(task, InstructionTask):
        task = replace(task, template=chat.check_template(choice.template))
    if choice.template is not None and isinstance(task, Task):
        template_parts(choice.template, task.text)
        task = replace(task, template=choice.template)
    if choice.stride is not None:
        if not isinstance(task, LanguageTask):
            raise FfnkitError(f"stride {choice.stride}", f"task {task.name} is a {task.kind}", "Leave it out")
        task = replace(task, stride=choice.stride)
    if choice.head == "words":
        if not isinstance(task, Task):
            raise FfnkitError("head 'words'", f"task {task.name} is a {task.kind}", "Leave it out")
        task = WordsTask(task)
    if choice.head == embeddings.HEAD:
        if not isinstance(task, Task):
            raise FfnkitError("head 'cosine'", f"task {task.name} is a {task.kind}", "Leave it out")
        task = embeddings.similarity_task(task)
    if choice.metric is None or choice.name is None:
        return task
    if isinstance(task, GenerationTask | InstructionTask):
        return task.with_metrics(_several(choice.metric))
    if choice.metric not in task.metrics:
        found = f"task {task.name} has no such metric"
        raise FfnkitError(f"metric {choice.metric!r}", found, f"Use {' or '.join(task.metrics)}")
    return task


def _several(metric: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in metric.split(",") if part.strip())
