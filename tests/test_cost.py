"""What a compression cost: figures against slow loops, on text that no fit has seen."""

from __future__ import annotations

import copy
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from test_cli import bad, bert, good
from test_healing import small
from torch.nn import functional as F

import ffnkit as fk
from ffnkit import tasks
from ffnkit.calibration import shipped
from ffnkit.calibration.parts import parts_of, texts_of
from ffnkit.cli import after
from ffnkit.errors import FfnkitError
from ffnkit.report.cost import Cost
from ffnkit.report.costing import NEW, Before, repetition
from ffnkit.tasks.models import load_tokenizer, other_labels
from ffnkit.tune import CalibrationSettings, calibration_batches
from ffnkit.tune.apart import is_masked, kept_apart

__all__ = ["bert", "small"]  # fixtures


def pair(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    family = FAMILIES[name]
    original: Any = family.model()
    model = copy.deepcopy(original)
    fk.apply(model, fk.plan(model, fk.Fusion(0.5, restarts=1)))
    batches = [family.inputs(original, seed=seed) for seed in range(3)]
    if family.kind in ("text", "seq2seq"):
        for batch in batches:
            batch["labels"] = batch["decoder_input_ids" if family.kind == "seq2seq" else "input_ids"].clone()
    return original, model, batches


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_against_a_loop(dtype: torch.dtype) -> None:
    original, model, batches = pair("llama")
    original, model = original.to(dtype), model.to(dtype)
    found = fk.cost(original, model, batches)
    kl = same = loss = 0.0
    count = 0
    for batch in batches:
        first, second = original(**batch).logits.float(), model(**batch).logits.float()
        for row in range(len(first)):
            for at in range(first.shape[1] - 1):
                if not (batch["attention_mask"][row, at] and batch["attention_mask"][row, at + 1]):
                    continue
                p, q = F.log_softmax(first[row, at], -1), F.log_softmax(second[row, at], -1)
                kl += float((p.exp() * (p - q)).sum())
                same += int(p.argmax() == q.argmax())
                loss -= float(q[batch["input_ids"][row, at + 1]])
                count += 1
    figures = found.stages["compressed"].places["data"]
    assert found.rows["data"] == count
    assert figures["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert figures["agreement"] == same / count
    assert figures["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert set(found.stages["uncompressed"].places["data"]) == {"perplexity"}


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "mixtral", "vit", "bert"])
def test_kinds_of_models(name: str) -> None:
    original, model, batches = pair(name)
    figures = fk.cost(original, model, batches).stages["compressed"].places["data"]
    assert figures["kl"] > 0 and 0 <= figures["agreement"] <= 1
    again = fk.cost(original, original, batches).stages["compressed"].places["data"]
    assert again["kl"] == pytest.approx(0, abs=1e-6) and again["agreement"] == 1
    assert ("perplexity" in figures) == (name in ("t5", "bart", "gpt2", "mixtral"))


@torch.no_grad()
def test_an_encoder_without_a_head() -> None:
    family = FAMILIES["bert"]
    torch.manual_seed(0)
    original = transformers.BertModel(family.config()).eval()
    model = copy.deepcopy(original)
    fk.apply(model, fk.plan(model, fk.Fusion(0.5, restarts=1)))
    batch = {k: v for k, v in family.inputs(original).items() if k != "labels"}
    kept = batch["attention_mask"].bool()
    first, second = original(**batch).last_hidden_state[kept], model(**batch).last_hidden_state[kept]
    wanted = (first - second).square().sum() / (first - first.mean(0)).square().sum()
    figures = fk.cost(original, model, [batch]).stages["compressed"].places["data"]
    assert figures == {"error": pytest.approx(float(wanted), rel=1e-4)}


def test_no_second_model_is_needed() -> None:
    """What was said before is kept, so that the very model can be changed in place, several times."""
    original, model, batches = pair("llama")
    twice = fk.cost(original, model, batches).to_dict()["stages"]["compressed"]
    before = Before(original, {"data": batches})
    fk.apply(original, fk.plan(original, fk.Fusion(0.5, restarts=1)))
    assert before.compare(original).to_dict()["stages"]["compressed"] == twice
    again = Cost.from_dict(json.loads(json.dumps(before.compare(original, "healed").to_dict())))
    assert list(again.stages) == ["uncompressed", "compressed", "healed"]
    assert again.table() == before.cost.table() and again.markdown().count("\n") == len(again.table()[1]) + 1


def test_repetition_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FAMILIES["llama"].model()
    written = [[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]  # 5 4-grams each, one of the first row twice
    monkeypatch.setattr(original, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor(written)], 1))
    assert repetition(original, torch.ones(2, 3, dtype=torch.long)) == pytest.approx(0.1)


