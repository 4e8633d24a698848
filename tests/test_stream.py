"""A checkpoint compressed from its files: the same as in memory, to the bit, and never whole in memory."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import EVERY, METHODS, REFUSED, case_of, slow_but
from safetensors.torch import load_file

import ffnkit as fk
from ffnkit.io import files, memory
from ffnkit.io.architectures import load_any
from ffnkit.methods.narrow import by_block
from ffnkit.stream import job, opening, record
from ffnkit.stream.pages import is_mapped, let_go

UPDATES = ("sparsegrad", "dsee")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the small models count as large."""
    monkeypatch.setattr(files, "SPOOL_FROM", 1)


def written(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder by name."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(first: Path, second: Path) -> None:
    a, b = written(first), written(second)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.equal(b[name]), name
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def both(tmp_path: Path, family: str, method: str, form: str) -> None:
    case = case_of(family)
    model = case.model()
    model.save_pretrained(tmp_path / "source")
    data = case.data(model)
    for name, stream in (("memory", False), ("files", True)):
        fk.compress(
            tmp_path / "source", EVERY[method](), tmp_path / name, data, form=form, stream=stream, max_shard_size="20KB"
        )
    same(tmp_path / "memory", tmp_path / "files")


@pytest.mark.parametrize("family", slow_but(("gpt2",), FAMILIES))
@pytest.mark.parametrize("form", [pytest.param("standard", marks=pytest.mark.slow), "compact"])
def test_it_is_the_same_in_every_family(family: str, form: str, tmp_path: Path) -> None:
    both(tmp_path, family, "fusion", form)


KINDS = ("bert", "llama", "t5", "mixtral")
CASES = [(m, f) for f in KINDS for m in EVERY if m not in (*METHODS, *UPDATES) and (m, f) not in REFUSED]


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_it_is_the_same_by_every_method(method: str, family: str, tmp_path: Path) -> None:
    both(tmp_path, family, method, "compact")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    case_of("llama").model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("family", slow_but(["mixtral"], ["llama", "mixtral"]))
def test_every_weight_lies_in_a_file(family: str, tmp_path: Path) -> None:
    """What experts are put together from lies in several tensors of the file."""
    case_of(family).model().save_pretrained(tmp_path / "source")
    plain = load_any(str(tmp_path / "source"))
    assert family == "llama" or not all(is_mapped(p.data_ptr()) for p in plain.parameters())
    with opening.streaming(tmp_path / "out"):
        model = load_any(str(tmp_path / "source"))
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
        assert all(is_mapped(p.data_ptr()) for p in model.parameters())
        let_go()
        new = {name: value.clone() for name, value in model.state_dict().items()}
    model = fk.apply(plain, fk.plan(plain, fk.Fusion(width=0.5, restarts=1)))
    assert all(value.equal(new[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob(".ffnkit-tmp-*"))


def test_pages_that_were_written_to_stay(source: Path) -> None:
    model = load_any(str(source))
    weight = next(model.parameters())
    with torch.no_grad():
        weight.add_(1)
    changed = weight.clone()
    let_go()
    assert weight.equal(changed)


@pytest.mark.parametrize("name", slow_but(["magnitude"], ["fusion", "clustering", "magnitude", "svd"]))
def test_what_is_planned_ffn_by_ffn_is_the_same(name: str, source: Path, tmp_path: Path) -> None:
    model = load_any(str(source))
    assert record.is_by_ffn(EVERY[name]())
    assert record.planned(model, EVERY[name](), str(source), tmp_path / "out")[0] == fk.plan(model, EVERY[name]())


@pytest.mark.slow
def test_interrupted_it_goes_on_where_it_was(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(fails_at: int, width: float = 0.5) -> int:
        planned: list[str] = []
        there = (tmp_path / "files").exists()

        def once(model: Any, method: Any) -> Any:
            if len(planned) == fails_at:
                raise KeyboardInterrupt
            planned.append(str(method.width))
            return plan(model, method)

        monkeypatch.setattr(record, "plan", once)
        try:
            fk.compress(source, fk.Fusion(width=width, restarts=1), tmp_path / "files", stream=True)
        except KeyboardInterrupt:
            assert (tmp_path / "files").exists() == there
        return len(planned)

    plan = record.plan
    assert count(fails_at=2) == 2
    assert count(fails_at=9) == 1
    assert not record.parts_of(tmp_path / "files").exists()
    fk.compress(source, fk.Fusion(width=0.5, restarts=1), tmp_path / "memory", stream=False)
    same(tmp_path / "memory", tmp_path / "files")
    assert count(fails_at=1) == 1
    assert count(fails_at=9, width=0.25) == 3  # other settings: nothing of it holds


_UNTIL_KILLED = """
import sys, time
import ffnkit as fk
from ffnkit.stream import record

plan, done = record.plan, []

def slowly(model, method):
    if len(done) == 2:
        print("two", flush=True)
        time.sleep(600)
    done.append(method)
    return plan(model, method)

record.plan = slowly
fk.compress(sys.argv[1], fk.Fusion(width=0.5, restarts=1), sys.argv[2], stream=True)
"""


@pytest.mark.slow
def test_killed_it_goes_on_behind_what_was_planned(source: Path, tmp_path: Path, caplog: Any) -> None:
    out = tmp_path / "files"
    command = [sys.executable, "-c", _UNTIL_KILLED, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "two\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists() and len(list(record.parts_of(out).rglob("*.safetensors"))) == 2
    fk.compress(source, fk.Fusion(width=0.5, restarts=1), out, stream=True)
    assert "2 FFNs were planned before" in caplog.text
    fk.compress(source, fk.Fusion(width=0.5, restarts=1), tmp_path / "memory", stream=False)
    same(tmp_path / "memory", out)
    assert {each.name for each in tmp_path.iterdir()} == {"source", "files", "memory"}


# --- block by block over data

BY_BLOCK: dict[str, Any] = {
    "calibrated": lambda: fk.CalibratedFusion(width=0.5, refine=5),
    "alone": lambda: fk.CalibratedFusion(width=0.5, effort="fast"),
    "closed form": lambda: fk.methods.build("modegpt", width=0.5, sequential=True),
    "whitened": lambda: fk.methods.build("svd", width=0.5, whiten=True),
    "refitted": lambda: fk.Fusion(width=0.5, restarts=1, refit=True, sequential=True),
}
ON_DATA = [("alone", "llama"), *((name, "llama") for name in BY_BLOCK if name != "alone")]
ON_DATA += [("calibrated", "t5"), ("calibrated", "mixtral"), ("calibrated", "bert")]


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (number > 0)) for number, case in enumerate(ON_DATA)],
)
def test_interrupted_at_every_block_it_goes_on_behind_the_last(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    case = case_of(family)
    model = case.model()
    model.save_pretrained(tmp_path / "source")
    data, out, before, calls = case.data(model), tmp_path / "files", by_block.write_text, [0]

    def stops(path: Path, text: str) -> None:
        before(path, text)
        if path.name == by_block.STATE:
            calls[0] += 1
            raise KeyboardInterrupt

    monkeypatch.setattr(by_block, "write_text", stops)
    told: list[int] = []
    monkeypatch.setattr(job, "_say", told.append)
    for _ in range(20):
        try:
            fk.compress(tmp_path / "source", BY_BLOCK[method](), out, data, stream=True)
            break
        except KeyboardInterrupt:
            assert not out.exists()
    assert calls[0] > 1 and told == sorted(told) and len(told) == calls[0], "each time behind one block more"
    fk.compress(tmp_path / "source", BY_BLOCK[method](), tmp_path / "memory", data, stream=False)
    same(tmp_path / "memory", out)
    assert {each.name for each in tmp_path.iterdir()} == {"source", "files", "memory"}


_UNTIL_KILLED_ON_DATA = """
import sys, time
import torch
import ffnkit as fk
from ffnkit.io import files, memory
from ffnkit.methods.narrow import by_block

files.SPOOL_FROM, write = 1, by_block.write_text

def once(path, text):
    write(path, text)
    print("one", flush=True)
    time.sleep(600)

by_block.write_text = once
data = torch.load(sys.argv[3])
fk.compress(sys.argv[1], fk.CalibratedFusion(width=0.5, refine=5), sys.argv[2], data, stream=True)
"""


@pytest.mark.slow
def test_killed_at_a_block_it_goes_on_behind_it_on_the_same_data(source: Path, tmp_path: Path, caplog: Any) -> None:
    """The negative control is other data, with which it begins anew."""
    model = load_any(str(source))
    data, out, method = case_of("llama").data(model), tmp_path / "files", BY_BLOCK["calibrated"]()
    torch.save(data, tmp_path / "data.pt")
    command = [sys.executable, "-c", _UNTIL_KILLED_ON_DATA, str(source), str(out), str(tmp_path / "data.pt")]
    left = record.parts_of(out)

    def killed() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "one\n"
            process.send_signal(signal.SIGKILL)
        assert not out.exists() and list(left.rglob(by_block.STATE))

    killed()
    fk.compress(source, method, out, data, stream=True)
    assert "1 FFNs were planned before" in caplog.text and not left.exists()
    fk.compress(source, method, tmp_path / "memory", data, stream=False)
    same(tmp_path / "memory", out)
    shutil.rmtree(out)
    killed()
    caplog.clear()
    other = [{**batch, "input_ids": batch["input_ids"].flip(-1)} for batch in data]
    fk.compress(source, method, out, other, stream=True)
    assert "planned before" not in caplog.text


def test_no_room_for_hidden_states_is_told_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_any(str(source))
    data = case_of("llama").data(model)
    assert "of disk while it runs" in record.room_for(model, data, tmp_path / "out")
    monkeypatch.setattr(record, "COPIES", 10**15)
    with pytest.raises(fk.FfnkitError, match="hidden states of the data take"):
        record.room_for(model, data, tmp_path / "out")


@pytest.mark.slow
def test_it_chooses_by_itself(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(job, "make_plan", lambda *a: seen.append(True) or (fk.plan(*a[:3]), None))
    fk.compress(source, EVERY["magnitude"](), tmp_path / "out")
    assert not seen
    monkeypatch.setattr(opening, "ROOM", 1e12)
    fk.compress(source, EVERY["magnitude"](), tmp_path / "out")
    assert seen and "memory are free: it stays in its files" in caplog.text


def test_a_containers_memory_is_what_counts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory may be much more than the container may take; pages of files go where it is wanted."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, value in (("memory.max", "max"), ("memory.current", "10000"), ("memory.stat", "anon 1\ninactive_file 0")):
        (tmp_path / name).write_text(value + "\n")
    assert opening.too_large(str(source)) == "", "a group without a limit"
    (tmp_path / "memory.max").write_text("10001\n")
    assert "stays in its files" in opening.too_large(str(source)) and memory.free_memory() == (1, 10001)
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 9000\n")
    assert memory.free_memory() == (9001, 10001)


def test_parts_are_of_one_snapshot_of_a_hub_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same name may hold other weights today: what was planned of the earlier ones goes."""
    later = shutil.copytree(source, tmp_path / "later")
    monkeypatch.setattr(record, "folder_of", lambda name: source)
    first = record.ready("a/model", EVERY["magnitude"](), tmp_path / "out", [])
    assert record.ready("a/model", EVERY["magnitude"](), tmp_path / "out", []) == first and first.is_dir()
    monkeypatch.setattr(record, "folder_of", lambda name: later)
    assert record.ready("a/model", EVERY["magnitude"](), tmp_path / "out", []) != first and not first.exists()


def test_what_cannot_be_streamed_says_so(source: Path, tmp_path: Path) -> None:
    with pytest.raises(fk.FfnkitError, match="it is the model that is read"):
        fk.compress(source, EVERY["magnitude"](), source)
    torch.save(load_any(str(source)).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(fk.FfnkitError, match="no safetensors files"):
        fk.compress(source, EVERY["magnitude"](), tmp_path / "out", stream=True)


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_that_cannot_be_read_is_one_line(index: str, source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(index)
    for stream in (True, None):
        with pytest.raises(fk.FfnkitError, match="model.safetensors.index.json cannot be read, or names no shards"):
            fk.compress(source, EVERY["magnitude"](), tmp_path / "out", stream=stream)


def test_what_is_refused_leaves_nothing_beside_the_output(source: Path, tmp_path: Path) -> None:
    """Neither of a method by FFN nor of one with data; what was planned before an interruption stays."""
    data = case_of("llama").data(load_any(str(source)))
    wrong = {"by FFN": (fk.Fusion(width=999), None), "on data": (fk.methods.build("flap", width=0.5), data)}
    for method, batches in wrong.values():
        with pytest.raises(fk.FfnkitError):
            fk.compress(source, method, tmp_path / "out", batches, stream=True)
        assert [each.name for each in tmp_path.iterdir()] == ["source"]
    place = record.ready("a", EVERY["magnitude"](), tmp_path / "out", [])
    (place / "0.safetensors").write_bytes(b"planned")
    with pytest.raises(KeyboardInterrupt), record.leaving_what_was_planned(place):
        raise KeyboardInterrupt
    assert (place / "0.safetensors").is_file()


@pytest.mark.slow
def test_no_room_on_the_disk_is_told_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "whole_bytes", lambda _: 10**18)
    with pytest.raises(fk.FfnkitError, match="are free on its disk"):
        fk.compress(source, EVERY["magnitude"](), tmp_path / "out", stream=True)
