"""Where long work is: one display for a command and all below it, in a terminal and in a log."""

from __future__ import annotations

import io
import itertools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from families import FAMILIES
from test_cli import bert, good, table, verbosity  # noqa: F401 (fixtures)
from test_recipe_run import (
    folder,  # noqa: F401 (a fixture)
    recipe_of,
)

import ffnkit
from ffnkit.budget.losses import EXPECTED, Losses
from ffnkit.io import progress
from ffnkit.io.folders import staging


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every step, however short."""
    monkeypatch.setattr(progress, "EVERY", 0.0)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    yield made


def test_lines_tell_where_elapsed_and_expected(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown("compress"):
        for _ in progress.counted(range(4), "layers"):
            with progress.phase("fitting") as step:
                clock.now += 6
                step(1, 2, "a linear")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compress > layers > fitting a linear: 1 of 2 after 6 s, about 6 s left"
    assert lines[2] == "compress > layers: 2 of 4 > fitting a linear: 1 of 2 after 18 s, about 12 s left"
    assert len(lines) == 4, "a step within five seconds of a line is not told"


def test_work_that_goes_on_does_not_begin_with_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is resumed at step 901 of 1000 takes as long for the rest as it takes for a step."""
    with progress.shown("training") as step:
        step(901, 1000, "")
        clock.now += 10
        step(902, 1000, "")
    assert capsys.readouterr().err == "training: 902 of 1000 after 10 s, about 16.3 min left\n"


def test_what_comes_before_the_first_step_is_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A minute of preparation, then 5 s a layer: it was told as a minute a layer."""
    with progress.shown("planning") as step:
        clock.now += 60
        step(0, 30, "")
        clock.now += 5
        step(1, 30, "")
    assert capsys.readouterr().err.splitlines()[-1] == "planning: 1 of 30 after 65 s, about 2.4 min left"


def test_once_all_steps_are_done_none_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """What goes on then is something else, such as the evaluation after the last step: "0 s left" was told for it."""
    with progress.shown("training") as step:
        for number in (1, 2):
            clock.now += 6
            step(number, 2, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training: 1 of 2 after 6 s, about 6 s left", "training: 2 of 2 after 12 s"]


def test_one_long_step_is_seen_as_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come by the clock, not by the step: nothing is called while the work goes on."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with progress.shown("compress"), progress.phase("loading a model"):
        time.sleep(0.4)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 2 and all(line.startswith("compress > loading a model after ") for line in said)


def test_quiet_hides_all_that_is_below(every_step: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown("outer", quiet=True), progress.shown("inner") as step:
        step(1, 2, "")
        list(progress.counted([1], "items"))
    assert capsys.readouterr().err == ""


def test_a_library_user_is_told_nothing(every_step: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.phase("a phase") as step:
        step(1, 1, "")
    assert list(progress.counted(iter("ab"), "items")) == ["a", "b"]
    assert capsys.readouterr().err == "" and not progress.is_shown()
    with progress.shown("quiet", quiet=True):
        assert progress.is_shown(), "whoever is around decided"


def test_aside_is_for_those_that_show_themselves(every_step: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown("run") as step, progress.aside():
        step(1, 2, "outside")
        with progress.shown("unit") as inner:
            inner(1, 3, "inside")
    assert "unit inside: 1 of 3" in (said := capsys.readouterr().err) and "outside" not in said


def test_loops_that_are_left_are_over(every_step: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown("run") as step:
        with pytest.raises(ValueError, match="stop"):
            for _ in progress.counted(range(3), "layers"):
                raise ValueError("stop")
        step(1, 2, "after it")
    assert "layers" not in capsys.readouterr().err.splitlines()[-1]


def test_bars_of_other_libraries_are_off_meanwhile() -> None:
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def on() -> list[bool]:
        hub, sets = not are_progress_bars_disabled(), not datasets.are_progress_bars_disabled()
        return [logging.is_progress_bar_enabled(), sets, hub]

    before = on()
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
    try:
        with progress.shown("compress", quiet=True):
            assert on() == [False, False, False]
        assert on()[:2] == [True, True]
    finally:
        for was, back in zip(before, (logging.disable_progress_bar, datasets.disable_progress_bars), strict=False):
            if not was:
                back()


def test_bars_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn after a moment, off the screen for a result, on it again, and gone at the end."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "SOON", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.shown("compress") as step:
        step(1, 4, "layer [3]")
        drawn = screen.getvalue()
        progress.clear()
        assert screen.getvalue() != drawn, "nothing was taken off the screen"
        step(2, 4, "layer [4]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "1 of 4" in text and "compress layer [4]" in text and "0:00:" in text


def said(stderr: str) -> list[str]:
    """The lines of progress."""
    return [line for line in stderr.splitlines() if " after " in line]


DATA = ["--train-file", "TABLE", "--text-column", "text", "--label-column", "liked"]
COMMANDS = {
    "compress": (
        ["compress", "MODEL", "--method", "fusion", "--set", "width=0.5", "--out", "OUT"],
        ["loading", "planning fusion bert.encoder.layer", "applying: ", "what it costs", "exporting"],
    ),
    "tune": (
        ["tune", "MODEL", *DATA, "--steps", "3", "--set", "eval_every=3", "--tuner", "sparsegrad", "--out", "OUT"],
        ["gradients", "bases", "cores", "entries", "training", "evaluating", "reading tokens", "exporting"],
    ),
    "eval": (["eval", "MODEL", *DATA], ["loading", "evaluating: 1 of 1"]),
    "export": (["export", "MODEL", "--out", "OUT"], ["loading", "exporting", "opening and comparing"]),
    "calibrate": (["calibrate", "MODEL", "--text", "TABLE", "--text-column", "text", "--out", "OUT"], ["calibrating"]),
    "analyze": (
        ["analyze", "MODEL", "--methods", "fusion", "--width", "0.5", "--text", "NOTES", "--no-ntk"],
        ["planning fusion", "analysing errors"],
    ),
}  # words of the command, and what its lines of progress must tell


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "export" else pytest.mark.slow) for name in COMMANDS]
)
def test_commands_tell_where_they_are(
    name: str,
    bert: Path,  # noqa: F811
    table: Path,  # noqa: F811
    tmp_path: Path,
    every_step: None,
) -> None:
    words, wanted = COMMANDS[name]
    (tmp_path / "notes.txt").write_text("\n\n".join(["good fine great film"] * 90))
    places: dict[str, Any] = {"NOTES": tmp_path / "notes.txt", "MODEL": bert, "TABLE": table, "OUT": tmp_path / "out"}
    lines = said(good(*(places.get(word, word) for word in words)).stderr)
    assert all(line.startswith(name) for line in lines), lines
    for each in wanted:
        assert any(each in line for line in lines), (each, lines)


@pytest.mark.slow
def test_a_unit_of_a_run_tells_where_it_is(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    every_step: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each stage of a unit and what follows the units; and what the report is made of."""
    from ffnkit.recipe import run

    results = run(recipe_of(folder), tmp_path / "out", isolate=False)
    lines = said(capfd.readouterr().err)
    for told in ("half, seed 0 > compress", "> distil > distilling", "> tune > tuning > training", "measuring latency"):
        assert any(told in line for line in lines), (told, lines)
    assert any("evaluate" in line and "evaluating: 1 of" in line for line in lines)
    (whole, _) = results.rows
    assert whole["rows"] == {"train": 108, "dev": 12, "report": 30} or sum(whole["rows"].values()) == 150
    assert len(whole["curve"]["metric"]) == 3 and whole["tuner"]["name"] == "full"
    text = (tmp_path / "out" / "report.html").read_text()
    for link in re.findall(r'href="([^"#]+)"', text):
        assert (tmp_path / "out" / link).exists(), link
    assert "Loss curves" in text and "recipe.yaml" in text and "heal" not in text
    from ffnkit.recipe import load_recipe

    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe_of(folder)


