"""benchmarks/train_small.py: models from scratch, their readers, and that what it saves opens by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_translation import multi30k

from ffnkit import tasks
from ffnkit.model.finding import ffns

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "train_small.py"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("train_small", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_small"] = module
    spec.loader.exec_module(module)
    return module


def trained(monkeypatch: pytest.MonkeyPatch, *given: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_small.py", *map(str, given)])
    loaded().main()


SMALL = ("--layers", 2, "--d", 16, "--heads", 2, "--ff", 24, "--steps", 2, "--batch-size", 4, "--eval-every", 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_a_translator_with_a_tokenizer_of_its_training_texts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "out", multi30k(tmp_path)
    more = ("--vocabulary", 300, "--dev", 5, "--data-dir", data, "--out", out)
    trained(monkeypatch, "multi30k", "--model", kind, *SMALL, *more)
    task: Any = tasks.get("multi30k")
    tokenizer = task.load_tokenizer(out)
    model = task.load_model(out, tokenizer=tokenizer)
    found = ffns(model)
    assert model.config.model_type == kind and len(found) == 4 and {ffn.width for ffn in found} == {24}
    text = "ein Mädchen, ein Hut! 7"  # letters that no training text has, too
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text and ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer) <= 300 and max(ids) < model.get_input_embeddings().weight.shape[0]
    report = json.loads((out / "training.json").read_text())
    assert {"bleu", "chrf", "perplexity"} <= set(report["metrics"]) and report["model"] == kind


def test_the_spread_of_the_first_weights_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded()
    monkeypatch.setattr(sys, "argv", ["train_small.py"])
    preset, task = module.preset_of("digits", "images", module.arguments()), tasks.get("digits")
    for init in (0.2, None):
        model, _ = module.image_model(preset, task, "vit", 0.0, init)
        weight = ffns(model)[0].raw().up.std().item()
        assert weight == pytest.approx(init or 0.02, rel=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("sst2",), ["task sst2", "images, of plain text or of translation"]),
        (("digits", "--model", "marian"), ["--model marian", "vit, deit"]),
        (("multi30k", "--model", "vit"), ["--model vit", "marian, t5"]),
        (("wikitext2",), ["a decoder needs a tokenizer"]),
    ],
)
def test_what_it_does_not_train_is_said(
    given: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as error:
        trained(monkeypatch, *given)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line
