"""The work behind ``ffnkit eval --lm-eval``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnkit.cli import console, describe
from ffnkit.errors import FfnkitError


def settings(
    tasks: str, include: Sequence[Path], limit: int | None, batch_size: int | None, pairs: Sequence[str]
) -> Any:
    """The settings that the options stand for. Raises FfnkitError where one is given twice, unknown or wrong."""
    from ffnkit.tasks.settings import HarnessSettings

    given: dict[str, Any] = {"tasks": tasks, "include_path": tuple(map(str, include))}
    given |= {name: value for name, value in (("limit", limit), ("batch_size", batch_size)) if value is not None}
    flags = {"tasks": "--lm-eval", "include_path": "--include-path", "limit": "--limit", "batch_size": "--batch-size"}
    for name, value in describe.parse_settings(pairs, "--lm-eval-set").items():
        if given.get(name):
            raise FfnkitError(f"--lm-eval-set {name}={value}", f"{flags[name]} is given too", "Give one of the two")
        given[name] = value
    return describe.build(HarnessSettings, given, "lm-eval", "--lm-eval-set", flags)


def run(model: str, asked: Any, tokenizer: str | None, device: Any) -> dict[str, Any]:
    """The harness's figures of a saved model, as ``--json`` prints them."""
    from ffnkit.io.architectures import load_any
    from ffnkit.io.placing import moved
    from ffnkit.report.harness import check, harness

    check(asked)
    loaded = moved(load_any(model), device)
    start = time.perf_counter()
    found = harness(loaded, asked, tokenizer or model, progress=not console.state.quiet)
    return {
        "model": model,
        "lm_eval": asked.model_dump(mode="json"),
        **found.to_dict(),
        "seconds": time.perf_counter() - start,
    }


def show(report: dict[str, Any]) -> None:
    """The table on stdout."""
    from ffnkit.report.harness import HEADER, lines

    console.table(f"lm-evaluation-harness {report['versions']['lm_eval']}", HEADER, lines(report), right=range(2, 6))
