"""The search of learning rates in a recipe: which rows it sees, that it goes on, what it leaves, what is refused."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
from test_benchmarks_of_papers import story
from test_recipe_run import outcome, recipe_of, run, tiny

from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.recipe import searching
from ffnkit.recipe.rates import Search
from ffnkit.recipe.schema import Recipe

RATES = [1e-5, 1e-2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("search"))


def searched(folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "stages": ["compress", "tune", "evaluate"],
        "tune": {"steps": 6, "batch_size": 8, "max_length": 16, "eval_every": 6, "best_metric": "loss"},
        "search": {"learning_rate": RATES, "rows": 24, "tune": {"steps": 4, "eval_every": 4}},
        "measure": {"latency": False},
        "export": "none",
    }
    return recipe_of(folder, **(settings | changes))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each training was given."""
    calls: list[dict[str, Any]] = []
    train = tune.train

    def noting(model: Any, tokenizer: Any, task: Any, splits: Any, settings: Any, **how: Any) -> Any:
        texts = {name: set(getattr(splits, name)["text"]) for name in ("train", "dev", "report")}
        calls.append({"rate": settings.learning_rate, "steps": settings.steps, **texts})
        return train(model, tokenizer, task, splits, settings, **how)

    monkeypatch.setattr(tune, "train", noting)
    return calls