def test_a_masked_model_is_asked_for_what_is_masked(small: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(small[0])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    config = FAMILIES["bert"].config()
    config.vocab_size = len(tokenizer)
    original: Any = transformers.BertForMaskedLM(config).eval()
    assert is_masked(original) and not is_masked(FAMILIES["llama"].model())
    batch = kept_apart(original, tokenizer, CalibrationSettings(), "report", 400)["out"][0]
    asked = batch["labels"] != -100
    assert 0 < asked.float().mean() < 0.2 and (batch["input_ids"][asked] == tokenizer.mask_token_id).all()
    found = fk.cost(original, copy.deepcopy(original), [batch])
    figures = found.stages["compressed"].places["data"]
    assert figures["perplexity"] > 1 and figures["agreement"] == 1 and found.rows["data"] == int(asked.sum())


def test_a_masked_model_whose_tokenizer_has_no_mask(small: tuple[Path, Path]) -> None:
    """It has no perplexity, and its answers are compared on whole text."""
    tokenizer, model = load_tokenizer(small[0]), FAMILIES["bert"].model()
    config = FAMILIES["bert"].config()
    config.vocab_size = len(tokenizer)
    model = transformers.BertForMaskedLM(config).eval()
    batch = kept_apart(model, tokenizer, CalibrationSettings(), "report", 400)["out"][0]
    assert "labels" not in batch
    figures = fk.cost(model, copy.deepcopy(model), [batch]).stages["compressed"].places["data"]
    assert figures["agreement"] == 1 and "perplexity" not in figures


def test_an_encoder_decoder_that_fills_masks_too_is_asked_for_text(small: tuple[Path, Path]) -> None:
    """BART's class is listed for masked words; its decoder would get padding where no word is masked."""
    tokenizer = load_tokenizer(small[0])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = FAMILIES["bart"].config()
    config.vocab_size = len(tokenizer)
    model: Any = transformers.BartForConditionalGeneration(config).eval()
    assert not is_masked(model)
    batch = kept_apart(model, tokenizer, CalibrationSettings(), "report", 400)["out"][0]
    assert (batch["labels"] != -100).float().mean() > 0.9
    assert not (batch["input_ids"] == tokenizer.mask_token_id).any()


def test_rows_of_a_task_are_of_all_classes_where_its_file_is_sorted() -> None:
    labels = [0] * 500 + [1] * 500
    taken = after._drawn(1000, 256)
    assert len(set(taken)) == 256 and taken == sorted(taken) and taken == after._drawn(1000, 256)
    assert 96 < sum(labels[row] for row in taken) < 160
    assert after._drawn(3, 256) == [0, 1, 2]


def test_continuations_are_greedy_whatever_the_checkpoint_says() -> None:
    model = FAMILIES["llama"].model()
    prompts = torch.randint(5, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    ids = prompts
    with torch.no_grad():
        while ids.shape[1] < min(model.config.max_position_embeddings, 6 + NEW):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    grams = [[tuple(row[at : at + 4]) for at in range(len(row) - 3)] for row in ids[:, 6:].tolist()]
    wanted = 1 - sum(len(set(row)) for row in grams) / sum(map(len, grams))
    assert wanted > 0
    for name, value in {
        "repetition_penalty": 2.0,
        "no_repeat_ngram_size": 3,
        "num_beams": 3,
        "do_sample": True,
    }.items():
        model.generation_config = transformers.GenerationConfig(**{name: value})
        own = model.generation_config
        assert repetition(model, prompts) == pytest.approx(wanted)
        assert model.generation_config is own


def test_a_number_a_token_is_no_class() -> None:
    """The discriminator of ELECTRA: its figures hang on no padding."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ElectraConfig(vocab_size=99, intermediate_size=40, **sizes)
    original = transformers.ElectraForPreTraining(config).eval()
    model = copy.deepcopy(original)
    fk.apply(model, fk.plan(model, fk.Fusion(0.5, restarts=1)))
    ids, mask = torch.randint(3, 99, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[2:, 8:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    rows = ((ids[:2], mask[:2]), (ids[2:, :8], mask[2:, :8]))
    one, two = (
        fk.cost(original, model, data).to_dict()["stages"]["compressed"]
        for data in (padded, [{"input_ids": i, "attention_mask": m} for i, m in rows])
    )
    assert "agreement" not in json.dumps(one) and "kl" not in json.dumps(one)
    for place, figures in one.items():
        for name, value in (figures or {}).items() if isinstance(figures, dict) else ():
            assert value == pytest.approx(two[place][name], rel=1e-4)


def test_a_decoder_without_anything_to_read_is_told() -> None:
    original, model, batches = pair("t5")
    bare = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    for go in (fk.cost, fk.heal):
        with pytest.raises(FfnkitError, match="no labels and no decoder_input_ids"):
            go(original, model, bare)
    with pytest.raises(FfnkitError, match="no labels and no decoder_input_ids"):
        fk.calibrate(original, bare)
    fk.calibrate(FAMILIES["bart"].model(), bare)  # makes its own


# --- kept apart ------------------------------------------------------------------------------------------------------


def long_texts(count: int, words: int) -> list[str]:
    return [" ".join(f"w{text}-{number}" for number in range(words)) for text in range(count)]


@pytest.mark.parametrize(("count", "words"), [(1, 9000), (7, 900), (400, 20)])
def test_every_word_is_in_one_part(count: int, words: int) -> None:
    texts = long_texts(count, words)
    found = {part: set(" ".join(texts_of(texts, part)).split()) for part in ("fit", "decide", "report")}
    whole = set(" ".join(texts).split())
    assert found["fit"] | found["decide"] | found["report"] == whole
    assert sum(map(len, found.values())) == len(whole)  # none in two
    assert 0.7 < len(found["fit"]) / len(whole) < 0.9
    assert all(len(found[part]) > 0.04 * len(whole) for part in ("decide", "report"))


def test_short_and_repeated_texts() -> None:
    assert texts_of(["a few words"], "fit") == ["a few words"] and not texts_of(["a few words"], "report")
    same = ["one and the same line of words"] * 400
    assert texts_of(same, "fit") and not texts_of(same, "report") and not texts_of(same, "decide")


def shared(texts: list[str], fitted: list[str]) -> float:
    """The share of runs of 100 characters of some texts that stand in the fitted ones."""
    whole = "\0".join(fitted)
    runs = [text[at : at + 100] for text in texts for at in range(0, len(text) - 99, 50)]
    return sum(run in whole for run in runs) / max(len(runs), 1)


def paragraphs(count: int) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    words = [f"word{number}" for number in range(200)]
    sizes = [100 + int(n) for n in torch.randint(900, (count,), generator=draw)]
    return [" ".join(words[int(n)] for n in torch.randint(200, (size,), generator=draw)) for size in sizes]


@pytest.mark.parametrize(
    "case", ["twice in one file", "in a second file", "within another text", "cut otherwise", "wrapped"]
)
def test_what_is_fitted_is_in_no_other_part_wherever_it_stands_again(case: str) -> None:
    texts = paragraphs(60)
    files = {
        "twice in one file": [texts + texts],
        "in a second file": [texts[:40], texts[40:] + texts[:40]],
        "within another text": [texts, [f"{texts[n - 1]} and {texts[n]}" for n in range(59, 0, -2)]],
        "cut otherwise": [texts, ["x" * 700 + " " + " ".join(texts)]],
        "wrapped": [texts, [textwrap.fill(text, 50) for text in reversed(texts)]],
    }[case]
    fit = [text for file in parts_of(files, "fit") for text in file]
    for part in ("decide", "report"):
        found = [" ".join(text.split()) for file in parts_of(files, part) for text in file]
        assert found and shared(found, fit) < 0.1
        alone = [
            " ".join(text.split()) for file in files for text in texts_of(file, part)
        ]  # the control: each file by itself
        assert case == "twice in one file" or shared(alone, fit) > 0.3


def test_answers_that_come_again_are_all_fitted() -> None:
    answers = ["yes", "no"] * 900
    assert texts_of(answers, "fit").count("yes") > 600


def test_a_file_that_others_hold_is_told(tmp_path: Path, bert: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(paragraphs(20)))
    words = ("compress", bert, "--set", "width=0.5", "--out", tmp_path / "o")
    told = bad(*words, "--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt")
    assert "b.txt" in told and "stand in the files before it" in told
    assert "given twice" in bad(*words, "--text", tmp_path / "a.txt", "--text", f"{tmp_path}/./a.txt")
    assert not (tmp_path / "o").exists()


def test_kinds_that_no_fit_sees() -> None:
    fit, decide, report = (set(shipped.texts(shipped.kinds(part))) for part in ("fit", "decide", "report"))
    assert fit and decide and report and not fit & decide and not fit & report and not decide & report
    assert fit | decide | report == {text for each in shipped.pieces().values() for text in each}


def test_no_fit_sees_what_is_reported(small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """32 tokens in a row that are reported on are in no batch of calibration or healing."""
    from ffnkit.tune.healing.data import healing_data
    from ffnkit.tune.healing.settings import HealSettings

    folder, text = small
    model, tokenizer = fk.load(folder), load_tokenizer(folder)
    settings = CalibrationSettings(text=str(text), tokens=10**6, mix=0.5)

    def runs(batches: Any) -> set[tuple[int, ...]]:
        rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
        found = {tuple(row[at : at + 32]) for row in rows for at in range(len(row) - 31)}
        return {run for run in found if 0 not in run}  # 0: padding

    def overlap() -> float:
        apart = kept_apart(model, tokenizer, settings, "report", 10**6)
        reported = [batch for batches in apart.values() for batch in batches]
        fitted = runs(calibration_batches(model, tokenizer, settings))
        learned, held = healing_data(model, tokenizer, HealSettings(tokens=10**6), settings)
        fitted |= runs(batch for batches, _ in learned for batch in batches)
        fitted |= runs(batch for batches in held.values() for batch in batches)
        wanted = runs(reported)
        return len(wanted & fitted) / len(wanted)

    assert overlap() == 0
    monkeypatch.setattr("ffnkit.tune.calibration.parts_of", lambda files, part: [list(texts) for texts in files])
    assert overlap() > 0.1


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_line(bert: Path, small: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = small
    words = ("--method", "fusion", "--set", "width=0.5", "--cost-tokens", 200)
    shown = good("compress", folder, *words, "--out", tmp_path / "a")
    assert "text of other kinds" in shown.stdout and "repeated 4-grams" in shown.stdout
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(shipped.pieces()["code"]))
    report = json.loads(
        good("compress", folder, *words, "--cost-text", other, "--out", tmp_path / "b", "--json").stdout
    )
    assert report["cost"]["on"]["out"] == "other.txt" and "healing" not in report
    assert "What the compression cost" in (tmp_path / "b" / "README.md").read_text()
    without = json.loads(good("compress", folder, *words[:-1], 0, "--out", tmp_path / "c", "--json").stdout)
    assert "cost" not in without and "What the compression cost" not in (tmp_path / "c" / "README.md").read_text()
    tuned = fk.load(tmp_path / "b")
    assert tuned.config.num_hidden_layers == 2
    assert "same greedy answer" in good("compress", bert, *words, "--out", tmp_path / "d").stdout
    assert "0" in bad("compress", folder, *words[:-1], -1, "--out", tmp_path / "e")
    wrong = tmp_path / "latin.txt"
    wrong.write_bytes("caf\xe9".encode("latin-1"))
    assert "not UTF-8" in bad("compress", folder, *words, "--cost-text", wrong, "--out", tmp_path / "f")
    fitted = ("--text", text, "--cost-text", f"{text.parent}/./{text.name}", "--out", tmp_path / "f")
    told = bad("compress", folder, "--set", "width=0.5", "--cost-tokens", 200, *fitted)
    assert "--text names it too" in told and not (tmp_path / "f").exists()


def test_a_copy_of_what_is_fitted_is_not_reported_on(small: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = small
    text, copied = tmp_path / "own.txt", tmp_path / "copied.txt"
    text.write_text("\n\n".join(paragraphs(30)))
    copied.write_text(textwrap.fill(texts_of([text.read_text()], "fit")[0][:8000], 50))
    words = ("--set", "width=0.5", "--calibration-tokens", 300, "--cost-tokens", 200, "--text", text)
    ran = good("compress", folder, *words, "--cost-text", copied, "--out", tmp_path / "g")
    assert "what it costs is not measured" in ran.stderr and "all of it is fitted to" in ran.stderr


def test_a_head_of_other_labels_is_not_judged(minilm_path: Path, data_dir: Path, tmp_path: Path) -> None:
    """Where the head is another task's, its metrics on this one say nothing, or are an error of an index."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = load_tokenizer(minilm_path)
    made = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    for part in (made, tokenizer):
        part.save_pretrained(tmp_path / "two")
    words = ("--set", "width=0.5", "--tokens", 64, "--cost-tokens", 64, "--data-dir", data_dir, "--json")
    for task, judged in (("mnli", False), ("sst2", True)):
        shown = good("compress", tmp_path / "two", "--task", task, *words, "--out", tmp_path / task)
        figures = json.loads(shown.stdout)["cost"]["stages"]["compressed"]
        assert ("metrics" in figures) is judged
        assert ("has 2 labels, and mnli has 3" in shown.stderr) is not judged
    words = ("--method", "merging", "--set", "window=2", "--set", "score=accuracy", "--data-dir", data_dir)
    why = bad("compress", tmp_path / "two", "--task", "mnli", *words, "--out", tmp_path / "merged")
    assert "score accuracy of mnli" in why and "has 2 labels, and mnli has 3" in why
    assert other_labels(tasks.get("e2e"), transformers.BertConfig()) is None
    config = transformers.BertConfig(id2label={0: "positive", 1: "negative"})
    assert "orders the labels positive, negative" in (other_labels(tasks.get("sst2"), config) or "")
    assert other_labels(tasks.get("sst2"), transformers.BertConfig(id2label={0: "negative", 1: "positive"})) is None
