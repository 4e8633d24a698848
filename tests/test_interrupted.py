"""Commands that are interrupted, fail or lose their folder: nothing of the user's goes, nothing of ours is left."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from test_cli import bad, good, invoke
from test_recipe_run import recipe_of, run, tiny

from ffnkit.cli.group import ending, report
from ffnkit.cli.tune_job import SETTINGS
from ffnkit.errors import FfnkitError, WritingError
from ffnkit.io.files import disk_errors
from ffnkit.recipe.unit import _Job
from ffnkit.tune.loop import Loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("interrupted"))


class Stop:
    """Ctrl-C, or an error, in a step of training that comes after the first checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.seen, self.error = 0, 0, BaseException()
        plain = Loop.training_step

        def step(loop: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.at and self.seen == self.at:
                raise self.error
            return plain(loop, *args, **kwargs)

        monkeypatch.setattr(Loop, "training_step", step)

    def after(self, steps: int, error: BaseException) -> None:
        self.seen, self.at, self.error = 0, steps + 1, error


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


def tune_words(folder: Path, out: Path, *more: object) -> list[object]:
    data = ["--train-file", folder / "train.csv", "--text-column", "text", "--label-column", "label"]
    training = ["--steps", 6, "--batch-size", 8, "--max-length", 16, "--eval-every", 2]
    return ["tune", folder / "model", *data, *training, "--out", out, *more]


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_interrupted_tuning_is_kept_until_a_flag_gives_it_up(folder: Path, tmp_path: Path, stop: Stop) -> None:
    out, works = tmp_path / "out", tmp_path / ".out.tuning"
    good(*tune_words(folder, tmp_path / "whole", "--lr", "0.01"))
    words = tune_words(folder, out, "--lr", "0.01")
    stop.after(4, KeyboardInterrupt())
    assert "same command again: it goes on" in bad(*words, code=130)
    (work,) = works.iterdir()
    before = state(works)
    assert any("checkpoint-4" in name for name in before) and not out.exists()

    stop.after(0, KeyboardInterrupt()), setattr(stop, "at", 0)
    other = tune_words(folder, out, "--lr", "0.02")
    line = bad(*other)
    assert "settings" in line and "--restart" in line and state(works) == before
    for wrong in (["--best-metric", "mood"], ["--tuner-set", "rank=2"], ["--teacher", "x"], ["--precision", "fp16"]):
        assert invoke(*other, "--restart", *wrong).exit_code == 2
        assert state(works) == before, f"discarded before {wrong} was found"
    stop.after(0, RuntimeError("broken"))
    assert invoke(*other, "--restart").exit_code == 1
    assert state(works) == before and [path for path in works.iterdir()] == [work]

    stop.at = 0
    assert "resuming" in good(*words).stderr
    assert not works.exists() and (out / "metrics.json").exists()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()

    stop.after(4, KeyboardInterrupt())
    bad(*words, code=130)
    stop.at = 0
    good(*other, "--restart")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_restart_begins_the_same_settings_anew(folder: Path, tmp_path: Path, stop: Stop) -> None:
    words = tune_words(folder, tmp_path / "out")
    stop.after(4, KeyboardInterrupt())
    bad(*words, code=130)
    stop.at, stop.seen = 0, 0
    assert "resuming" not in good(*words, "--restart").stderr
    assert stop.seen == 6


def test_a_tuning_that_fails_leaves_nothing(folder: Path, tmp_path: Path, stop: Stop) -> None:
    for steps, error, code in ((0, RuntimeError("broken"), 1), (1, KeyboardInterrupt(), 130), (1, OSError(28, "x"), 2)):
        stop.after(steps, error)
        assert invoke(*tune_words(folder, tmp_path / "deep" / "out")).exit_code == code
        assert list(tmp_path.iterdir()) == []


def test_the_same_command_twice_at_once_is_refused(folder: Path, tmp_path: Path, stop: Stop) -> None:
    from ffnkit.io.workspace import held

    words = tune_words(folder, tmp_path / "out")
    stop.after(4, KeyboardInterrupt())
    bad(*words, code=130)
    (work,) = (tmp_path / ".out.tuning").iterdir()
    assert (work / SETTINGS).is_file()
    with held(work, "x"):
        assert "at work" in bad(*words)


def test_a_run_whose_folder_goes_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    recipe = recipe_of(folder, arms={"half": {"method": "fusion", "width": 0.5}}, stages=["compress", "evaluate"])
    plain = _Job.evaluate

    def gone(self: Any) -> dict[str, Any]:
        shutil.rmtree(out)
        return plain(self)

    monkeypatch.setattr(_Job, "evaluate", gone)
    with pytest.raises(FfnkitError, match="removed meanwhile"):
        run(recipe, out)
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, which a recipe of the tiny model fills while it works."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("left", [0, 8, 60])
def test_a_disk_that_fills_while_a_recipe_runs_is_one_line(folder: Path, small_disk: Path, left: int) -> None:
    """From before the first file to the middle of a training."""
    out = small_disk / "out"
    (small_disk / "filler").write_bytes(b"x" * (256 - left) * 1024)
    recipe = recipe_of(folder, arms={"half": {"method": "fusion", "width": 0.5}}, stages=["compress", "tune"])
    with pytest.raises(FfnkitError, match="no space left") as error:
        results = run(recipe, out)
        assert results.failed and "no space left" in results.failed[0]["error"], results.failed
        raise FfnkitError("", results.failed[0]["error"], "")
    assert "\n" not in str(error.value)
    (small_disk / "filler").unlink()
    assert left or not out.exists()
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_schedulers_send_ends_as_ctrl_c_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is ignored, as by nohup, stays so."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with ending() as came:
            with pytest.raises(KeyboardInterrupt) as caught:
                os.kill(os.getpid(), number)
                time.sleep(5)
            assert signal.getsignal(number) == signal.SIG_DFL, "the next one ends at once"
        assert report(caught.value, False, came) == 128 + number
        assert capsys.readouterr().err.startswith(f"ffnkit: error: ended by {name}. Run the same command again")
        assert report(KeyboardInterrupt(), False) == 130
        signal.signal(number, signal.SIG_IGN)
        with ending() as came:
            os.kill(os.getpid(), number)
        assert not came
    finally:
        signal.signal(number, before)


def test_a_full_disk_is_seen_behind_what_torch_says(tmp_path: Path) -> None:
    """Its writer's own error hides the first one; the negative control is another error."""
    with pytest.raises(WritingError, match="no space left on the disk"), disk_errors(tmp_path):
        try:
            raise RuntimeError("basic_ios::clear: iostream error")
        finally:
            raise RuntimeError("unexpected pos 19520 vs 19408")
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes differ")
    for number in (errno.EFBIG, errno.EACCES, errno.EIO, errno.EROFS):  # as safetensors tells them
        with pytest.raises(WritingError, match=os.strerror(number)), disk_errors(tmp_path):
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    with pytest.raises(WritingError, match="no space left on the disk"), disk_errors(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: full (os error {errno.EDQUOT})")
    with pytest.raises(SafetensorError, match="os error 2"), disk_errors(tmp_path):  # of what is read
        raise SafetensorError("No such file or directory (os error 2)")
    with pytest.raises(FfnkitError, match="plan"), disk_errors(tmp_path):  # is one line already
        raise FfnkitError("plan", "it cannot be read (os error 13)", "Make it again")
    error = WritingError("a", "b", "c")
    assert type(pickle.loads(pickle.dumps(error))) is WritingError is type(error.within("d"))
