"""The search of the smallest model: who goes on, how sure the choice is, what is asked, and the whole of it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_recipe_run import tiny
from test_side_by_side import CLUSTER

import ffnkit
from ffnkit.budget import allocation
from ffnkit.errors import FfnkitError
from ffnkit.search import candidates as ways
from ffnkit.search.candidates import Candidate
from ffnkit.search.chances import kept_share, least_kept
from ffnkit.search.halving import fronts, promoted, spread
from ffnkit.search.proposing import Proposals
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


def test_another_text_of_the_same_size_is_other_data(tmp_path: Path) -> None:
    from ffnkit.search.ground import Ground

    text = tmp_path / "notes.txt"
    text.write_text("one")
    ground = Ground(search_from({"model": "m", "calibration": {"text": str(text)}}, "r"))
    first = ground.facts()
    text.write_text("two")
    assert ground.facts() != first
    text.unlink()
    with pytest.raises(FfnkitError, match=r"notes.txt.*no such file"):
        ground.facts()


def test_text_alone_needs_no_padding_token(tmp_path: Path) -> None:
    """As Llama's and GPT-2's tokenizers have none."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from ffnkit.search.ground import Ground

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    assert Ground(search_from({"model": str(tmp_path)}, "r")).tokenizer.pad_token == "</s>"


