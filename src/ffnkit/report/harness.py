"""Figures of EleutherAI's lm-evaluation-harness, by its own code, for a model in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import hub_or_cache, load_tokenizer
from ffnkit.tasks.settings import HarnessSettings

INSTALL = "pip install 'ffnkit[eval]'"
_LOGGERS = ("lm_eval", "lm-eval")


@dataclass(frozen=True)
class HarnessFigures:
    """What the harness measured.

    Attributes:
        metrics: by task and metric, as the harness names them ("acc", "acc_norm"; with a filter "exact_match,filter").
        errors: the standard errors, likewise.
        shots: examples before each question, by task. rows: questions asked, by task.
        versions: of the harness, and of its tasks.
    """

    metrics: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    shots: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def named(self) -> dict[str, float]:
        """The metrics under the names that they have in a table with those of other tasks: "acc (hellaswag)"."""
        return {f"{name} ({task})": value for task, each in self.metrics.items() for name, value in each.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return dict(vars(self))


def check(settings: HarnessSettings) -> None:
    """Whether the harness is there and knows the tasks; nothing is downloaded.

    Raises:
        FfnkitError: it is not installed, or knows no such task.
    """
    _tasks(settings, _manager(settings))


def check_writes(model: Any, settings: HarnessSettings) -> None:
    """Raises FfnkitError for a model without a head that writes, of which the harness can ask nothing."""
    if not getattr(model, "can_generate", bool)():
        found = f"a {type(model).__name__} has no head that writes"
        do = "Give a decoder or an encoder-decoder with its language-model head"
        raise FfnkitError(f"lm-eval {', '.join(settings.tasks)}", found, do)


def harness(model: Any, settings: HarnessSettings, tokenizer: Any, *, progress: bool = False) -> HarnessFigures:
    """The figures that ``lm_eval --model hf`` gives for this model, with the harness's own seeds.

    The model runs where it is and in its dtype; its mode and the state of the random numbers are restored.

    Args:
        tokenizer: the model's name or folder, whose tokenizer is loaded as it is; or a tokenizer.
        progress: show the harness's bars.

    Raises:
        FfnkitError: the harness is not installed, knows no such task, cannot get its data, or the model writes nothing.
    """
    manager = _manager(settings)
    tasks = _tasks(settings, manager)
    asked = f"lm-eval {', '.join(settings.tasks)}"
    check_writes(model, settings)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    own = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    bars = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with _as_before(model), _quiet(), hub_or_cache(), _data_errors(asked), bars:
        wrapped = HFLM(
            pretrained=model,
            tokenizer=own,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            add_bos_token=settings.add_bos_token,
        )
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=settings.bootstrap_iters,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            system_instruction=settings.system_instruction,
            gen_kwargs=settings.gen_kwargs,
            confirm_run_unsafe_code=settings.unsafe_code,
            log_samples=False,
        )
    return _figures(found, lm_eval.__version__)


def _figures(found: Any, version: str) -> HarnessFigures:
    metrics: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, row in {**found["results"], **(found.get("groups") or {})}.items():
        for key, value in row.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or "," not in key:
                continue  # an alias, "N/A"
            name, _, chosen = key.partition(",")
            kept = errors if name.endswith("_stderr") else metrics
            name = name.removesuffix("_stderr")
            kept.setdefault(task, {})[name if chosen == "none" else f"{name},{chosen}"] = float(value)
    rows = {task: int(each["effective"]) for task, each in (found.get("n-samples") or {}).items()}
    shots = {task: int(count) for task, count in (found.get("n-shot") or {}).items()}
    return HarnessFigures(metrics, errors, shots, rows, {"lm_eval": version, **(found.get("versions") or {})})


def _manager(settings: HarnessSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        found = f"the harness is not installed ({error})"
        raise FfnkitError(f"lm-eval {', '.join(settings.tasks)}", found, INSTALL) from error
    paths = [os.path.expandvars(os.path.expanduser(path)) for path in settings.include_path]
    for path in paths:
        if not os.path.isdir(path):
            raise FfnkitError(
                f"include_path {path}", "there is no such folder", "Name a folder with YAML files of tasks"
            )
    with _quiet():
        return _indexed(TaskManager, tuple(paths))


@cache
def _indexed(manager: Any, paths: tuple[str, ...]) -> Any:
    """Reads thousands of files, once a process."""
    return manager(include_path=list(paths) or None)


def _tasks(settings: HarnessSettings, manager: Any) -> list[str]:
    """The tasks that names and patterns stand for."""
    tasks: list[str] = []
    for name in settings.tasks:
        found = manager.match_tasks([name])
        if not found:
            do = "See 'lm_eval ls tasks', or name a folder with your own by --include-path"
            raise FfnkitError(f"lm-eval {name}", "the harness knows no such task", do)
        tasks += found
    return tasks


@contextlib.contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Modes and random numbers as they were: the harness sets seeds of its own."""
    import random

    import numpy as np
    import torch

    from ffnkit.calibration.batches import eval_mode

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), eval_mode(model):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own lines only where something is wrong."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


@contextlib.contextmanager
def _data_errors(asked: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of datasets and the hub, which raise kinds of it
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        do = "Its data come from the hub: connect to the network, or name a task of local files"
        raise FfnkitError(asked, f"its data cannot be read ({line[:200].rstrip('.')})", do) from error


def lines(found: Mapping[str, Any]) -> list[Sequence[str]]:
    """Rows of a table: task, metric, value, standard error, examples before each question, questions."""
    rows: list[Sequence[str]] = []
    for task, metrics in found["metrics"].items():
        for name, value in metrics.items():
            error = found["errors"].get(task, {}).get(name)
            counts = [str(found[key].get(task, "")) for key in ("shots", "rows")]
            rows.append((task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}", *counts))
    return rows


HEADER = ("task", "metric", "value", "std. error", "shots", "rows")
