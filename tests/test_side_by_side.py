"""Units side by side: the same figures, nothing lost where a process is killed or memory is short, one display."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_recipe_run import outcome, recipe_of, tiny

from ffnkit.cli.group import filled
from ffnkit.errors import FfnkitError
from ffnkit.recipe import cluster, pool, run, shares
from ffnkit.recipe.board import Board
from ffnkit.recipe.shares import Shares
from ffnkit.recipe.state import Unit
from ffnkit.search.state import Folder

GB = 1 << 30


class FakeChild:
    """A process that is at work for some polls and ends with the code that the test says."""

    codes: dict[str, list[int]] = {}
    log: list[tuple[str, str]] = []
    most = 0
    alive: set[str] = set()
    environments: dict[str, dict[str, str]] = {}

    def __init__(self, out: Path, unit: Unit, *, environment: dict[str, str], **_: Any) -> None:
        self.unit, self.left, self.pid = unit, 2, 0
        self.log.append(("start", unit.name))
        self.alive.add(unit.name)
        type(self).most = max(self.most, len(self.alive))
        self.environments[unit.name] = environment

    def ended(self) -> int | None:
        self.left -= 1
        if self.left > 0:
            return None
        self.alive.discard(self.unit.name)
        return self.codes.get(self.unit.name, [0]).pop(0) if self.codes.get(self.unit.name) else 0

    def stop(self) -> None:
        self.alive.discard(self.unit.name)
        self.log.append(("stop", self.unit.name))

    def judge(self, code: int) -> bool:
        return code == 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    monkeypatch.setattr(pool, "Child", FakeChild)
    monkeypatch.setattr(pool, "POLL", 0.0)
    monkeypatch.setattr(pool, "resident", lambda pid: GB)
    monkeypatch.setattr(pool, "free_memory", lambda: (8 * GB, 16 * GB))
    FakeChild.codes, FakeChild.log, FakeChild.most, FakeChild.alive, FakeChild.environments = {}, [], 0, set(), {}
    return FakeChild


def pooled(folder: Path, count: int, jobs: int, ready: Any = lambda unit: True, **more: Any) -> dict[str, bool]:
    units = [Unit("arm", seed, folder / "units" / "arm" / f"seed-{seed}") for seed in range(count)]
    ended: dict[str, bool] = {}
    with Board(count, shown=False, side_by_side=jobs > 1) as board:
        pool.run_units(
            folder, units, Shares(jobs, **more), board, lambda unit, good: ended.update({unit.name: good}), ready
        )
    return ended


def test_so_many_run_at_once_in_their_order(fake: Any, tmp_path: Path) -> None:
    assert set(pooled(tmp_path, 5, 2).values()) == {True}
    assert fake.most == 2 and [name for _, name in fake.log] == [f"arm, seed {n}" for n in range(5)]
    pooled(tmp_path, 3, 1)
    assert fake.most == 2


def test_a_killed_unit_goes_on_and_is_given_up_in_the_end(fake: Any, tmp_path: Path) -> None:
    fake.codes = {"arm, seed 0": [-9, -9], "arm, seed 1": [-9] * 9, "arm, seed 2": [1]}
    ended = pooled(tmp_path, 3, 2)
    assert ended == {"arm, seed 0": True, "arm, seed 1": False, "arm, seed 2": False}
    starts = [name for what, name in fake.log if what == "start"]
    assert [starts.count(f"arm, seed {n}") for n in range(3)] == [3, 1 + pool.KILLS, 1]


def test_threads_and_gpus_are_shared_out(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "cores", lambda: 8)
    pooled(tmp_path, 4, 4, gpus=("2", "5"))
    cards = [fake.environments[f"arm, seed {n}"]["CUDA_VISIBLE_DEVICES"] for n in range(4)]
    assert sorted(cards) == ["2", "2", "5", "5"]
    assert {env["OMP_NUM_THREADS"] for env in fake.environments.values()} == {"2"}
    pooled(tmp_path, 1, 1, gpus=("2", "5"))
    assert fake.environments["arm, seed 0"] == {}, "one after the other, a unit has what there is"
    pooled(tmp_path, 1, 1, threads=3)
    assert fake.environments["arm, seed 0"]["MKL_NUM_THREADS"] == "3"


def test_memory_decides_how_many_run(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "free_memory", lambda: (GB, 16 * GB))  # less than a unit takes, and some more
    assert set(pooled(tmp_path, 3, 3).values()) == {True} and fake.most == 1
    left = iter([8, 8, 8, 8] + [0.1] + [8] * 99)
    monkeypatch.setattr(pool, "free_memory", lambda: (int(next(left) * GB), 16 * GB))
    fake.most, fake.log = 0, []
    assert set(pooled(tmp_path, 3, 3).values()) == {True}
    stopped = [name for what, name in fake.log if what == "stop"]
    assert stopped and [n for w, n in fake.log if w == "start"].count(stopped[0]) == 2, "put back, and taken up again"


def test_what_waits_for_another_does_not_hold_up_others(fake: Any, tmp_path: Path) -> None:
    over: set[str] = set()
    fake_end = {"arm, seed 1"}

    def ready(unit: Unit) -> bool:
        return unit.name not in fake_end or ("start", "arm, seed 2") in fake.log

    over.update(pooled(tmp_path, 3, 2, ready))
    starts = [name for what, name in fake.log if what == "start"]
    assert starts.index("arm, seed 2") < starts.index("arm, seed 1") and len(over) == 3


def test_an_unhappy_end_stops_every_process(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        if len(fake.alive) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        pooled(tmp_path, 4, 2)
    assert not fake.alive


def test_lines_say_of_which_unit_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Board(2, shown=True, side_by_side=True) as board:
        board.before("a, seed 0")
        board.begins("b, seed 0")
        board.teller("b, seed 0")("  tune 2.0 s, accuracy 0.9")
        board.ends("b, seed 0", False, "no [memory]")
    lines = log.getvalue().splitlines()
    assert lines[0] == "[1/2] a, seed 0: done before" and lines[2] == "b, seed 0: tune 2.0 s, accuracy 0.9"
    assert lines[-1] == "[2/2] b, seed 0: failed: no [memory]"


def test_a_unit_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "run.json").write_text("{}")
    unit = Unit("arm", 0, tmp_path / "units" / "arm" / "seed-0")
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with unit.held():
            begun.set()
            end.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(10)
    with pytest.raises(FfnkitError, match="another process is at work"), unit.held(wait=0.0):
        raise AssertionError
    threading.Timer(0.2, end.set).start()
    with unit.held(wait=10):  # as soon as it is free
        pass
    holder.join()
    assert not list((tmp_path / "units" / "arm").iterdir())


def test_a_claim_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mkdir`` says that a folder exists which another process removes before it looks what it is."""
    pytest.importorskip("fcntl")
    (tmp_path / "run.json").write_text("{}")
    unit = Unit("arm", 0, tmp_path / "units" / "arm" / "seed-0")
    made, real = [], Path.mkdir

    def mkdir(path: Path, *args: Any, **given: Any) -> None:
        made.append(path)
        if len(made) == 1:
            raise FileExistsError(path)
        real(path, *args, **given)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with unit.held(wait=0.0):
        assert len(made) > 1
    monkeypatch.undo()
    unit.folder.with_name(".seed-0").write_text("")  # a file in its place is no race
    with pytest.raises(FileExistsError), unit.held(wait=0.0):
        raise AssertionError


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run", "r.yaml", "--ray"], ["run", "r.yaml", "--ray=auto"]),
        (["run", "--ray", "r.yaml"], ["run", "--ray=auto", "r.yaml"]),
        (["run", "r.yaml", "--ray", "--out", "x"], ["run", "r.yaml", "--ray=auto", "--out", "x"]),
        (["run", "r.yaml", "--ray", "ray://host:10001"], ["run", "r.yaml", "--ray", "ray://host:10001"]),
    ],
)
def test_ray_may_stand_without_an_address(words: list[str], wanted: list[str]) -> None:
    assert filled(words) == wanted