def test_no_more_rows_are_read_than_are_learned_from(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffnkit.search.ground import ROWS, ground_of

    given = recipe(base)
    ground: Any = ground_of(given)
    model, encode, seen = ground.source.model(0), ground.task.encode, list[int]()

    def counting(rows: Any, *more: Any, **how: Any) -> Any:
        seen.append(len(rows))
        return encode(rows, *more, **how)

    monkeypatch.setattr(type(ground.task), "encode", lambda self, *a, **k: counting(*a, **k))
    [(few, _)], held = ground.healing(model, given.heal.model_copy(update={"tokens": 20}), 0)
    assert few and held and seen == [len(ground.source.splits.dev), ROWS]
    ground.healing(model, given.heal.model_copy(update={"tokens": 5000}), 0)
    assert seen[3] == len(ground.source.splits.train) > ROWS
    [(again, _)], _ = ground.healing(model, given.heal.model_copy(update={"tokens": 20}), 0)
    [(other, _)], _ = ground.healing(model, given.heal.model_copy(update={"tokens": 20}), 1)
    ids = [each[0]["input_ids"] for each in (few, again, other)]
    assert ids[0].equal(ids[1]) and not (ids[0].shape == ids[2].shape and ids[0].equal(ids[2]))


def fake_size(number: int, salt: int) -> list[float]:
    return [random.Random(number + salt).random(), random.Random(number + salt + 0.5).random()]


def asked(out: Path, order: Any, salt: int = 0, failing: frozenset[int] = frozenset()) -> list[Any]:
    """What is proposed in a folder whose candidates are done in an order that ``order`` picks, anew a turn."""
    settings = SearchSettings(candidates=22)
    while left := (proposals := Proposals(Folder(out), settings, 6)).open():
        number = order(left)
        place = Folder(out).place(number)
        place.mkdir(parents=True)
        size, loss = fake_size(number, salt)
        name = "failed" if number in failing else "candidate"
        plain = {"candidate": proposals.candidate(number).to_dict(), "size": size, "loss": loss}
        (place / f"{name}.json").write_text(json.dumps(plain))
    found = json.loads((out / "proposed.json").read_text())["candidates"]
    return [(proposals.candidate(number), params) for number, params in enumerate(found)]


def test_who_measures_and_in_which_order_changes_no_proposal(tmp_path: Path) -> None:
    """The negative control is other values, from which other candidates follow, behind the opening only."""
    pytest.importorskip("optuna")
    pytest.importorskip("fcntl")
    for name in "abcd":
        (tmp_path / name).mkdir()
    one = asked(tmp_path / "a", min)
    assert asked(tmp_path / "b", max) == one and len({candidate for candidate, _ in one}) == len(one) == 22
    other = asked(tmp_path / "c", min, salt=100)
    assert other[:14] == one[:14] and other != one
    failed = asked(tmp_path / "d", min, failing=frozenset({1, 15}))
    assert len(failed) == 24 and failed[:14] == one[:14], "others take the place of those that fail"


@pytest.mark.parametrize("how", ["ffns", "layers", "heads", "shared"])
def test_what_is_narrowed_loses_more_and_is_made_again_from_its_plans(how: Any) -> None:
    from methods import case_of

    case = case_of("llama")
    model = case.model().eval()
    batches, start = case.data(model), copy.deepcopy(model)
    statistics = ffnkit.calibrate(model, batches)
    candidate = Candidate(how, 0.5, number=1 if how != "heads" else 0, heads=0.5 if how == "heads" else 0.0)
    plans = ways.apply_to(model, candidate, "params", statistics, batches, 0)
    assert len(plans) == 2 and ways.costs(model)["params"] < ways.costs(start)["params"]
    ways.apply_plans(start, plans)
    assert [p.equal(q) for p, q in zip(model.parameters(), start.parameters(), strict=True)].count(False) == 0


def test_what_widths_cost_is_measured_once_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from methods import case_of

    from ffnkit.search import job

    case, asked = case_of("llama"), []
    measure = allocation.narrowing_costs

    def counted(*given: Any) -> Any:
        asked.append(given)
        return measure(*given)

    monkeypatch.setattr(allocation, "narrowing_costs", counted)
    for _ in range(2):  # two processes
        run = job.Run.__new__(job.Run)
        run.folder, run.original = Folder(tmp_path), case.model().eval()  # type: ignore[misc]
        batches = case.data(run.original)
        run.statistics = ffnkit.calibrate(run.original, batches)  # type: ignore[misc]
        for share in (0.75, 0.5):
            model = copy.deepcopy(run.original)
            given = (Candidate("widths", share), "params", run.statistics, batches, 0)
            ways.apply_to(model, *given, lambda run=run: run.costs)  # type: ignore[misc, arg-type]
            assert ways.costs(model)["params"] < ways.costs(run.original)["params"]
    assert len(asked) == 1


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


def outcome(out: Path) -> dict[str, Any]:
    """All figures of a search but times, and the loss of models of which all that is lost is rounding."""
    found = json.loads((out / "results.json").read_text())
    for row in [*found["candidates"], found["chosen"]]:
        for name in ("seconds", "loss", "healed"):
            row.get("tuned", {}).pop(name, None)
        for name in ("latency", "latency_s", "latency_quartiles"):
            row.pop(name, None)
    found["original"].pop("seconds"), found["original"].pop("latency_s")
    return dict(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    from ffnkit.search import search

    out = tmp_path_factory.mktemp("plain") / "out"
    search(recipe(base), out, threads=1)
    return outcome(out)


def kill_one(out: Path, words: bytes, killed: list[int]) -> None:
    """Signal 9 to a process of this command line as soon as it has written something of a candidate."""
    until = time.monotonic() + 1500  # as long as the search may take
    while time.monotonic() < until and not list(out.glob("candidates/*/*.json")):
        time.sleep(0.005)
    while time.monotonic() < until and not killed:
        time.sleep(0.005)
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if words in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)
                    killed.append(int(place.parent.name))
                    return


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_find_what_one_finds_and_one_is_killed(base: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    from ffnkit.search import search

    out, killed = tmp_path / "out", list[int]()
    words = b"ffnkit.search.helper\0" + str(out).encode()
    threading.Thread(target=kill_one, args=(out, words, killed), daemon=True).start()
    search(recipe(base), out, jobs=2, threads=1)
    assert killed and outcome(out) == plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_on_a_ray_cluster(base: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    """Two workers of a cluster of this machine, one of them killed while it is at a candidate."""
    pytest.importorskip("ray")
    out, given, killed = tmp_path / "out", tmp_path / "recipe.json", list[int]()
    given.write_text(recipe(base).model_dump_json())
    code = CLUSTER + (
        "import json, sys; from pathlib import Path; from ffnkit.search import search; from "
        "ffnkit.search.settings import search_from; "
        "given = search_from(json.loads(Path(sys.argv[1]).read_text()), 'tiny'); "
        "search(given, sys.argv[2], print, ray='auto', threads=1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    threading.Thread(target=kill_one, args=(out, b"ray::Worker.do", killed), daemon=True).start()
    subprocess.run([sys.executable, "-c", code, str(given), str(out)], env=environment, check=True, timeout=1600)
    assert killed and outcome(out) == plain


def test_without_ray_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ffnkit.search import search

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FfnkitError, match=r"ffnkit\[ray\]"):
        search(search_from({"model": "m", "task": "sst2"}, "r"), tmp_path / "out", ray="auto")
    with pytest.raises(FfnkitError, match="Ray decides"):
        search(search_from({"model": "m", "task": "sst2"}, "r"), tmp_path / "out", ray="auto", jobs=2)
    assert not (tmp_path / "out").exists()


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


def found_by_clock(**latency: float) -> dict[str, Any]:
    """Results of a search for the fastest: "a" has the fewest FLOPs, "b" no place on the front."""
    costs = {"params": 100, "ffn_params": 100, "flops": 100, "bytes": 100}
    rows: list[dict[str, Any]] = []
    for number, (name, size, kept) in enumerate([("a", 0.4, 0.99), ("b", 0.5, 0.98), ("c", 0.6, 0.5)]):
        tuned = {"kept": kept, "low": kept - 0.01, "tokens": 10, "value": kept, "rung": 0}
        row = {"number": number, "name": name, "size": size, "costs": costs, "tuned": tuned, "enough": kept > 0.9}
        row |= {"candidate": {"how": "width", "share": size}, "costs": {name: size * 100 for name in costs}}
        rows.append(row | ({"latency": latency[name], "latency_s": latency[name]} if name in latency else {}))
    fast = sorted((row for row in rows if row.get("latency", 1) < 1), key=lambda row: row["latency"])
    told = {"value": 0.8, "original": 0.8, "kept": 1.0, "low": 0.99}
    return {
        "recipe": {"search": {"objective": "latency"}},
        "metric": "accuracy",
        "floor": 0.97,
        "original": {"value": 0.8, "costs": costs} | ({"latency_s": 1.0} if latency else {}),
        "candidates": rows,
        "chosen": fast[0] | {"report": told} if fast else None,
    }


def test_the_clock_has_its_column_and_its_words() -> None:
    from ffnkit.search import pages

    found = found_by_clock(a=0.7, b=0.6)
    heads, rows = pages.header(found), pages.table_rows(found)
    assert heads[-1] == "latency" and [row[-1] for row in rows] == ["0.70", "0.60", ""]
    assert [row[0] for row in rows] == ["*", "->", ""]
    assert [row["name"] for row in pages.shown(found)] == ["a", "b"], "what is chosen is seen, wherever it lies"
    slow = "\n".join(pages.said(found_by_clock(a=1.2, b=1.1)))
    assert "none is faster" in slow and "No smaller model" not in slow
    other = found_by_clock() | {"recipe": {"search": {"objective": "params"}}}
    assert pages.header(other) == pages.HEADER and len(pages.table_rows(other)[0]) == len(pages.HEADER)


@pytest.mark.parametrize(("latency", "axis"), [({"a": 0.7, "b": 0.6}, "latency"), ({"b": 0.6}, "FLOPs a token")])
def test_the_page_stands_against_what_was_asked_for(latency: dict[str, float], axis: str, tmp_path: Path) -> None:
    """Where not all that are shown were timed, against what foresees it."""
    from types import SimpleNamespace

    from ffnkit.search import pages

    about = SimpleNamespace(name="small", notes="", model="m")
    run: Any = SimpleNamespace(folder=Folder(tmp_path), recipe=about, ground=SimpleNamespace(where="sst2"))
    pages.write(run, found_by_clock(**latency))
    assert f'aria-label="accuracy against {axis}"' in (tmp_path / "front.svg").read_text()
    page = (tmp_path / "report.html").read_text()
    told, notes, table = (page.index(words) for words in ("takes 0.60 of the", "asked for", "Size and quality"))
    assert told < notes < table and "level with" not in page, "seeds tell nothing here"
    assert '<th scope="row">a *</th>' in page and '<th scope="row">b -&gt;</th>' in page, (
        "rows are called by their model"
    )
    drawn = re.findall('aria-label="accuracy against ([^"]*)"', page)
    assert drawn[0] == axis and len(drawn) > 2


def test_it_says_at_which_candidate_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffnkit.io import progress
    from ffnkit.search.job import Run
    from ffnkit.search.state import Task

    run = Run.__new__(Run)
    run.folder = Folder(tmp_path)

    def do(task: Task) -> None:
        with progress.phase("healing") as step:
            step(1, 2, "")

    monkeypatch.setattr(run, "do", do, raising=False)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.shown("search"):
        assert run.taken(Task(3, 1))
    assert "search > candidate 3, rung 2 > healing: 1 of 2" in capsys.readouterr().err


def test_an_actor_leaves_a_task_to_the_process_that_is_at_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second command on the folder, or another driver's actors: both would write the same checkpoint."""
    from types import SimpleNamespace

    from ffnkit.search import cluster
    from ffnkit.search.job import Run
    from ffnkit.search.state import Task

    monkeypatch.setattr(cluster, "POLL", 0.0)
    run = Run.__new__(Run)
    run.folder, at, folder = Folder(tmp_path), list[Task](), Folder(tmp_path)
    monkeypatch.setattr(run, "do", at.append, raising=False)
    worker = cluster.Worker.__new__(cluster.Worker)
    worker.lines, worker.run = [], run
    asked = itertools.count()
    place = folder.place(0)
    place.mkdir(parents=True)

    def over(task: Task) -> bool:
        if next(asked) == 3:
            (place / "candidate.json").write_text("{}")
        return Folder(tmp_path).over(task)

    monkeypatch.setattr(run, "folder", SimpleNamespace(claimed=folder.claimed, over=over), raising=False)
    with folder.claimed("candidate-0") as ours:
        assert ours
        worker.do(Task(0))
    assert not at
    worker.do(Task(1))
    assert at == [Task(1)]


@pytest.mark.parametrize("command", ["search", "run"])
def test_the_commands_hand_on_who_is_to_work(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import ffnkit.search as package
    from ffnkit.cli import app
    from ffnkit.cli.group import filled

    seen: dict[str, Any] = {}

    def stands_in(recipe: Any, out: Path, say: Any, **how: Any) -> Any:
        seen.update(how)
        raise FfnkitError("searching", "this is as far as the test goes", "Look at what was given")

    monkeypatch.setattr(package, "search", stands_in, raising=False)
    (tmp_path / "s.yaml").write_text("model: m\ntask: sst2\nsearch: {keep: 0.9}\n")
    words = ["search", "m", "--task", "sst2"] if command == "search" else ["run", str(tmp_path / "s.yaml")]
    out = ["--out", str(tmp_path / "out")]
    for more in (["--jobs", "3", "--threads", "2"], ["--ray"], ["--ray", "ray://host:1"]):
        found = CliRunner().invoke(app, filled([*words, *more, *out]))
        assert found.exit_code == 2 and "as far as the test goes" in found.output, found.output
        wanted = {"--jobs": (3, 2, None), "--ray": (1, None, "auto" if len(more) == 1 else more[1])}[more[0]]
        assert (seen["jobs"], seen["threads"], seen["ray"]) == wanted


@pytest.mark.parametrize("error", [FfnkitError("a", "b", "c"), KeyboardInterrupt()])
def test_a_search_that_found_nothing_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    """So that the corrected command may have the folder; what was found stays."""
    pytest.importorskip("fcntl")
    folder, facts = Folder(tmp_path / "new" / "out"), {"model": "m", "search": {"keep": 0.9}}
    with pytest.raises(type(error)), folder.begun(facts):
        with folder.turn("original"):
            pass
        raise error
    assert not list(tmp_path.iterdir())
    with folder.begun(facts), folder.claimed("original"):
        pass
    with pytest.raises(type(error)), folder.begun(facts):
        (folder.out / "original.json").write_text("{}")
        raise error
    assert (folder.out / "search.json").is_file()


def test_a_search_at_work_keeps_its_folder_where_another_one_fails(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder, facts = Folder(tmp_path / "out"), {"model": "m"}
    folder.begin(facts)
    with folder.claimed("original") as ours:
        assert ours
        with pytest.raises(KeyboardInterrupt), folder.begun(facts):
            raise KeyboardInterrupt
    folder.check_there()
    folder.clear()
    with pytest.raises(FfnkitError, match="removed meanwhile"):
        folder.check_there()
    assert not folder.out.exists()


def test_the_folder_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It lacks fields of today, which have their defaults; the negative control is another value."""
    folder = Folder(tmp_path / "out")
    folder.begin({"model": "m", "search": {"keep": 0.9}, "weights": "w"})
    folder.begin({"model": "m", "search": {"keep": 0.9, "least": 0.2, "seed": 0}, "weights": "w", "format": 1})
    for other, words in (({"keep": 0.9, "least": 0.3}, "search.least was 0.2, is 0.3"), ({"keep": 0.9}, "weights")):
        with pytest.raises(FfnkitError, match=words):
            folder.begin({"model": "m", "search": other, "weights": "w" if "least" in other else "v"})


def test_a_full_disk_is_no_failure_of_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else others would take its place once there is room; what does not fit the model is one."""
    from types import SimpleNamespace

    from ffnkit.errors import WritingError
    from ffnkit.search.job import Run

    run = Run.__new__(Run)
    run.folder, run.say = Folder(tmp_path), lambda line: None
    run.__dict__["proposals"] = SimpleNamespace(candidate=lambda number: Candidate("width", 0.5))
    for kind, noted in ((WritingError, False), (FfnkitError, True)):
        error = kind("writing", "no space left on the disk", "Free some")

        def measured(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(run, "_measured", measured, raising=False)
        with nullcontext() if noted else pytest.raises(WritingError):
            run._measure(0)
        assert run.folder.tried(0) == noted


def test_a_further_process_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ffnkit.search.helper import help_with

    assert help_with(tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a further process of the search ends" in line and "no search to be seen" in line


@pytest.mark.parametrize("text", ["hello", "hello\n" * 100])
def test_a_text_without_parts_to_choose_by_is_refused(text: str, tmp_path: Path) -> None:
    """Its perplexity would be that of other text."""
    from ffnkit.search.ground import Ground

    file = tmp_path / "t.txt"
    for content, good in ((text, False), ("\n".join(f"line {n} of many" for n in range(1000)), True)):
        file.write_text(content)
        ground = Ground(search_from({"model": "m", "calibration": {"text": str(file)}}, "r"))
        ground.__dict__["tokenizer"] = None
        with nullcontext() if good else pytest.raises(FfnkitError, match="too short, or too much alike"):
            ground.check()


@pytest.mark.parametrize(("quartiles", "level"), [([0.5, 0.7], False), ([0.5, 1.1], True)])
def test_the_time_is_told_with_its_spread(quartiles: list[float], level: bool) -> None:
    from ffnkit.search import pages

    found = found_by_clock(a=0.7, b=0.6)
    found["chosen"] |= {"latency_quartiles": quartiles}
    found["timing"] = {"batch_size": 2, "length": 8, "repeats": 20, "threads": 1, "device": "cpu"}
    line = pages.said(found)[-1]
    assert "takes 0.60 of the original's time" in line and f"between 0.50 and {quartiles[1]:.2f}" in line
    assert ("no difference" in line) == level and "20 rounds" in line and "threads: 1" in line


def test_the_fastest_of_several_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure by which it was chosen flatters."""
    from types import SimpleNamespace

    from ffnkit.report import measure
    from ffnkit.search import choice
    from ffnkit.search import pages as written

    asked: list[list[str]] = []

    def latencies(models: Any, *_: Any, **__: Any) -> Any:
        asked.append(list(models))
        ratios = {name: measure.Spread(len(asked) / 10, 0.1, 0.3, 3) for name in models}
        return measure.Latencies(ratios, ratios)

    monkeypatch.setattr(measure, "latencies", latencies)
    monkeypatch.setattr("ffnkit.recipe.timing.batch_for", lambda *_: {})
    monkeypatch.setattr(written, "card", lambda *_: "")
    monkeypatch.setattr(choice.ffnkit, "save", lambda *_, **__: None)
    monkeypatch.setattr(choice.ffnkit, "export", lambda *_, **__: None)
    scored = SimpleNamespace(value=0.8, rows={"a": np.zeros(1)})
    ground = SimpleNamespace(open=lambda _: None, scored=lambda *_: scored, tokenizer=None)
    about = SimpleNamespace(measure=SimpleNamespace(batch_size=1, length=2, repeats=3))
    run: Any = SimpleNamespace(recipe=about, ground=ground, folder=Folder(tmp_path), original=None)
    run.kept = lambda *_: (1.0, 0.9)
    rows: list[Any] = [{"number": n, "tuned": {"rung": 0}} for n in (0, 1)]
    choice.timed(run, rows)
    told = choice._told(run, rows[1], {})
    assert asked == [["original", "0", "1"], ["original", "1"]]
    assert (rows[1]["latency"], told["latency"]) == (0.1, 0.2)
