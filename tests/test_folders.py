"""Outputs on disk: whole or not there, what is not ours stays, places that cannot be exchanged, modes, locks, kills."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import ffnkit as fk
from ffnkit.checkpoint.adapters import load_adapter, save_adapter
from ffnkit.checkpoint.peft_lora import save_lora
from ffnkit.errors import FfnkitError
from ffnkit.io import folders, manifest, workspace
from ffnkit.io.files import replacing, write_text
from ffnkit.io.folders import staging

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def model(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, vocab_size=50)
    return BertForSequenceClassification(config).eval()


def adapted() -> BertForSequenceClassification:
    own = model()
    return fk.apply(own, fk.plan(own, fk.DSEE(targets="ffn", rank=2)))


def put(target: Path, text: str, kind: str = "model", **more: str) -> None:
    """An output of one text in two files, and more."""
    with staging(target, kind) as new:
        for name, content in {"config.json": text, "model.safetensors": text, **more}.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(content)


def content(folder: Path) -> dict[str, str]:
    """All files but the manifest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.FILE]
    return {path.relative_to(folder).as_posix(): path.read_text(errors="replace") for path in files}


def names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name != manifest.FILE}


# --- what is ours and what is not -----------------------------------------------------------------------------------


def test_what_is_not_ours_stays_and_what_an_earlier_save_wrote_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fk.save(model(), out, max_shard_size="5KB")
    mine = {"probe.safetensors": "a", "notes.bin": "b", "logs/a.txt": "c", "adapter_model.safetensors": "d"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    assert (out / "model.safetensors.index.json").exists()
    fk.save(model(1), out)
    assert {name: text for name, text in content(out).items() if name in mine} == mine
    assert {path.name for path in out.glob("model*.safetensors*")} == {"model.safetensors"}
    assert torch.equal(fk.load(out).classifier.weight, model(1).classifier.weight)


@pytest.mark.parametrize("edited", [False, True])
def test_a_readme_of_the_users_own_stays(tmp_path: Path, edited: bool) -> None:
    """Written by the user from the start, or ours that the user has rewritten since."""
    out = tmp_path / "out"
    out.mkdir()
    if edited:
        fk.save(model(), out)
    (out / "README.md").write_text("mine")
    fk.save(model(), out)
    fk.export(model(), out)
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    fk.save(model(), out, card="ours")
    fk.save(model(), out, card="ours again")
    assert (out / "README.md").read_text() == "ours again"


def test_a_model_and_its_adapter_live_in_one_folder(tmp_path: Path) -> None:
    for order in ((0, 1), (1, 0), (0, 1, 0, 1)):
        out = tmp_path / "".join(map(str, order))
        for step in order:
            (fk.save if step == 0 else save_adapter)(adapted(), out)
        again = load_adapter(fk.load(out), out) if 1 in order else fk.load(out)
        assert again.classifier.weight.shape == (2, 16) and (out / "README.md").exists()


@pytest.mark.parametrize(
    ("write", "there"),
    [
        (fk.save, "pytorch_model.bin"),
        (fk.export, "model-00001-of-00002.safetensors"),
        (fk.save, "model.safetensors.index.json"),
        (fk.save, "adapter_config.json"),
        (save_lora, "config.json"),
    ],
)
def test_what_would_be_read_together_is_refused_before_anything_is_written(
    tmp_path: Path, write: Callable[..., Any], there: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / there).write_text("of others")
    own = adapted() if write is save_lora else model()
    with pytest.raises(FfnkitError, match="read together") as error:
        write(own, out)
    assert there in str(error.value) and os.listdir(out) == [there] and os.listdir(tmp_path) == ["out"]


def test_outputs_of_several_kinds_replace_their_own_files_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, "one", more="x", **{"compact/config.json": "one"})
    with staging(out, "analysis") as new:
        (new / "analysis.json").write_text("figures")
    (out / "compact" / "mine.txt").write_text("mine")
    put(out, "two")
    assert content(out) == {
        "config.json": "two",
        "model.safetensors": "two",
        "analysis.json": "figures",
        "compact/mine.txt": "mine",
    }


