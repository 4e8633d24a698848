"""Tasks: data with a seeded split, encoding, and metrics. ``names()`` lists them and ``get(name)`` gives one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from ffnkit.tasks.choosing import choose as choose
    from ffnkit.tasks.classification.label_words import WordsTask as WordsTask
    from ffnkit.tasks.classification.own import file_task as file_task
    from ffnkit.tasks.classification.task import Task as Task
    from ffnkit.tasks.generation.task import GenerationTask as GenerationTask
    from ffnkit.tasks.generation.task import generation_task as generation_task
    from ffnkit.tasks.images.task import ImageTask as ImageTask
    from ffnkit.tasks.images.task import image_task as image_task
    from ffnkit.tasks.instructions.task import InstructionTask as InstructionTask
    from ffnkit.tasks.instructions.task import instruction_task as instruction_task
    from ffnkit.tasks.language_modelling.task import LanguageTask as LanguageTask
    from ffnkit.tasks.language_modelling.task import text_task as text_task
    from ffnkit.tasks.protocol import AnyTask as AnyTask
    from ffnkit.tasks.protocol import Evaluation as Evaluation
    from ffnkit.tasks.rows.splitting import Splits as Splits
    from ffnkit.tasks.settings import GenerationSettings as GenerationSettings

_HOMES = {
    "AnyTask": "protocol",
    "Evaluation": "protocol",
    "GenerationSettings": "settings",
    "Splits": "rows.splitting",
    "Task": "classification.task",
    "choose": "choosing",
    "file_task": "classification.own",
    "GenerationTask": "generation.task",
    "generation_task": "generation.task",
    "ImageTask": "images.task",
    "image_task": "images.task",
    "InstructionTask": "instructions.task",
    "instruction_task": "instructions.task",
    "LanguageTask": "language_modelling.task",
    "text_task": "language_modelling.task",
    "WordsTask": "classification.label_words",
}
__all__ = ["get", "labelled", "names", *_HOMES]


def names() -> list[str]:
    """The tasks that :func:`get` knows, in the order of the documentation."""
    return list(_known())


def get(name: str) -> AnyTask:
    """The task called ``name``; nothing is read before its ``splits``.

    "images:PATH" is image classification on a folder or archive, which is read at once (:func:`image_task`);
    "oasst1:LANGUAGE,..." dialogues in these languages.

    Raises:
        FfnkitError: there is no such task.
    """
    from ffnkit.tasks.images.task import PREFIX, image_task
    from ffnkit.tasks.instructions import sets as dialogues
    from ffnkit.tasks.instructions.task import InstructionTask

    if name.startswith(PREFIX):
        return image_task(name.removeprefix(PREFIX))
    if dialogues.known(name):
        return InstructionTask(dialogues.get(name))
    known = _known()
    if name not in known:
        do = f"Choose one of {', '.join(known)}, or use file_task for files of your own"
        raise FfnkitError(f"task {name!r}", "there is no such task", do)
    return known[name]


def labelled() -> list[str]:
    """Those of them whose rows are labelled texts."""
    from ffnkit.tasks.classification.task import Task

    return [name for name, task in _known().items() if isinstance(task, Task)]


def _known() -> dict[str, AnyTask]:
    from ffnkit.tasks.classification.docstrings import TASK
    from ffnkit.tasks.classification.glue import TASKS
    from ffnkit.tasks.generation import sets as nlg
    from ffnkit.tasks.generation.task import GenerationTask
    from ffnkit.tasks.images.sets import TASKS as IMAGES
    from ffnkit.tasks.instructions import sets as dialogues
    from ffnkit.tasks.instructions.task import InstructionTask
    from ffnkit.tasks.language_modelling import sets as language
    from ffnkit.tasks.language_modelling.task import LanguageTask

    known: list[AnyTask] = [*TASKS, TASK]
    known += [GenerationTask(nlg.get(name)) for name in nlg.names()]
    known += [InstructionTask(dialogues.get(name)) for name in dialogues.names()]
    known += [LanguageTask(language.get(name)) for name in language.names()]
    known += IMAGES
    return {task.name: task for task in known}


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