@pytest.mark.parametrize(
    ("how", "words"),
    [({"jobs": 2, "ray": "auto"}, "Ray decides"), ({"jobs": 0}, "jobs 0"), ({"threads": 0}, "threads")],
)
def test_what_cannot_be_shared_so(how: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match=words):
        run(recipe_of(tmp_path), tmp_path / "out", progress=False, **how)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FfnkitError, match=r"ffnkit\[ray\]"):
        run(recipe_of(tmp_path), tmp_path / "out", progress=False, ray="auto")


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray raises a plain Exception where its node is not there in time."""

    def init(**_: Any) -> None:
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(FfnkitError, match="--ray auto.*timed out during startup"):
        cluster.connected("auto")


# --- in processes of their own

CLUSTER = """
import ray
for left in reversed(range(6)):
    try:
        ray.init(num_cpus=2, include_dashboard=False)
        break
    except Exception:  # it gives its node 30 seconds to start, too few on a busy machine
        ray.shutdown()
        if not left:
            raise
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("recipe"))


ARMS: dict[str, Any] = {
    "whole": {},
    "half": {"method": "fusion", "width": 0.5},
    "quarter": {"method": "magnitude", "width": 0.25},
}


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One after the other."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run(recipe_of(folder, arms=ARMS, export="compact"), out, progress=False, isolate=False).ok
    return out