@pytest.mark.slow
def test_each_arm_gets_the_best_of_its_rates_on_rows_of_train(folder: Path, tmp_path: Path, seen: list[Any]) -> None:
    recipe = searched(folder, seeds=[0], arms={"whole": {}, "half": {"method": "fusion", "width": 0.5}})
    results = run(recipe, tmp_path)
    assert results.ok, results.rows
    assert len(seen) == 2 * 2 + 2
    trials, runs = [c for c in seen if c["steps"] == 4], [c for c in seen if c["steps"] == 6]
    assert [c["rate"] for c in trials] == 2 * RATES
    dev, report, train = (runs[0][name] for name in ("dev", "report", "train"))
    for call in trials:
        assert call["train"] | call["dev"] == train and not call["train"] & call["dev"]
        assert len(call["dev"]) == 24 and not call["dev"] & (dev | report) and not call["train"] & (dev | report)
        assert call["dev"] == trials[0]["dev"]  # the same for every arm
    for row in results.rows:
        found = row["search"]
        scores = [trial["score"] for trial in found["trials"]]
        assert row["learning_rate"] == RATES[scores.index(min(scores))] and found["metric"] == "loss"
        assert len(set(scores)) > 1  # else nothing was chosen
        assert json.loads((tmp_path / "units" / row["arm"] / "search.json").read_text()) == found
    assert {c["rate"] for c in runs} == {row["learning_rate"] for row in results.rows}
    table, page = (tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()
    assert "rate found" in table and "best of 2 an arm, by loss on 24 rows kept apart" in table
    assert "Learning rates tried" in page and "trial 2" in page
    seen.clear()
    run(searched(folder, seeds=[0, 1], arms={"whole": {}}), tmp_path)
    assert [c["steps"] for c in seen] == [6]  # a further seed takes what was found


def test_a_stopped_search_goes_on_and_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    recipe = searched(folder, arms={"whole": {}})
    run(recipe, tmp_path / "whole")
    seen.clear()
    write, written = searching.write_json, []

    def stopping(path: Path, value: Any) -> None:
        write(path, value)
        written.append(value)
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(searching, "write_json", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.setattr(searching, "write_json", write)
    assert run(recipe, tmp_path / "cut").ok
    assert [c["rate"] for c in seen] == [*RATES, seen[-1]["rate"]]  # none is tried twice
    one, other = (json.loads((tmp_path / name / "units/whole/search.json").read_text()) for name in ("whole", "cut"))
    assert one == other and outcome(tmp_path / "whole") == outcome(tmp_path / "cut")


@pytest.mark.slow
def test_rates_that_fail_are_told_and_not_chosen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = tune.train

    def failing(model: Any, tokenizer: Any, task: Any, splits: Any, settings: Any, **how: Any) -> Any:
        if settings.steps == 4 and settings.learning_rate != 1e-5:
            raise FfnkitError("training", "the loss is not finite", "Lower the rate")
        return train(model, tokenizer, task, splits, settings, **how)

    monkeypatch.setattr(tune, "train", failing)
    results = run(searched(folder, arms={"whole": {}}), tmp_path)
    assert results.ok and results.rows[0]["learning_rate"] == 1e-5
    assert ["error" in trial for trial in results.rows[0]["search"]["trials"]] == [False, True]
    assert "the best rate is the smallest that was tried" in (tmp_path / "table.md").read_text()
    none = run(
        searched(folder, arms={"whole": {}}, search={"learning_rate": [1.0, 2.0], "tune": {"steps": 4}}), tmp_path / "n"
    )
    assert "no trial has a score" in none.rows[0]["error"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"search": {"learning_rate": []}}, "needs a list of rates"),
        ({"search": {"learning_rate": 1e-3}}, "neither a list of rates nor a range"),
        ({"search": {"learning_rate": [1e-3, 1e-3]}}, "names a rate twice"),
        ({"search": {"learning_rate": [1e-3, -1.0]}}, "greater than 0"),
        ({"search": {"learning_rate": {"low": 1e-3, "high": 1e-5, "trials": 3}}}, "not below its high"),
        ({"search": {"learning_rate": {"low": 1e-3, "high": 1e-2}}}, "low, high and trials"),
        ({"search": {"learning_rate": RATES, "tune": {"learning_rate": 1e-3}}}, "is what is searched"),
        ({"search": {"learning_rate": RATES, "tune": {"stepz": 3}}}, "search.tune.stepz"),
        ({"search": {"learning_rate": RATES, "rows": 1.5}}, "search.rows"),
        (
            {
                "search": {"learning_rate": RATES, "tune": {"keep_best": False}},
                "arms": {"a": {}, "b": {"tune": {"early_stopping": 2}}},
            },
            r"search.tune.* needs keep_best.*\(arm b\)",
        ),
        ({"stages": ["evaluate"], "arms": {"a": {}}}, "needs the stage tune"),
        ({"arms": {"a": {}, "b": {"search": {"learning_rate": [1e-3]}}}}, "tries 1 rates where a tries 2"),
        ({"arms": {"a": {"tune": {"learning_rate": 1e-3}}}}, "is given beside a search"),
        ({"search": None, "arms": {"a": {"search": {"learning_rate": [1e-3]}}}}, "needs a search of the whole recipe"),
    ],
)
def test_what_makes_no_search_is_refused_by_its_field(folder: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(FfnkitError, match=match):
        searched(folder, **changes)


def test_a_range_needs_optuna(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    recipe = searched(folder, arms={"a": {}}, search={"learning_rate": {"low": 1e-5, "high": 1e-2, "trials": 3}})
    with pytest.raises(
        FfnkitError, match=r"Optuna is not installed. pip install 'ffnkit\[search\]', or list the rates"
    ):
        run(recipe, tmp_path)


def test_optuna_is_asked_by_the_trials_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without Optuna: a stand-in that notes what it is given. Scores, failed trials and seeds reach it."""
    given: list[Any] = []

    class Study:
        def __init__(self, direction: str, sampler: Any) -> None:
            self.trials: list[Any] = []
            given.append((direction, sampler, self.trials))

        def add_trial(self, trial: Any) -> None:
            self.trials.append(trial)

        def ask(self, space: Any) -> Any:
            return types.SimpleNamespace(params={"learning_rate": 1e-3})

    names = types.SimpleNamespace
    optuna = names(
        logging=names(set_verbosity=lambda level: None, WARNING=30),
        distributions=names(FloatDistribution=lambda low, high, log: (low, high, log)),
        samplers=names(TPESampler=lambda seed, n_startup_trials: (seed, n_startup_trials)),
        trial=names(TrialState=names(PRUNED="pruned", COMPLETE="complete"), create_trial=lambda **all: all),
        create_study=Study,
    )
    monkeypatch.setitem(__import__("sys").modules, "optuna", optuna)
    rates = searched(folder, search={"learning_rate": {"low": 1e-5, "high": 1e-2, "trials": 6}}).rates_of("whole")
    trials = [{"learning_rate": 1e-4, "score": 0.5}, {"learning_rate": 1e-2, "score": None}]
    assert searching._suggested(rates, trials, True, 7) == 1e-3
    (direction, sampler, past), space = given[0], {"learning_rate": (1e-5, 1e-2, True)}
    assert (direction, sampler) == ("maximize", (9, 3))
    assert [(t["state"], t["value"], t["distributions"]) for t in past] == [
        ("complete", 0.5, space),
        ("pruned", None, space),
    ]


def test_a_range_by_optuna_is_the_same_when_it_goes_on(folder: Path) -> None:
    pytest.importorskip("optuna")
    rates = searched(folder, search={"learning_rate": {"low": 1e-5, "high": 1e-2, "trials": 6}}).rates_of("whole")
    trials: list[Any] = []
    for number in range(6):
        rate = searching._suggested(rates, trials, True, 0)
        assert 1e-5 <= rate <= 1e-2 and rate == searching._suggested(rates, trials, True, 0)
        trials.append({"learning_rate": rate, "score": None if number == 1 else -abs(rate - 1e-3)})
    assert len({trial["learning_rate"] for trial in trials}) == 6


def test_what_belongs_together_stays_on_one_side_of_the_rows_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "coqa").mkdir()
    for name, numbers in {"train": range(20), "dev": range(90, 93)}.items():
        rows = {"version": "1.0", "data": [story(number) for number in numbers]}
        (tmp_path / "coqa" / f"coqa-{name}-v1.0.json").write_text(json.dumps(rows))

    def drawn(rows: int, **limits: Any) -> tuple[Any, int]:
        splits = tasks.get("coqa").splits(tmp_path, dev=6, **limits)
        source: Any = types.SimpleNamespace(splits=splits, task=tasks.get("coqa"))
        return searching._apart(source, Search.model_validate({"learning_rate": RATES, "rows": rows}))

    splits, count = drawn(10)
    assert count == len(splits.dev) == 12 and len(splits.train) == 54 - 12  # whole stories, 10 rows or more
    assert not set(splits.train["story"]) & set(splits.dev["story"])
    assert set(splits.report["story"]) == {story(number)["story"] for number in range(90, 93)}
    with pytest.raises(FfnkitError, match="one story, and stay on one side"):
        drawn(1, train_limit=2, seed=next(seed for seed in range(99) if one_story(tmp_path, seed)))


def one_story(folder: Path, seed: int) -> bool:
    """Whether the two rows that are drawn with this seed are of one story."""
    return len(set(tasks.get("coqa").splits(folder, dev=6, train_limit=2, seed=seed).train["story"])) == 1
