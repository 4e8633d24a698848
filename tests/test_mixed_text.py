"""Calibration text of many kinds, mixed with the user's own; progress of what takes long, in a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from test_cli import WORDS, bad, bert, good, verbosity

import ffnkit as fk
from ffnkit.calibration import shipped
from ffnkit.cli import console
from ffnkit.errors import FfnkitError
from ffnkit.tune import CalibrationSettings, calibration_batches

_ = (bert, verbosity)  # fixtures
UNKNOWN = 1  # what the text of many kinds is to a tokenizer of ten words


def test_what_text_cannot_be_read_is_one_line(own: Path, bert: Path, tmp_path: Path) -> None:
    """By a model of images, from a folder, beside statistics; one token a text is enough for a pass."""
    images = tmp_path / "vit"
    FAMILIES["vit"].model().save_pretrained(images)
    text = ("--text", own, "--tokenizer", bert)
    for words in (("calibrate", images), ("compress", images, "--set", "width=0.5")):
        line = bad(*words, *text, "--out", tmp_path / "x")
        assert "--text" in line and "does not read text" in line and "loading" not in line
    model, tokenizer = FAMILIES["vit"].model(), transformers.AutoTokenizer.from_pretrained(bert)
    with pytest.raises(FfnkitError, match="does not read text"):
        calibration_batches(model, tokenizer, CalibrationSettings(text=str(own)))
    narrow = ("compress", bert, "--set", "width=0.5", "--dry-run")
    assert "it is a folder" in bad(*narrow, "--text", tmp_path)
    good(*narrow, "--text", own, "--calibration-tokens", 1)
    one = calibration_batches(fk.load(bert), tokenizer, CalibrationSettings(text=str(own), tokens=1))
    assert len(one) == 2  # one of the text, one of the text of many kinds
    statistics = tmp_path / "s.safetensors"
    good("calibrate", bert, "--text", own, "--tokens", 50, "--out", statistics)
    line = bad(*narrow, "--statistics", statistics, "--calibration-tokens", 100)
    assert "--calibration-tokens is given too" in line
    good(*narrow, "--statistics", statistics)


def test_the_text_is_of_many_kinds() -> None:
    kinds = shipped.pieces()
    assert len(kinds) >= 12 and min(map(len, kinds.values())) >= 5
    every = [text for part in ("fit", "decide", "report") for text in shipped.texts(shipped.kinds(part))]
    assert sorted(every) == sorted(piece for pieces in kinds.values() for piece in pieces)
    assert all(piece == piece.strip("\n") and 200 < len(piece) < 5000 for piece in every)
    of = {piece: kind for kind, pieces in kinds.items() for piece in pieces}
    every = shipped.texts()
    for start in range(0, len(every) - 40, 10):  # wherever a block is cut out, kinds mix
        assert len({of[piece] for piece in every[start : start + 40]}) >= 8


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A text of known words alone, of more than enough tokens."""
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(" ".join(WORDS) for _ in range(300)))
    return path


def share_of_own(folder: Path, **settings: Any) -> float:
    """The share of tokens that are known words."""
    model = fk.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = CalibrationSettings(tokens=2000, batch_size=2, max_length=24, **settings)
    ids = [batch["input_ids"][batch["attention_mask"] > 0] for batch in calibration_batches(model, tokenizer, given)]
    tokens = torch.cat(ids)
    assert 2000 <= len(tokens) <= 2200
    return float((tokens >= 5).float().sum() / ((tokens == UNKNOWN) | (tokens >= 5)).float().sum())


@pytest.mark.parametrize("mix", [0.0, 0.25, None, 1.0])
def test_the_share_is_that_which_is_asked_for(mix: float | None, bert: Path, own: Path) -> None:
    wanted = 0.5 if mix is None else 1 - mix
    found = share_of_own(bert, text=str(own), **({} if mix is None else {"mix": mix}))
    assert abs(found - wanted) < 0.06  # words such as "good" are in the other text too


