"""Trackers of training runs (tensorboard, wandb, ...): where they write, what runs are called, the last figures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.processes import is_first

LOGS = "logs"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run as trackers know it.

    Attributes:
        name: what it is called there, such as "recipe/arm/seed-0".
        folder: where trackers that write files write them.
        project: what runs of wandb are gathered under, unless WANDB_PROJECT says it.
    """

    name: str
    folder: Path
    project: str = "ffnkit"

    @property
    def id(self) -> str:
        """The same whenever the run is taken up again."""
        return hashlib.sha256(f"{self.name}\0{os.path.realpath(self.folder)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """What is told of a run at its end.

    Attributes:
        settings: what was chosen, as JSON data. figures: what was measured, by name. texts: such as the plan, by name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def trackers(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that a setting names.

    Raises:
        FfnkitError: transformers knows none of that name, or it is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if not set(names) - {"none"}:
        return []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    there = get_available_reporting_integrations()
    if "all" in names:
        return list(there)
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            do = f"Choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise FfnkitError(f"report_to {name}", "transformers knows no such tracker", do)
        if name not in there:
            raise FfnkitError(f"report_to {name}", "it is not installed", f"pip install {name}, or leave it out")
    return names


@contextmanager
def tracked(run: Run, report_to: str | Sequence[str]) -> Iterator[None]:
    """A training inside the block is logged as this run, in its folder; what the environment says goes before it."""
    names = trackers(report_to)
    if not names:
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    named = "TENSORBOARD_LOGGING_DIR" not in os.environ
    if named:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder)
    try:
        with _wandb_run(run) if "wandb" in names and is_first() else nullcontext():
            yield
    finally:
        if named:
            os.environ.pop("TENSORBOARD_LOGGING_DIR", None)


@contextmanager
def _wandb_run(run: Run) -> Iterator[Any]:
    """The run that is open in this process, which stays the user's own; else this one, ended with the block."""
    import wandb

    if wandb.run is not None:
        yield wandb.run
        return
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    how: dict[str, Any] = {} if offline else {"resume": "allow"}
    try:
        project = os.environ.get("WANDB_PROJECT", run.project)
        begun = wandb.init(project=project, name=run.name, dir=str(run.folder), id=run.id, **how)
    except Exception as error:  # of wandb: no key, no server
        do = "Run 'wandb login', or set WANDB_MODE=offline"
        raise FfnkitError("report_to wandb", " ".join(str(error).split())[:200].rstrip("."), do) from error
    try:
        yield begun
    finally:
        begun.finish()


def tell(run: Run, report_to: str | Sequence[str], record: Record) -> None:
    """Add what is known at the end to a run. A tracker that fails is told of, and nothing else is lost by it."""
    for name in trackers(report_to):
        try:
            _TELLERS.get(name, _by_accelerate)(name, run, record)
        except Exception as error:  # of a library, of its server
            log.warning("%s did not take the figures of %s: %s", name, run.name, " ".join(str(error).split())[:200])


def numbers(found: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in JSON data, under the path to it: {"metrics": {"f1": 1.0}} -> {"metrics/f1": 1.0}."""
    flat: dict[str, float] = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _tensorboard(_: str, run: Run, record: Record) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.folder)) as writer:
        for name, text in record.texts.items():
            writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()))  # Markdown's block of code
        writer.add_hparams(_plain(record.settings), dict(record.figures), run_name=".", global_step=0)


def _wandb(_: str, run: Run, record: Record) -> None:
    with _wandb_run(run) as current:
        current.config.update({**record.settings, **record.texts}, allow_val_change=True)
        current.summary.update(dict(record.figures))


def _by_accelerate(name: str, run: Run, record: Record) -> None:
    """Any other tracker that accelerate knows."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    cls = LOGGER_TYPE_TO_CLASS.get(name)
    if cls is None:
        return
    tracker = cls(run.name, str(run.folder)) if cls.requires_logging_directory else cls(run.name)
    tracker.start()
    tracker.store_init_configuration(_plain({**record.settings, **record.texts}))
    tracker.log(dict(record.figures))
    tracker.finish()


_TELLERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, truth values and texts."""
    kept = (bool, int, float, str)
    return {name: v if isinstance(v, kept) else json.dumps(v, default=str) for name, v in settings.items()}