def test_what_comes_while_the_old_is_exchanged_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    put(out, "one")
    carry = folders._carry_over

    def late(old: Path, new: Path, kept: list[Path]) -> None:
        carry(old, new, kept)
        (old / "late.txt").write_text("mine")

    monkeypatch.setattr(folders, "_carry_over", late)
    put(out, "two")
    assert content(out) == {"config.json": "two", "model.safetensors": "two", "late.txt": "mine"}


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    for name in ("link", "other"):
        (tmp_path / name).symlink_to(real)  # which is not there yet
    for text in ("one", "two"):
        put(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and content(real)["config.json"] == "two"
    assert names(tmp_path) == {"disk", "link", "other"} and names(tmp_path / "disk") == {"real"}
    (tmp_path / "file").write_text("old")
    (tmp_path / "to-file").symlink_to("file")
    write_text(tmp_path / "to-file", "new")
    assert (tmp_path / "to-file").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("above", [False, True])
def test_the_working_folder_is_filled_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    here = tmp_path / "here"
    (here / "below").mkdir(parents=True)
    (here / "mine.txt").write_text("mine")
    monkeypatch.chdir(here / "below" if above else here)
    target, number = Path(".." if above else "."), here.stat().st_ino
    with staging(target, "analysis") as new:
        (new / "analysis.json").write_text("figures")
    fk.save(model(), target)
    assert here.stat().st_ino == number and os.getcwd() == str(here / "below" if above else here)
    assert (here / "mine.txt").read_text() == "mine" and fk.load(target).num_labels == 2
    with pytest.raises(FfnkitError, match="working folder"):  # and not after the work
        fk.save(model(), target)
    with staging(target, "analysis") as new:
        (new / "analysis.json").write_text("others")
    assert (here / "analysis.json").read_text() == "others" and not [n for n in os.listdir(here) if "tmp" in n]


@pytest.fixture(params=["tmpfs", "bind", "inside", "overlay"])
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a mount point, above one, or in the lower layer of an overlay."""
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    where = place / "out"
    if request.param == "tmpfs":
        words = ["-t", "tmpfs", "none"]
    elif request.param == "overlay":
        for name in ("upper", "work"):
            (tmp_path / name).mkdir()
        (tmp_path / "memory").mkdir()
        words = ["-t", "overlay", "overlay", "-o"]
        words += [f"lowerdir={place},upperdir={tmp_path}/memory/upper,workdir={tmp_path}/memory/work"]
        where = place
    else:
        words = ["--bind", str(tmp_path / "other")]
        where = place / "out" / "data" if request.param == "inside" else where
        where.mkdir(exist_ok=True)
    mount = [["mount", *words, str(where)]]
    if request.param == "overlay":  # its upper layer must not be on an overlay itself
        made = ["mkdir", f"{tmp_path}/memory/upper", f"{tmp_path}/memory/work"]
        mount = [["mount", "-t", "tmpfs", "none", f"{tmp_path}/memory"], made, *mount]
    done = []
    try:
        for command in mount:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("nothing can be mounted here")
            done += [command[-1]] if command[0] == "mount" else []
        yield place / "out"
    finally:
        for each in reversed(done):
            subprocess.run(["umount", each], check=True)


@pytest.mark.skipif(not ROOT, reason="mounting needs root")
def test_places_that_cannot_be_exchanged_are_filled_or_refused(mounted: Path) -> None:
    (mounted / "mine.txt").write_text("mine")
    put(mounted, "one")
    assert content(mounted) == {"config.json": "one", "model.safetensors": "one", "mine.txt": "mine"}
    before = {**content(mounted)}
    try:
        folders.check_target(mounted)
    except FfnkitError as error:
        assert "in one step" in str(error)
        with pytest.raises(FfnkitError, match="in one step"):
            put(mounted, "two")
        assert content(mounted) == before
    else:  # some overlays can
        put(mounted, "two")
        assert content(mounted)["model.safetensors"] == "two"
    put(mounted / "below", "one")
    put(mounted / "below", "two")
    assert content(mounted / "below") == {"config.json": "two", "model.safetensors": "two"}


@pytest.mark.parametrize("name", ["a[0-9]", "b*", "c?", "with space", "n" * 250, "ü"])
def test_any_name_is_a_target_and_leaves_nothing_beside_it(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    place = _killed_in(target)
    for text in ("one", "two"):
        put(target, text)
    write_text(tmp_path / f"{name[:240]}.json", "x")
    fk.plan(model(), fk.Fusion(width=0.5, restarts=1)).save(tmp_path / f"{name[:240]}.plan")
    assert content(target)["config.json"] == "two" and not place.exists()
    assert names(tmp_path) == {name, f"{name[:240]}.json", f"{name[:240]}.plan"}


def test_targets_that_can_never_be_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300), Path("/proc/nothing/below")):
        with pytest.raises(FfnkitError):
            fk.save(model(), target)
        with pytest.raises(FfnkitError):
            write_text(target / "x", "x")
    with pytest.raises(FfnkitError, match="regular file"):
        fk.plan(model(), fk.Fusion(width=0.5, restarts=1)).save(tmp_path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_new_files_follow_the_umask_and_old_folders_keep_their_mode(tmp_path: Path, mask: int) -> None:
    out, private = tmp_path / "out", tmp_path / "private"
    before = os.umask(mask)
    try:
        fk.save(model(), out)
        fk.plan(model(), fk.Fusion(width=0.5, restarts=1)).save(tmp_path / "plan")
        private.mkdir(mode=0o700)
        (private / "sub").mkdir()
        (private / "sub").chmod(0o711)
        os.umask(0)
        for _ in range(2):
            fk.save(model(), private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
    for path in (*out.iterdir(), tmp_path / "plan"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and stat.S_IMODE((private / "sub").stat().st_mode) == 0o711
    assert stat.S_IMODE((private / "model.safetensors").stat().st_mode) == 0o666


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
def test_the_owner_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, "one")
    os.chown(out, 1234, 2345)
    os.chmod(out, 0o2750)
    put(out, "two")
    found = out.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o2750)


_AS_NOBODY = """
import os, sys
from ffnkit.errors import FfnkitError
from ffnkit.io.folders import check_target, staging
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with staging(sys.argv[1]) as new:
        (new / "config.json").write_text("of nobody")
    print("written")
except FfnkitError as error:
    print(error)
"""


@pytest.mark.skipif(not ROOT, reason="only root becomes another user")
def test_a_folder_of_another_user_is_filled_or_refused(tmp_path: Path) -> None:
    for above in [*tmp_path.parents, tmp_path]:
        if above.stat().st_mode & 0o077 == 0:
            os.chmod(above, 0o711)
    tmp_path.chmod(0o777)
    for mode, filled, told in (
        (0o777, False, "written"),
        (0o777, True, "another user"),
        (0o755, False, "not writable"),
    ):
        out = tmp_path / f"{mode}-{filled}"
        out.mkdir()
        out.chmod(mode)
        if filled:
            (out / "config.json").write_text("of root")
        command = [sys.executable, "-c", _AS_NOBODY, str(out)]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert told in found.stdout, (told, found)
        assert out.stat().st_uid == 0 and not [name for name in os.listdir(tmp_path) if "tmp" in name]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_output_and_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fk.save(model(), tmp_path / "out")
    before, own = content(tmp_path / "out"), model(1)

    def full(directory: Path, **_: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(own, "save_pretrained", full)
    for target in ("out", "new", "deep/er/new"):
        with pytest.raises(FfnkitError, match="no space left"):
            fk.save(own, tmp_path / target)
    assert content(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_goes_away_meanwhile_is_one_line(tmp_path: Path) -> None:
    import shutil

    with pytest.raises(FfnkitError, match="went away"), staging(tmp_path / "above" / "out") as new:
        shutil.rmtree(tmp_path / "above")
        (new / "config.json").write_text("late")


def test_loading_never_writes(tmp_path: Path) -> None:
    fk.save(model(), tmp_path / "m")
    save_adapter(adapted(), tmp_path / "a")
    for name in (".m.old", ".m.tmp-1-x", workspace.PREFIX + "x", ".a.old"):
        (tmp_path / name).mkdir()
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    load_adapter(fk.load(tmp_path / "m"), tmp_path / "a")
    fk.inspect(fk.load(tmp_path / "m"))
    assert sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


# --- locks and kills ------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from ffnkit.io.folders import staging
target, number = Path(sys.argv[1]), 0
while True:
    number += 1
    with staging(target) as new:
        with staging(new / ".") as inner:
            for name in ("a", "b", "config.json"):
                (inner / name).write_text(str(number) * 1000)
        (new / "c").write_text(str(number) * 1000)
    print(number, flush=True)
"""


def _started(code: str, *words: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline()
    return child


def _killed(child: subprocess.Popen[str]) -> None:
    with child:
        child.send_signal(signal.SIGKILL)


def _killed_in(target: Path) -> Path:
    """What a process leaves that was killed while it built an output of ``target``."""
    place = Path(workspace.tempfile.mkdtemp(prefix=workspace.PREFIX, dir=target.parent))
    (place / workspace.LOCK).write_bytes(os.fsencode(target.name))
    (place / workspace.NEW / "deep").mkdir(parents=True)
    (place / workspace.NEW / "deep" / "half").write_text("half")
    return place


def test_a_kill_leaves_the_old_or_the_new_output_and_the_next_one_sweeps(tmp_path: Path) -> None:
    target = tmp_path / "out[1]"
    for delay in (0.0, 0.004, 0.009, 0.017):
        child = _started(_WRITER, str(target))
        (target / "mine").write_text("mine") if delay == 0.0 else None
        time.sleep(delay)
        _killed(child)
        assert len({(target / name).read_text() for name in ("a", "b", "c", "config.json")}) == 1, "a mixture"
    put(target, "last")
    assert names(tmp_path) == {"out[1]"}, "leftovers of the killed were not swept"


_HOLDER = """
import sys, time
from pathlib import Path
from ffnkit.io.folders import staging
with staging(Path(sys.argv[1])) as new:
    (new / "config.json").write_text("slow")
    print("here", flush=True)
    time.sleep(float(sys.argv[2]))
print("done", flush=True)
"""


def test_a_live_output_of_another_process_is_left_alone_whatever_its_number(tmp_path: Path) -> None:
    """Other containers and hosts have their own process numbers: a lock tells, not the number."""
    target = tmp_path / "out"
    words = ["unshare", "--pid", "--fork"] if ROOT else []
    if words and subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        words = []
    command = [*words, sys.executable, "-c", _HOLDER, str(target), "1.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "here\n"
        for text in ("one", "two"):
            put(target, text)
        assert len([name for name in os.listdir(tmp_path) if name.startswith(workspace.PREFIX)]) == 1
        assert child.stdout.readline() == "done\n"
    assert content(target)["config.json"] == "slow" and os.listdir(tmp_path) == ["out"]
    child2 = _started(_HOLDER, str(target), "60")
    _killed(child2)
    put(target, "three")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom ffnkit.io.workspace import held\n"
        "with held(sys.argv[1], 'x'):\n    print('here', flush=True)\n    time.sleep(60)"
    )
    child = _started(code, str(tmp_path))
    with pytest.raises(FfnkitError, match="another run"), workspace.held(tmp_path, "running"):
        pass
    _killed(child)
    with workspace.held(tmp_path, "running"):
        pass


def test_without_an_atomic_exchange_the_old_output_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, or outside of Linux."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    for text in ("old", "new"):
        put(target, text)
    (target / "mine.txt").write_text("mine")
    assert content(target)["config.json"] == "new" and os.listdir(tmp_path) == ["out"]
    place = _killed_in(target)
    os.rename(target, place / workspace.OLD)  # as a kill between the two renames leaves it
    with pytest.raises(FfnkitError, match="put aside"):
        fk.load(target)
    write_text(tmp_path / "other.json", "x")  # any output beside it
    assert content(target) == {"config.json": "new", "model.safetensors": "new", "mine.txt": "mine"}
    assert names(tmp_path) == {"out", "other.json"}
    rename = os.rename

    def failing(old: Any, new: Any) -> None:
        if Path(old).name == workspace.NEW:
            raise OSError(errno.EIO, "broken")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FfnkitError):
        put(target, "never")
    assert content(target)["config.json"] == "new"


def test_single_files_are_whole_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    path.chmod(0o640)
    with pytest.raises(RuntimeError), replacing(path) as new:
        new.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and os.listdir(tmp_path) == ["file"]
    with pytest.raises(RuntimeError), replacing(tmp_path / "deep" / "er" / "file"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file"]


def test_the_manifest_tells_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, "one", big="x" * (1 << 21))
    assert manifest.ours(out, "model") == {"config.json", "model.safetensors", "big", manifest.FILE}
    (out / "config.json").write_text("two")
    (out / "big").write_text("y" * (1 << 20))
    assert manifest.ours(out, "model") == {"model.safetensors", manifest.FILE}
    for damaged in ("", "[]", '{"format": 1}', '{"format": 1, "outputs": {"model": 3}}', json.dumps({"format": 9})):
        (out / manifest.FILE).write_text(damaged)
        assert manifest.ours(out, "model") <= {manifest.FILE}
    put(out, "three")
