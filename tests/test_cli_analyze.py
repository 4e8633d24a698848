"""``ffnkit analyze`` on a tiny model: its table and files, what it measures on, and every bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import WORDS, bad, bert, fuse, good, llama, verbosity  # noqa: F401

from ffnkit.cli.analyze_job import Texts, chosen_methods, halves, shared_heads
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import newly_initialized

QUICK = ("--examples", 3, "--ntk-layers", "last:1", "--set", "restarts=1", "--set", "refine=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 in small: 60 training rows, 12 validation rows."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst2").mkdir()
    texts = [f"{a} {b} {c}" for a in WORDS[:6] for b in WORDS[6:] for c in WORDS[:3]]
    for split, chosen in (("train", texts[:60]), ("validation", texts[60:])):
        rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(chosen)]
        (folder / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("\n\n".join(f"{a} {b} {c}" for a in WORDS[:5] for b in WORDS[5:] for c in WORDS[:2]))
    return file


@pytest.fixture(scope="module")
def body(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny BERT without a head."""
    folder = tmp_path_factory.mktemp("models") / "body"
    transformers.BertModel.from_pretrained(bert).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def names(report: dict[str, Any]) -> list[str]:
    return [row["name"] for row in report["rows"]]


def test_methods_on_a_task_with_files(bert: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ("analyze", bert, "--methods", "fusion,fusion:folded,calibrated-fusion,svd", "--width", 0.5)
    words = (*words, "--task", "sst2", "--data-dir", data, *QUICK)
    report = json.loads(good(*words, "--json", "--out", tmp_path / "out").stdout)
    assert names(report) == ["fusion", "fusion, folded", "calibrated-fusion", "svd"]
    assert report["rows"][2]["settings"]["refine"] == 2 and report["conditions"]["ntk"]["examples"] == 3
    assert report["conditions"]["tokens"][""] == 12 * 5  # the validation rows, [CLS] and [SEP] too
    for row in report["rows"]:
        assert 0 < row["output_error"]["mean"] < 2 and row["ntk"]["total"]["adam"]["relative"] > 0
    assert report["notes"] == []
    folder = tmp_path / "out"
    assert json.loads((folder / "analysis.json").read_text()) == report
    assert "| fusion, folded |" in (folder / "analysis.md").read_text()
    assert (folder / "analysis.png").read_bytes()[:4] == b"\x89PNG"
    table = good(*words, "--out", folder, "--no-errors").stdout  # its own output is replaced
    assert "NTK adam" in table and "FFN output" not in table
    assert "output_error" not in (folder / "analysis.json").read_text()


def test_methods_and_text(llama: Path, bert: Path, body: Path, notes: Path) -> None:  # noqa: F811
    report = json.loads(
        good("analyze", bert, "-m", "importance", "--width", 0.5, "--text", notes, "--no-ntk", "--json").stdout
    )
    assert names(report) == ["importance"] and "ntk" not in report["rows"][0]
    words = ("analyze", llama, "-m", "magnitude", "--width", 4, "--text", notes, "--tokenizer", bert, "--json")
    report = json.loads(good(*words, "--max-length", 8, *QUICK[:4]).stdout)
    assert report["rows"][0]["ntk"]["total"]["sgd"]["relative"] > 0  # of the tokens' log-probability
    report = json.loads(good("analyze", body, "-m", "magnitude", "--width", 0.5, "--text", notes, "--json").stdout)
    assert "no kernel: BertModel gives no logits" in report["notes"][0] and "ntk" not in report["rows"][0]


@pytest.mark.parametrize(("rows", "length", "found"), [(5, None, 5), (7, 8, 7), (999, None, 25)])
def test_rows_of_text_are_as_many_as_are_asked_for(
    bert: Path,  # noqa: F811
    notes: Path,
    rows: int,
    length: int | None,
    found: int,
) -> None:
    words = ("analyze", bert, "-m", "magnitude", "--width", 0.5, "--text", notes, "--no-ntk", "--json", "--rows", rows)
    report = json.loads(good(*words, *(("--max-length", length) if length else ())).stdout)
    assert report["data"]["rows"] == found and report["conditions"]["tokens"][""] == found * 5


@pytest.mark.parametrize("kind", ["column", "messages"])
def test_text_is_read_as_compress_reads_it(
    bert: Path,  # noqa: F811
    llama: Path,  # noqa: F811
    notes: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    texts = notes.read_text().split("\n\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.chat_template = "{% for each in messages %}{{ each.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chats")
    more: tuple[object, ...] = ("--tokenizer", tmp_path / "chats")
    if kind == "column":
        file, more = tmp_path / "notes.csv", (*more, "--text-column", "body")
        file.write_text("\n".join(["body", *texts]))
    else:
        file = tmp_path / "notes.jsonl"
        chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}] for text in texts]
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    words = ("--text", file, *more, "--json")
    report = json.loads(good("analyze", bert, *words, "-m", "magnitude", "--width", 0.5, "--no-ntk").stdout)
    assert report["data"]["rows"] == 25
    assert report["conditions"]["tokens"][""] == 25 * (5 + (kind == "messages"))
    assert json.loads(good("analyze", bert, *words, "--similarity").stdout)["name"] == str(bert)
    few = ("--batches", 2, "--fresh", 1, "--batch-size", 4, "--max-length", 8)
    assert json.loads(good("analyze", llama, *words, "--energy", *few).stdout)["name"] == str(llama)


def test_all_leaves_out_what_refuses_the_model_and_names_are_refused_before_anything_is_measured(
    llama: Path,  # noqa: F811
    bert: Path,  # noqa: F811
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ffnkit import methods
    from ffnkit.analysis import study

    monkeypatch.setattr(methods, "compressing", lambda: ["flap", "magnitude"])
    words = ("analyze", llama, "--width", 4, "--text", notes, "--tokenizer", bert, *QUICK[:4])
    report = json.loads(good(*words, "-m", "all", "--json").stdout)
    assert names(report) == ["magnitude"]
    assert report["notes"][0].startswith("flap is left out: flap of model.layers.0.mlp: it has no output bias")
    monkeypatch.setattr(study, "_Study", None)
    assert "flap on LlamaForCausalLM: flap of model.layers.0.mlp" in bad(*words, "-m", "magnitude,flap")


def test_a_drawn_head_is_said_and_is_the_same_each_time(body: Path, data: Path) -> None:
    words = ("analyze", body, "-m", "magnitude", "--width", 0.5, "--task", "sst2", "--data-dir", data, *QUICK[:4])
    first, again, other = (json.loads(good(*words, "--json", "--seed", seed).stdout) for seed in (0, 0, 1))
    assert "the head was drawn at random" in first["notes"][0]
    assert first["rows"] == again["rows"]
    one, two = (each["rows"][0]["ntk"]["total"]["sgd"]["absolute"] for each in (first, other))
    assert one != pytest.approx(two, rel=1e-3)


def test_a_compressed_checkpoint_is_compared_like_its_method(body: Path, data: Path, tmp_path: Path) -> None:
    settings = ("--set", "width=0.5", "--set", "restarts=1")
    fuse(body, tmp_path / "small")
    words = ("analyze", body, "--task", "sst2", "--data-dir", data, *QUICK[:4], "--json")
    report = json.loads(good(*words, "--against", tmp_path / "small", "-m", "fusion", *settings).stdout)
    assert sorted(names(report)) == ["fusion", "small"]
    small = next(row for row in report["rows"] if row["name"] == "small")
    assert small["method"] is None and small["ffn_share"] < 0.6
    assert 0 < small["ntk"]["total"]["adam"]["relative"] < 2  # the drawn heads are one: else this is far off


def test_heads_are_shared(body: Path, bert: Path) -> None:  # noqa: F811
    models, _ = Texts("sst2", None, None, 8, 100, 16, None, 0).open([str(body), str(bert)])
    assert newly_initialized(models[0]) and not newly_initialized(models[1])
    assert not torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    said = shared_heads({"body": models[0], "bert": models[1]})
    assert said == ("body has no head of its own and is compared with that of bert",)
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)


def test_what_is_measured_on_did_not_calibrate(bert: Path, data: Path, notes: Path) -> None:  # noqa: F811
    for texts in (Texts("sst2", data, None, 12, 10**6, 16, None, 0), Texts(None, None, notes, 999, 10**6, 16, None, 0)):
        models, tokenizer = texts.open([str(bert)])
        first, second = (
            {tuple(row.tolist()) for batch in part for row in batch["input_ids"]}
            for part in texts.batches(models[0], tokenizer)
        )
        assert first and second and not first & second
    assert halves(["one two three four"]) == (["one two three"], [" four"])
    with pytest.raises(FfnkitError, match="too little"):
        halves(["word"])


def test_settings_reach_the_methods_that_have_them() -> None:
    found = chosen_methods("fusion,svd,random", "0.25", "last:1", 3, ["restarts=2"])
    assert [each.settings["width"] for each in found.values()] == [0.25] * 3
    assert found["fusion"].settings["restarts"] == 2 and found["random"].settings["seed"] == 3
    assert "seed" not in found["svd"].settings and found["svd"].settings["layers"] == "last:1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "sst2"], "neither --methods nor --against"),
        (["-m", "fusion", "--width", 0.5], "neither --task nor --text"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst2", "--text", "x"], "both --task and --text"),
        (["-m", "fusion", "--task", "sst2"], "no width is given"),
        (["-m", "melting", "--width", 0.5, "--task", "sst2"], "no such method"),
        (["-m", "fusion", "--width", 0.5, "--set", "keep=3", "--task", "sst2"], "no such setting"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst3"], "there is no such task"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst2", "--text-column", "body"], "there is no --text to read it"),
        (["-m", "fusion", "--width", 0.5, "--text", "nowhere.txt"], "there is no such file"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst2", "--no-errors", "--no-ntk"], "nothing to do"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst2", "--ntk-layers", "7"], "layer 7 has no FFN"),
        (["-m", "fusion", "--width", 0.5, "--task", "sst2", "--examples", 13], "the data have 12"),
    ],
)
def test_bad_input_is_one_line(bert: Path, data: Path, words: list[object], expected: str) -> None:  # noqa: F811
    more = ["--data-dir", data] if "sst2" in words else []
    assert expected in bad("analyze", bert, *words, *more)