def test_only_stages_that_ran_are_on_the_page(folder: Path) -> None:  # noqa: F811
    """Each arm has its own tuner; of arms that are not tuned, pruned or distilled nothing of the kind is said."""
    from ffnkit.recipe.pages import said_of

    arms: dict[str, Any] = {"whole": {}, "half": {"method": "fusion", "width": 0.5, "tuner": {"name": "lora"}}}
    plain = recipe_of(folder, arms=arms, stages=["compress", "evaluate"])
    assert [said_of(plain, name) for name in arms] == [{}, {"method": "fusion", "width": 0.5}]
    tuned = recipe_of(folder, arms=arms)
    whole, half = (said_of(tuned, name) for name in arms)
    assert whole["tuner"]["name"] == "full" and half["tuner"]["rank"] == 8
    assert "distilled" in half and "distilled" not in whole


def test_no_end_is_told_once_there_are_more_steps_than_were_expected() -> None:
    """A target's search does not know how many choices it will measure: "7 s left" was told for minutes."""
    told: list[tuple[int, int]] = []
    losses = object.__new__(Losses)
    losses.space = cast(Any, SimpleNamespace(blocks=["a", "b"]))
    losses._steps = itertools.count(1)
    losses.progress = lambda done, total, what: told.append((done, total))
    for _ in range(40):
        losses.tell("a choice measured")
    known = 4 + EXPECTED
    assert told[: known - 1] == [(step, known) for step in range(1, known)]
    assert all(total == 0 for _, total in told[known - 1 :]) and told[-1] == (40, 0)


def test_folders_have_the_names_that_their_user_gave(
    every_step: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands write a model into a folder that is put in place when all of it is there."""
    model: Any = FAMILIES["bert"].model()
    with progress.shown("work"), staging(tmp_path / "out") as outer, staging(outer / "a") as inner:
        ffnkit.save(model, inner)
        ffnkit.export(model, outer / "b")
    said = capsys.readouterr().err
    assert f"saving {tmp_path / 'out' / 'a'}" in said and f"exporting {tmp_path / 'out' / 'b'}" in said
    assert "ffnkit-tmp" not in said