def cards(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): p.read_text() for p in sorted(out.glob("units/*/*/*/README.md"))}


def kill_one(out: Path, killed: list[int]) -> None:
    """Signal 9 to the process that tunes the arm "half", or evaluates it afterwards."""
    unit, until = out / "units" / "half" / "seed-0", time.monotonic() + 800  # as long as the run may take
    while time.monotonic() < until and not list(unit.glob("work/tune/checkpoint-*")):
        time.sleep(0.002)
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = place.read_bytes()
            if b"ffnkit.recipe.worker\0" + str(out).encode() + b"\0half" in words:
                os.kill(int(place.parent.name), signal.SIGKILL)
                killed.append(int(place.parent.name))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_figures_beside_each_other_and_after_a_kill(folder: Path, plain: Path, tmp_path: Path) -> None:
    out, killed = tmp_path / "out", list[int]()
    killer = threading.Thread(target=kill_one, args=(out, killed), daemon=True)
    killer.start()
    results = run(recipe_of(folder, arms=ARMS, export="compact"), out, progress=False, jobs=2, threads=1)
    killer.join()
    assert results.ok and killed, results.failed
    assert outcome(out) == outcome(plain)
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["half"]["latency_ratio"] > 0 and rows["half"]["attempts"], "measured after all; taken up again"
    # cards name the reference's figures, whichever ends first; only the memory and the time differ
    assert {name: "uncompressed" in text for name, text in cards(out).items()} == {
        name: "uncompressed" in text for name, text in cards(plain).items()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_a_ray_cluster(folder: Path, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(folder, arms=ARMS, export="compact").to_dict()))
    code = CLUSTER + (
        "import json, sys; from pathlib import Path; from ffnkit.recipe import run; from ffnkit.recipe.schema "
        "import recipe_from; found = run(recipe_from(json.loads("
        "Path(sys.argv[1]).read_text())), sys.argv[2], False, ray='auto', threads=1); assert found.ok, found.failed"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    killed: list[int] = []
    threading.Thread(target=kill_one, args=(out, killed), daemon=True).start()
    subprocess.run([sys.executable, "-c", code, str(recipe), str(out)], env=environment, check=True, timeout=800)
    assert killed
    assert outcome(out) == outcome(plain)


def test_a_file_in_the_place_of_a_searchs_claim_is_told_not_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = Folder(tmp_path)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "task").write_text("")
    with pytest.raises(FileExistsError), folder.turn("task"):
        raise AssertionError
