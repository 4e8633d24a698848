"""Translation: Multi30k in its forms, prompts by the kind of model, Marian's two tokenizers, decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES

from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.tasks.encoding.sequences import Sequences
from ffnkit.tasks.generation.translation import sentences
from ffnkit.tasks.images.batches import processor_of

EN = ["a man in a hat", "two dogs run", "a girl eats {cake}", "children play outside", "a red bus", "the sun shines"]
DE = ["ein Mann mit Hut", "zwei Hunde rennen", "ein Kind isst {Kuchen}", "Kinder spielen", "ein roter Bus", "Sonne"]


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"en": f"{EN[n % 6]} {n + first}", "de": f"{DE[n % 6]} {n + first}"} for n in range(count)]


def multi30k(folder: Path, nested: bool = True) -> Path:
    """Made-up rows in the form of the data set."""
    for split, count, first in (("train", 30, 0), ("validation", 6, 100), ("test", 6, 200)):
        rows = [{"translation": pair} if nested else pair for pair in pairs(count, first)]
        file = folder / "multi30k" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("nested", [True, False])
def test_rows_in_both_directions(nested: bool, tmp_path: Path) -> None:
    folder = multi30k(tmp_path, nested)
    there, back = (tasks.get(name).splits(folder) for name in ("multi30k", "multi30k-de-en"))
    assert there.report[0]["prompt"] == "a man in a hat 100"
    assert there.report[0]["references"] == ["ein Mann mit Hut 100"]
    assert back.report[0]["prompt"] == "ein Mann mit Hut 100"
    assert len(there.report) == len(there.extra["test"]) == 6 and len(there.train) + len(there.dev) == 30
    assert tasks.get("multi30k").metrics == ("bleu", "chrf", "perplexity")


def test_rows_without_a_text_are_refused(tmp_path: Path) -> None:
    for table, part in (
        ({"translation": [{"en": "a", "de": "b"}, {"en": "a"}]}, "1 of 2 rows have no text in 'de', row 2 first"),
        ({"translation": ["text"]}, "no text in 'en'"),
        ({"en": ["a"], "fr": ["b"]}, "no column 'de'"),
    ):
        with pytest.raises(FfnkitError, match=part):
            sentences(table, "en", "de", "rows")
    (tmp_path / "multi30k").mkdir()
    with pytest.raises(FfnkitError, match="has no train.jsonl"):
        tasks.get("multi30k").splits(tmp_path)


def test_a_prompt_is_put_to_each_kind_of_model() -> None:
    task: Any = tasks.get("multi30k")
    said = {name: task.framed(["a {dog}"], FAMILIES[name].model())[0] for name in ("t5", "marian", "gpt2")}
    assert said == {
        "t5": "translate English to German: a {dog}",
        "marian": "a {dog}",
        "gpt2": "English: a {dog} German:",
    }
    back: Any = tasks.get("multi30k-de-en")
    assert back.framed(["ein Hund"], FAMILIES["t5"].model()) == ["translate German to English: ein Hund"]
    assert tasks.get("e2e").framed(["name: x ||"], FAMILIES["gpt2"].model()) == ["name: x ||"]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian whose two languages have pieces of their own in one vocabulary."""
    import sentencepiece as spm

    folder = tmp_path_factory.mktemp("marian")
    known = ["</s>", "<unk>"]
    for side, texts in (("source", EN), ("target", DE)):
        text = folder / f"{side}.txt"
        text.write_text("\n".join(f"{each} {n}" for each in texts for n in range(30)))
        options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 1.0}
        spm.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / side), **options)
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = spm.SentencePieceProcessor(str(folder / f"{side}.spm"))
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        known += [piece for piece in pieces if piece not in known and not piece.startswith("<")]
    known.append("<pad>")
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(known)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    pad = len(known) - 1
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    config = transformers.MarianConfig(
        vocab_size=len(known),
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.MarianMTModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marian_reads_one_language_and_writes_the_other(marian: Path, tmp_path: Path) -> None:
    task: Any = tasks.get("multi30k")
    splits = task.splits(multi30k(tmp_path))
    tokenizer = task.load_tokenizer(marian)
    model = task.load_model(marian, tokenizer=tokenizer)
    row = task.encode(splits.report, tokenizer, 48, model=model)[0]
    source, target = "a man in a hat 100", "ein Mann mit Hut 100"
    assert row["input_ids"] == tokenizer(source)["input_ids"]
    assert row["labels"] == tokenizer(text_target=target)["input_ids"]
    assert row["labels"] != tokenizer(target)["input_ids"]  # cut by the other language's pieces
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == target
    # The decoder starts at the padding token, in training as in decoding.
    shifted = model.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]]))
    assert shifted[0, 0] == model.generation_config.decoder_start_token_id == tokenizer.pad_token_id


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marian_learns_a_few_sentences_by_heart(marian: Path, tmp_path: Path) -> None:
    """What is decoded greedily and with beams is what was trained: target side, start and end fit together."""
    task: Any = tasks.get("multi30k")
    splits = task.splits(multi30k(tmp_path), train_limit=3)
    tokenizer = task.load_tokenizer(marian)
    tune.seed_everything(0)
    model = task.load_model(marian, tokenizer=tokenizer)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    before = tune.evaluate(model, tokenizer, task, splits.train, max_length=48)
    settings = tune.TrainSettings(
        learning_rate=1e-2, steps=100, batch_size=3, max_length=48, eval_every=50, schedule="constant"
    )
    result = tune.train(model, tokenizer, task, splits, settings, out_dir=tmp_path / "run", progress=False)
    for beams in (1, 3):
        generation = tasks.GenerationSettings(num_beams=beams, max_new_tokens=40)
        found = tune.evaluate(result.model, tokenizer, task, splits.train, max_length=48, generation=generation)
        assert found["bleu"] > 90 and found["chrf"] > 90, beams
    assert before["bleu"] < 10


