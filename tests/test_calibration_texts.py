"""Calibration texts: shares, columns, dialogues, turns; settings decided on text of other kinds; what is expected."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from test_cli import bad, bert, good, verbosity

import ffnkit as fk
from ffnkit import methods
from ffnkit.calibration import drift, shipped
from ffnkit.calibration.drift import Drift
from ffnkit.errors import FfnkitError
from ffnkit.methods import deciding
from ffnkit.methods.deciding import decide
from ffnkit.methods.expecting import expected
from ffnkit.tune import CalibrationSettings, calibration_batches, deciding_batches
from ffnkit.tune.calibration_text import read_calibration, shares

_ = (bert, verbosity)  # fixtures
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shares(None) == [] == shares([])
    assert shares("a") == [("a", 1.0)] == shares(["a"]) == shares({"a": 1.0})
    assert shares(["a", "b"]) == [("a", 0.5), ("b", 0.5)]
    found = dict(shares(["a=0.7", "b", "c"]))
    assert found == pytest.approx({"a": 0.7, "b": 0.15, "c": 0.15})
    assert shares({"a": 0.25, "b": 0.75}) == [("a", 0.25), ("b", 0.75)]
    assert shares(["x=y"]) == [("x=y", 1.0)]  # no number, so a name
    Path("a=0.7").touch()
    assert shares(["a=0.7"]) == [("a=0.7", 1.0)]  # a file of that name
    for wrong in (["b=0.7", "c=0.4"], ["b=1", "c"], ["b=0.5"], ["b=0"], ["b=-1", "c"], ["b=nan", "c"], ["b", "b=0.5"]):
        with pytest.raises(FfnkitError, match="calibration text"):
            shares(wrong)


def test_tables_by_column_and_dialogues_by_the_template(bert: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    talk = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "fine book"}]
    rows = [{"messages": talk, "body": "bad day"}] * 2
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.csv").write_text("body\nbad day\npoor meal\n")
    assert read_calibration(str(tmp_path / "t.csv"), "body", tokenizer) == ["bad day", "poor meal"]
    assert read_calibration(str(tmp_path / "t.jsonl"), "body", tokenizer) == ["bad day"] * 2
    with pytest.raises(FfnkitError, match="no column 'text'"):
        read_calibration(str(tmp_path / "t.csv"), "text", tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    for column in ("text", "messages"):
        found = read_calibration(str(tmp_path / "t.jsonl"), column, tokenizer)
        assert found == ["<user>good film<assistant>fine book"] * 2


def test_several_texts_take_turns_by_their_shares(bert: Path, tmp_path: Path) -> None:
    model, tokenizer = fk.load(bert), transformers.AutoTokenizer.from_pretrained(bert)
    for word in ("good", "bad"):
        (tmp_path / word).with_suffix(".txt").write_text("\n\n".join([" ".join([word] * 8)] * 400))
    texts = {str(tmp_path / "good.txt"): 0.75, str(tmp_path / "bad.txt"): 0.25}
    settings = CalibrationSettings(tokens=2000, batch_size=5, mix=0.2, max_length=10, text=texts)
    batches = calibration_batches(model, tokenizer, settings)
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    good_, bad_ = ((ids == tokenizer.convert_tokens_to_ids(word)).sum().item() for word in ("good", "bad"))
    assert good_ == pytest.approx(2000 * 0.8 * 0.75 * 0.8, rel=0.05) and good_ == pytest.approx(3 * bad_, rel=0.05)
    half = torch.cat([batch["input_ids"].flatten() for batch in batches[: len(batches) // 2]])
    assert (half == tokenizer.convert_tokens_to_ids("bad")).sum() == pytest.approx(bad_ / 2, rel=0.2)  # they take turns
    few = calibration_batches(model, tokenizer, settings.model_copy(update={"tokens": 50, "batch_size": 64}))
    assert 45 <= sum(int(batch["attention_mask"].sum()) for batch in few) <= 70  # no more than is asked for, about


def test_decided_on_are_texts_that_nothing_is_fitted_to(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = fk.load(bert), transformers.AutoTokenizer.from_pretrained(bert)
    seen: list[set[str]] = []

    def noting(texts: Any, *given: Any) -> Any:
        from ffnkit.tune.distil_text import text_examples

        seen.append(set(texts))
        return text_examples(texts, *given)

    monkeypatch.setattr("ffnkit.tune.calibration.text_examples", noting)
    fit, held = deciding_batches(model, tokenizer, CalibrationSettings(tokens=300, max_length=24))
    assert fit and held and not seen[0] & seen[1] and seen[0] | seen[1] == set(shipped.texts())
    of = {piece: kind for kind, pieces in shipped.pieces().items() for piece in pieces}
    assert not {of[text] for text in seen[0]} & {of[text] for text in seen[1]}


def test_the_setting_that_loses_least_on_held_out_text_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].model()
    fit, held = ([FAMILIES["llama"].inputs(model, seed=seed) for seed in part] for part in (range(3), range(9, 12)))
    method = fk.CalibratedFusion(0.5, effort="fast", ridge=1e-6)  # fitted to few tokens: it loses elsewhere
    decision = decide(model, fit, held, method, {"ridge": (0.1, 100.0), "select": ("greedy",)})
    losses = [(trial["KL"], trial["given"]) for trial in decision.tried]
    assert len(losses) == 4 and decision.method == dataclasses.replace(method, **min(losses, key=lambda x: x[0])[1])
    assert decision.method.ridge > 1e-6
    judge = Drift(model, held)
    for trial in losses[:2]:  # what a trial tells is what the plan from the data themselves does
        plan = fk.plan(model, dataclasses.replace(method, **trial[1]), data=fit)
        assert deciding.moved(model, plan.edits, judge)["KL"] == pytest.approx(trial[0], rel=1e-6)
    monkeypatch.setattr(deciding, "GAIN", 1.0)  # the control: nothing gains as much
    assert decide(model, fit, held, method, {"ridge": (0.1,)}).method == method
    whole = fk.CalibratedFusion(0.5, sequential=True, refine=0)
    assert decide(model, fit, held, whole, {"ridge": (0.2,)}).tried
    wrong = [methods.build("unstructured", width=0.5), methods.build("importance", width=0.5), method]
    wrong += [fk.Merging(layers="all", correct="output"), fk.CalibratedMerging(layers="all")]
    for each in [*wrong, fk.RemoveHeads(remove=1, refit=True)]:
        with pytest.raises(FfnkitError, match=f"deciding settings of {each.name}"):
            decide(model, fit, held, each, {"steps": (1,)} if each is method else None)


@pytest.mark.parametrize("name", ["importance", "fusion", "clustering"])
def test_the_ridge_of_a_refit_is_decided(name: str) -> None:
    model = FAMILIES["bert"].model()
    fit, held = ([FAMILIES["bert"].inputs(model, seed=seed) for seed in part] for part in (range(3), range(9, 12)))
    decision = decide(model, fit, held, methods.build(name, width=0.5, refit=True))
    assert len({trial["given"]["ridge"] for trial in decision.tried}) == len(decision.tried) == 4
    assert len({round(next(v for k, v in trial.items() if k != "given"), 9) for trial in decision.tried}) > 1


@pytest.mark.parametrize("rows", [3, drift.ROWS])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_the_judge_tells_what_a_loop_tells(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ROWS", rows)
    model = FAMILIES[family].model()
    batch = FAMILIES[family].inputs(model, seed=3)
    if family == "llama":
        batch = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"].eq(0), -100)}
    judge = Drift(model, [batch])
    before = judge.measure()
    assert next(iter(before.values())) == 0.0
    with torch.no_grad():
        wanted = model(**batch)
        ffn = fk.plan(model, fk.Fusion(0.5, restarts=1))
        found = deciding.moved(model, ffn.edits, judge)
        other = fk.apply(FAMILIES[family].model(), ffn)(**batch)
    if family == "llama":
        assert before["perplexity"] == pytest.approx(float(wanted.loss.exp()), rel=1e-4)
        assert found["perplexity"] == pytest.approx(float(other.loss.exp()), rel=1e-4)
        old, new = (each.logits[batch["labels"] != -100].log_softmax(-1) for each in (wanted, other))
        assert found["KL"] == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-4)
    else:
        assert next(iter(found.values())) > 0


@pytest.mark.slow
def test_what_is_expected_grows_with_the_work(bert: Path) -> None:
    model = FAMILIES["llama"].model()
    data = [FAMILIES["llama"].inputs(model, seed=seed) for seed in range(4)]
    least, most = (expected(model, fk.CalibratedFusion(0.5, refine=steps), data) for steps in (1, 5000))
    assert least.work is not None and most.work is not None and most.work > 20 * least.work > 0
    assert least.bytes > 0 and least.passes > 0
    assert expected(model, fk.CalibratedFusion(0.5), fk.calibrate(model, data)).seconds > 0
    assert expected(model, fk.Merging(layers="all"), data).work is None
    assert expected(model, fk.Fusion(0.5), None).seconds == 0
    said = good("compress", bert, "--method", "calibrated-fusion", "--set", "width=0.5", "--dry-run", "--json")
    report = json.loads(said.stdout)
    assert "expected: about" in said.stderr and report["took"]["seconds"] > 0 and report["expected"]["memory"] > 1e8


@pytest.mark.slow
def test_command_line(bert: Path, tmp_path: Path) -> None:
    words = ("compress", bert, "--set", "width=0.5", "--set", "refine=2", "--tokens", 200, "--dry-run")
    method = ("--method", "calibrated-fusion")
    said = good(*words, *method, "--decide", "--draws", 2)
    assert re.search(r"decided .*ridge=", said.stderr) and "held-out text, 2 draws" in said.stdout
    report = json.loads(good(*words, *method, "--draws", 2, "--json").stdout)
    assert [row["seed"] for row in report["draws"]["after"]] == [0, 1]
    assert report["draws"]["after"][0] != report["draws"]["after"][1]
    (tmp_path / "a.txt").write_text("good film")
    assert "shares sum to 1.4" in bad(*words, "--text", f"{tmp_path}/a.txt=0.7", "--text", f"{tmp_path}/b.txt=0.7")
    assert "no such file" in bad(*words, "--text", f"{tmp_path}/b.txt")
    assert "no --text to read it from" in bad(*words, *method, "--text-column", "body")
    assert "uses no data" in bad(*words[:4], "--method", "magnitude", "--decide", "--dry-run")
