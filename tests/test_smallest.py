"""The search of the smallest model: who goes on, how sure the choice is, what is asked, and the whole of it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_recipe_run import tiny

from ffnkit.errors import FfnkitError
from ffnkit.search.chances import kept_share, least_kept
from ffnkit.search.halving import fronts, promoted, spread
from ffnkit.search.settings import SearchSettings, is_search, read_search, search_from
from ffnkit.search.state import Folder


def test_fronts_are_those_that_no_other_beats() -> None:
    draw = random.Random(0)
    points = {number: (draw.randint(0, 9) / 10, draw.randint(0, 9) / 10) for number in range(40)}
    left = dict(points)
    for front in fronts(points):
        slow = {
            name
            for name, (size, loss) in left.items()
            if not any(o[0] <= size and o[1] <= loss and o != (size, loss) for o in left.values())
        }
        assert set(front) == slow and front == sorted(front, key=lambda name: (points[name][0], name))
        left = {name: point for name, point in left.items() if name not in slow}
    assert not left


def test_those_around_the_place_where_enough_is_kept_go_on() -> None:
    points = {number: (number / 10, 0.1 - number / 100) for number in range(1, 10)}  # one front, larger is better
    assert promoted(points, 0.0401, 1) == [6], "the smallest that keeps enough"
    assert promoted(points, 0.0401, 5) == [6, 5, 4, 7, 3], "and more of what is smaller: tuning goes on"
    assert promoted(points, -1.0, 2) == [9, 8], "where none keeps enough, the best"
    assert promoted(points | {20: (0.95, 0.09)}, 0.0401, 10)[-1] == 20, "what others beat comes last"
    assert spread(points, 3) == [1, 5, 9] and set(spread(points, 99)) == set(points)


def accuracy(rows: Any) -> float:
    return float(rows["right"].mean())


def test_the_interval_is_of_pairs() -> None:
    """Against the normal approximation of a paired difference; taken apart, the rows would tell far less."""
    draw = np.random.default_rng(0)
    theirs = (draw.random(2000) < 0.9).astype(float)
    ours = theirs.copy()
    ours[draw.choice(2000, 40, replace=False)] = 0.0
    low = least_kept({"right": ours}, {"right": theirs}, accuracy, True)
    gap = ours - theirs
    normal = 1 + (gap.mean() - 1.2816 * gap.std() / 2000**0.5) / theirs.mean()
    assert low == pytest.approx(normal, abs=8e-4)
    draw.shuffle(ours)
    assert least_kept({"right": ours}, {"right": theirs}, accuracy, True) < low - 0.004  # type: ignore[operator]
    assert least_kept({}, {"right": theirs}, accuracy, True) is None


@pytest.mark.parametrize(
    ("given", "more", "floor"),
    [
        ({}, True, 0.99),
        ({"keep": 0.9}, False, 0.9),
        ({"within": 0.15}, True, 0.85),
        ({"within": 0.15}, False, 1 / 1.15),
    ],
)
def test_what_has_to_stay(given: dict[str, Any], more: bool, floor: float) -> None:
    assert SearchSettings.model_validate(given).floor(more) == pytest.approx(floor)
    worst = floor * 2.0 if more else 2.0 / floor
    assert kept_share(worst, 2.0, more) == pytest.approx(floor)
    assert kept_share(float("nan"), 2.0, True) == 0.0


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"keep": 0.9, "within": 0.1}, "keep and within"),
        ({"objective": "kv"}, "search.objective"),
        ({"keep": 1.5}, "search.keep"),
        ({"methods": ["width", "magic"]}, "magic"),
        ({"kep": 0.9}, "kep"),
    ],
)
def test_wrong_fields_are_named(search: dict[str, Any], words: str) -> None:
    with pytest.raises(FfnkitError, match=words):
        search_from({"model": "m", "task": "sst2", "search": search}, "r.yaml")


def test_a_search_of_rates_is_another_one(tmp_path: Path) -> None:
    assert is_search({"model": "m", "search": {"keep": 0.99}})
    assert not is_search({"model": "m", "search": {"learning_rate": [1e-4]}, "arms": {}})
    assert not is_search({"model": "m", "arms": {}}) and not is_search(None)
    path = tmp_path / "r.yaml"
    path.write_text("name: small\nmodel: m\ntask: sst2\nsearch: {within: 0.02, objective: flops, tokens: 10k}\n")
    found = read_search(path)
    assert found is not None and (found.search.tokens, found.search.objective) == (10_000, "flops")
    path.write_text("name: rates\nmodel: m\ntask: sst2\narms: {a: {}}\nsearch: {learning_rate: [1e-4]}\n")
    assert read_search(path) is None


def test_a_folder_holds_one_search_and_a_task_one_process(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = Folder(tmp_path / "out")
    folder.begin({"model": "m", "search": {"keep": 0.9}})
    folder.begin({"model": "m", "search": {"keep": 0.9}})
    with pytest.raises(FfnkitError, match="another search"):
        folder.begin({"model": "m", "search": {"keep": 0.8}})
    with folder.claimed("a") as ours, folder.claimed("a") as again, folder.claimed("b") as other:
        assert (ours, again, other) == (True, False, True)
    with folder.claimed("a") as ours:
        assert ours
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "results.json").write_text("{}")
    with pytest.raises(FfnkitError, match="no search wrote"):
        Folder(tmp_path / "else").begin({"model": "m"})


def recipe(base: Path, **search: Any) -> Any:
    task = {name: str(base / f"{name}.csv") for name in ("train", "validation")} | {"text": "text", "label": "label"}
    given = {
        "keep": 0.9,
        "candidates": 5,
        "tuned": 2,
        "rungs": 2,
        "factor": 2,
        "tokens": 200,
        "methods": ["width", "ffns"],
    }
    return search_from(
        {
            "model": str(base / "model"),
            "task": task,
            "limits": {"dev": 40},
            "tune": {"learning_rate": 3e-3, "steps": 30, "batch_size": 8, "max_length": 16, "eval_every": 15},
            "calibration": {"tokens": 300, "max_length": 16},
            "heal": {"checks": 1, "max_length": 16},
            "measure": {"batch_size": 2, "length": 8, "repeats": 2},
            "search": given | search,
        },
        "tiny",
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at each place where something is written, it ends with a choice, exported and reported."""
    from transformers import AutoModelForSequenceClassification

    from ffnkit.search import job, search

    class Killed(BaseException):
        pass

    base = tiny(tmp_path)
    out, write, count = tmp_path / "out", job.write_json, itertools.count()

    def dying(path: Path, value: Any) -> None:
        number = next(count)
        if number % 3 == 1:
            raise Killed
        write(path, value)
        if number % 3 == 2:
            raise Killed

    monkeypatch.setattr(job, "write_json", dying)
    for _ in range(40):
        try:
            found = search(recipe(base), out)
            break
        except Killed:
            continue
    results = json.loads((out / "results.json").read_text())
    assert found.exit_code == 0 and results["chosen"] is not None
    chosen = results["chosen"]
    assert chosen["size"] < 1 and chosen["tuned"]["kept"] >= 0.9 and chosen["tuned"]["low"] >= 0.8
    assert set(chosen["report"]) == {"value", "original", "kept", "low"} and chosen["latency"] > 0
    tuned = [row for row in results["candidates"] if "tuned" in row]
    assert len(tuned) == 2 and all(row["size"] >= chosen["size"] for row in tuned if row["enough"])
    model = AutoModelForSequenceClassification.from_pretrained(out / "model" / "standard")
    assert model.num_labels == 2 and (out / "model" / "compact").is_dir()
    for name in ("front.md", "front.svg", "report.html"):
        assert chosen["name"] in (out / name).read_text() or name == "front.svg"
    stamp = (out / "results.json").stat().st_mtime_ns
    assert search(recipe(base), out).results == results and (out / "results.json").stat().st_mtime_ns == stamp
    with pytest.raises(FfnkitError, match="another search"):
        search(recipe(base, keep=0.8), out)