def test_own_columns_with_a_template(tmp_path: Path) -> None:
    folder = multi30k(tmp_path) / "multi30k"
    more = {"inputs": ("translation.de",), "target": "translation.en", "metric": "bleu,chrf"}
    plain = tasks.choose(train=folder / "train.jsonl", template="{translation.de}", **more)
    assert plain.splits().train[0]["prompt"].startswith(tuple(DE))
    prefix = "translate German to English: {translation.de}"
    with_prefix = tasks.choose(train=folder / "train.jsonl", template=prefix, **more)
    assert with_prefix.splits().train[0]["prompt"].startswith("translate German to English: ")
    assert plain.metrics == ("bleu", "chrf", "perplexity")


# ---- the schedule of the translation papers


def test_the_inverse_square_root_schedule(tmp_path: Path) -> None:
    """lr = peak * step / warmup, then peak * sqrt(timescale / (step - warmup + timescale)); by default they are equal.

    Source: Vaswani et al., Attention Is All You Need, NIPS 2017, equation 3.
    """
    task = tasks.get("digits")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=8, num_labels=10)
    splits = task.splits(train_limit=64, dev_limit=10)
    for timescale in (None, 16):
        options = {} if timescale is None else {"timescale": timescale}
        settings = tune.TrainSettings(
            learning_rate=1e-3, schedule="inverse_sqrt", schedule_options=options, warmup=4, steps=8, batch_size=8,
            logging_every=1, keep_best=False,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
        out = tmp_path / str(timescale)
        result = tune.train(model, processor_of(config), task, splits, settings, out_dir=out, progress=False)
        rates = [entry["learning_rate"] for entry in result.losses]
        scale, said = timescale or 4, range(8)
        # The log names the rate of the step that was made: the first runs at rate 0.
        assert rates == pytest.approx([1e-3 * (n / 4 if n < 4 else (scale / (n - 4 + scale)) ** 0.5) for n in said])


def test_targets_end_once() -> None:
    """A tokenizer that ends a target itself gets no second end."""
    tokenizer = FakeTokenizer()
    model = FAMILIES["t5"].model()
    assert Sequences(tokenizer, model, 16, 8).targets(["ab"]) == [[4, 5, 3]]


class FakeTokenizer:
    """Letters as tokens; an end after a target."""

    eos_token_id, bos_token_id, pad_token_id, model_max_length = 3, None, 0, 100

    def __call__(self, text: Any = None, text_target: Any = None, **_: Any) -> dict[str, Any]:
        texts = text_target if text_target is not None else text
        rows = [[ord(c) - 93 for c in each] for each in ([texts] if isinstance(texts, str) else texts)]
        rows = [[*row, 3] for row in rows] if text_target is not None else rows
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}
