"""Tasks: data with a seeded split, encoding, and metrics. ``names()`` lists them and ``get(name)`` gives one."""

from __future__ import annotations

from ffnkit.errors import FfnkitError

from .base import Splits, Task
from .own import file_task

__all__ = ["Splits", "Task", "file_task", "get", "names"]


def names() -> list[str]:
    """The tasks that :func:`get` knows, in the order of the documentation."""
    return list(_known())


def get(name: str) -> Task:
    """The task called ``name``; nothing is read before :meth:`Task.splits`.

    Raises:
        FfnkitError: there is no such task.
    """
    known = _known()
    if name not in known:
        do = f"Choose one of {', '.join(known)}, or use file_task for files of your own"
        raise FfnkitError(f"task {name!r}", "there is no such task", do)
    return known[name]


def _known() -> dict[str, Task]:
    from .docstrings import TASK
    from .glue import TASKS

    return {task.name: task for task in (*TASKS, TASK)}