def test_without_a_text_all_of_it_is_of_many_kinds(bert: Path) -> None:
    assert share_of_own(bert) < 0.05
    for wrong in (-0.1, 1.1, True, float("nan")):
        with pytest.raises(ValueError):
            CalibrationSettings(mix=wrong)


@pytest.mark.slow
def test_command_line(bert: Path, own: Path, tmp_path: Path) -> None:
    words = ("compress", bert, "--method", "calibrated-fusion", "--set", "width=0.5", "--calibration-tokens", 200)
    digests = []
    for name, more in {"none": (), "own": ("--text", own, "--mix", 0), "both": ("--text", own)}.items():
        good(*words, *more, "--out", tmp_path / name)
        weights = fk.load(tmp_path / name).state_dict()
        digests.append(sum(float(value.double().sum()) for value in weights.values()))
    assert len(set(digests)) == 3  # the three differ in what they were fitted to
    assert "no --text to mix with" in bad(*words, "--mix", 0.5, "--out", tmp_path / "x")
    assert "--mix" in good("compress", "--help").stdout
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    line = bad("compress", tmp_path / "vit", *words[2:], "--out", tmp_path / "x")
    assert "does not read text" in line and not (tmp_path / "x").exists()


def test_a_text_that_fails_is_told(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FfnkitError):
        share_of_own(bert, text=str(tmp_path / "missing.txt"))
    for blank in ("", "\n \n"):  # the text of many kinds does not take its place in silence
        (tmp_path / "blank.txt").write_text(blank)
        with pytest.raises(FfnkitError):
            share_of_own(bert, text=str(tmp_path / "blank.txt"))


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("ffnkit.io.progress.time.monotonic", lambda: now)
    with console.progress("planning") as step:
        for done in range(1, 31):
            now += 2
            step(done, 30, f"layers.{done - 1}.mlp")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "planning layers.2.mlp: 3 of 30 after 6 s, about 54 s left"
    assert len(lines) == 10  # one in five seconds at most
    with console.progress("planning") as step:  # what is quick says nothing
        step(1, 1, "layers.0.mlp")
    monkeypatch.setattr(console.state, "quiet", True)
    with console.progress("planning") as step:
        now += 60
        step(1, 2, "layers.0.mlp")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("positions", "long"), [(1024, 512), (512, 512), (48, 48)])
def test_running_text_is_read_in_long_pieces(positions: int, long: int, own: Path) -> None:
    """What tokens far apart do to each other counts: pieces as long as what is measured, not as a task's rows."""
    from test_tune import SMALL, TASK, TOKENIZER, splits

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **sizes, max_position_embeddings=positions))
    given = CalibrationSettings(tokens=6000, text=str(own), mix=0.25)
    batches = calibration_batches(model, TOKENIZER, given)
    shapes = {tuple(batch["input_ids"].shape) for batch in batches}
    assert {length for _, length in shapes} == {long} and max(rows for rows, _ in shapes) == 4
    asked = calibration_batches(model, TOKENIZER, given.model_copy(update={"max_length": 24, "batch_size": 3}))
    assert {tuple(batch["input_ids"].shape) for batch in asked} >= {(3, 24)}
    rows = calibration_batches(model, TOKENIZER, CalibrationSettings(tokens=200), task=TASK, rows=splits().train)
    assert max(len(batch["input_ids"]) for batch in rows) == 16


def test_sizes_that_are_not_given_follow_from_the_kind_of_data() -> None:
    usual = CalibrationSettings()
    assert (usual.row_length, usual.text_length) == (128, 512)
    assert [usual.texts_a_pass(length) for length in (8, 128, 256, 512, 4096)] == [16, 16, 8, 4, 1]
    asked = CalibrationSettings(max_length=64, batch_size=5)
    assert (asked.row_length, asked.text_length, asked.texts_a_pass(512)) == (64, 64, 5)
    for name in ("max_length", "batch_size"):
        with pytest.raises(ValueError):
            CalibrationSettings(**{name: 0})
