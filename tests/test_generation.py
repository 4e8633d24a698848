"""Tasks of models that write: perplexity, generation, label words; from encoding to the command line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_tune import assert_same, killed_at
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tolerance import assert_close, assert_differs
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.recipe.schema import recipe_from
from ffnkit.tasks import GenerationSettings, GenerationTask, LanguageTask, WordsTask
from ffnkit.tasks.choosing import Choice
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.encoding.sequences import Sequences, affixes
from ffnkit.tasks.generation import sets as nlg
from ffnkit.tasks.generation.decoding import decode
from ffnkit.tasks.language_modelling import sets as language
from ffnkit.tasks.language_modelling.task import windows
from ffnkit.tasks.rows.splitting import Source, Splits
from ffnkit.tasks.running import row_losses

NAMES = ["Aromi", "Fitzbillies", "Wildwood", "Clowns", "Strada"]
FOODS = ["Chinese", "Italian", "French", "Indian"]
AREAS = ["riverside", "centre"]


def text_of(name: str, food: str, area: str) -> str:
    return f"{name} serves {food} food at the {area}."


def other_of(name: str, food: str, area: str) -> str:
    return f"At the {area}, {name} has {food} food."


TEXTS = [text_of(name, food, area) for name in NAMES for food in FOODS for area in AREAS]
SEEN = [*TEXTS, *(other_of(name, FOODS[0], AREAS[0]) for name in NAMES), "name: | food: | area: ||"]


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    """The command line quietens the libraries; later tests may want to hear them."""
    before, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    transformers.logging.set_verbosity(before)
    if bars:
        transformers.logging.enable_progress_bar()


# Tokenizers and models ------------------------------------------------------------------------------------------------


def byte_level(**special: str) -> Any:
    """As GPT-2's: pieces of bytes, nothing around a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(SEEN, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "<|end|>", **special}, model_max_length=512)


def surrounded(before: list[str], after: list[str]) -> Any:
    """As LLaMA's (<s> before a text) or T5's (</s> after it)."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator(SEEN, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    inner.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(each, inner.token_to_id(each)) for each in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 128,
    },
    "t5": {
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
    "bart": {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 128,
        "decoder_start_token_id": 2, "forced_eos_token_id": None, "tie_word_embeddings": False,
    },
    "switch": {
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2, "expert_capacity": 999,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    },
}  # fmt: skip
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "switch": "SwitchTransformersForConditionalGeneration",
}
KINDS = list(SIZES)
DECODERS = ["gpt2", "llama"]


def tokenizer_of(kind: str) -> Any:
    made = {"gpt2": byte_level, "llama": lambda: surrounded(["<s>"], []), "bart": lambda: surrounded(["<s>"], ["</s>"])}
    tokenizer = made.get(kind, lambda: surrounded([], ["</s>"]))()
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_of(kind: str, tokenizer: Any, **more: Any) -> Any:
    """A model with random weights that are large enough for its answers to differ."""
    tune.seed_everything(3)
    cls = getattr(transformers, CLASSES[kind])
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = cls.config_class(vocab_size=len(tokenizer), bos_token_id=1, **special, **{**SIZES[kind], **more})
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_({"gpt2": 3, "llama": 3, "bart": 4}.get(kind, 1))
    return model


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Any, Any]]:
    """Tokenizer and model by kind; tests do not change them."""
    tokenizers = {kind: tokenizer_of(kind) for kind in KINDS}
    return {kind: (tokenizers[kind], model_of(kind, tokenizers[kind])) for kind in KINDS}


# Data -----------------------------------------------------------------------------------------------------------------


def meanings(typed: bool = False) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {"prompt": [], "references": [], "segments": []}
    for name in NAMES:
        for food in FOODS:
            for area in AREAS:
                parts = [(f"name: {name}", ""), (f"| food: {food}", ""), (f"| area: {area} ||", "")]
                if typed:
                    parts = [("<bos>", "<bos>"), (f"<name> {name}", "<name>"), (f"<food> {food}", "<food>")]
                    parts += [(f"<area> {area}", "<area>"), ("<target>", "<target>")]
                rows["prompt"].append(" ".join(text for text, _ in parts))
                rows["references"].append([text_of(name, food, area), other_of(name, food, area)])
                rows["segments"].append(parts)
    return rows


def generation(typed: bool = False, **more: Any) -> GenerationTask:
    special = {
        "special_tokens": ("<bos>", "<name>", "<food>", "<area>", "<target>", "<eos>"),
        "eos": "<eos>",
        "target_type": "<target>",
    }
    source = Source(meanings(typed), None, "here")
    given: dict[str, Any] = {"metrics": ("bleu", "rougeL"), "max_new_tokens": 24, **(special if typed else {}), **more}
    return GenerationTask(nlg.TextData("meals", load=lambda _: source, **given))


def texts_task(count: int = 60, **more: Any) -> LanguageTask:
    draw = np.random.default_rng(0)
    texts = [" ".join(TEXTS[i] for i in draw.integers(0, len(TEXTS), 3)) for _ in range(count)]
    source = language.source_of({"train": texts}, "here")
    return LanguageTask(language.LanguageData("meals-text", load=lambda _: source), **more)


def food_task(**more: Any) -> Task:
    """Is the food Chinese?"""
    rows = {"text": TEXTS, "label": [int("Chinese" in text) for text in TEXTS]}
    source = Source(rows, None, "here")
    given: dict[str, Any] = {"label_names": ("no", "yes"), "metrics": ("accuracy", "f1"), **more}
    kind = given.pop("kind", "classification")
    return Task(
        "food", kind, ("text",), "label", given.pop("metrics"), "accuracy", "here", load=lambda _: source, **given
    )


# Language modelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "length", "stride"), [(23, 8, 3), (8, 8, 4), (5, 8, 4), (24, 8, 7), (9, 8, 1)])
def test_windows_score_every_token_once(size: int, length: int, stride: int) -> None:
    ids = list(range(size))
    pieces = list(windows(ids, length, stride))
    assert [token for _, scored in pieces for token in scored] == ids
    assert pieces[0] == ([], ids[:length])
    for context, scored in pieces[1:]:
        assert len(context) >= length - stride and len(context) + len(scored) == min(length, size)
        assert context + scored == ids[scored[0] - len(context) : scored[-1] + 1]


def slow_perplexity(model: Any, ids: list[int], length: int, stride: int) -> float:
    """Each token on its own, after the tokens that its window has before it."""
    losses = []
    for place in range(1, len(ids)):
        if place < length:
            begin = 0
        else:
            end = min(length + ((place - length) // stride + 1) * stride, len(ids))
            begin = end - length
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1]
        losses.append(-float(F.log_softmax(logits.double(), -1)[ids[place]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("stride", [5, 16])
def test_perplexity_is_the_slow_loop(kind: str, stride: int, made: Any) -> None:
    tokenizer, model = made[kind]
    rows = texts_task(12).splits(report_limit=3, dev=4).report
    task = texts_task(12, stride=stride)
    found = task.evaluate(model, tokenizer, rows, batch_size=3, max_length=24)
    special = tokenizer.bos_token_id if kind == "llama" else tokenizer.eos_token_id
    ids = [id for text in rows["text"] for id in [special, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert found.metrics["perplexity"] == pytest.approx(slow_perplexity(model, ids, 24, stride), rel=1e-4)
    assert found.metrics["perplexity"] != pytest.approx(slow_perplexity(model, ids, 24, 23), rel=1e-4)
    size = len("".join(rows["text"]).encode())
    bits = math.log2(found.metrics["perplexity"]) * (len(ids) - 1) / size
    assert found.metrics["bits_per_byte"] == pytest.approx(bits)
    assert found.loss == pytest.approx(math.log(found.metrics["perplexity"]))
    other = task.evaluate(model, tokenizer, rows, batch_size=64, max_length=24)
    assert other.loss == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_have_a_perplexity(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    rows = texts_task(8).splits(report_limit=2, dev=2).report
    found = texts_task(8, stride=6).evaluate(model, tokenizer, rows, batch_size=3, max_length=20)
    before, after = affixes(tokenizer)
    ids = [
        id
        for text in rows["text"]
        for id in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    total = 0.0
    for context, target in windows(ids, 20 - len(before) - len(after), 6):
        with torch.no_grad():
            output = model(torch.tensor([[*before, *context, *after]]), labels=torch.tensor([target]))
        total += float(output.loss) * len(target)
    assert found.loss == pytest.approx(total / len(ids), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not {"FFNKIT_DATA", "FFNKIT_MODELS"} <= set(os.environ), reason="needs data and models")
def test_stories_are_likely_to_the_model_that_learned_them() -> None:
    folder, task = Path(os.environ["FFNKIT_MODELS"]) / "stories260K", tasks.get("tinystories")
    tokenizer = task.load_tokenizer(folder)
    rows = task.splits(report_limit=20).report
    model = task.load_model(folder, tokenizer=tokenizer, trained_head=True)
    assert tune.evaluate(model, tokenizer, task, rows, max_length=256)["perplexity"] < 5
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)
    assert tune.evaluate(model, tokenizer, task, rows, max_length=256)["perplexity"] > 10


def test_strides_without_context_are_refused(made: Any) -> None:
    tokenizer, model = made["llama"]
    rows = texts_task(8).splits(report_limit=2, dev=2).report
    with pytest.raises(FfnkitError, match="stride 20"):
        texts_task(8, stride=20).evaluate(model, tokenizer, rows, max_length=20)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_every_token(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    rows = texts_task(8).splits(report_limit=4, dev=2).report
    blocks = texts_task(8).encode(rows, tokenizer, 16, model=model)
    before, after = affixes(tokenizer)
    read = [id for row in blocks["input_ids"] for id in row[len(before) : len(row) - len(after)]]
    written = [id for row in blocks["labels"] for id in row]
    ids = written if kind in DECODERS else [
        id for row, labels in zip(blocks["input_ids"], blocks["labels"], strict=True)
        for id in [*row[len(before) : len(row) - len(after)], *labels]
    ]  # fmt: skip
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.replace(" ", "") == "".join(rows["text"]).replace(" ", "")
    assert kind not in DECODERS or kind == "llama" or read == written
    assert max(map(len, blocks["input_ids"])) <= 16


# Prompts and targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_target_is_learnt_and_its_end(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    task = generation()
    rows = task.splits(dev=4, report_limit=5).report
    data = task.encode(rows, tokenizer, 96, model=model)
    pairs = nlg.pairs(rows.to_dict())
    assert len(data) == len(pairs["prompt"]) == 10
    for row, prompt, target in zip(data, pairs["prompt"], pairs["target"], strict=True):
        learnt = [label for label in row["labels"] if label != -100]
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == target
        assert prompt in tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        if kind in DECODERS:
            assert len(row["labels"]) == len(row["input_ids"]) and row["input_ids"][-len(learnt) :] == learnt
            whole = tokenizer(f"{prompt} {target}")["input_ids"]
            assert row["input_ids"] == [*whole, tokenizer.eos_token_id]
        else:
            assert row["input_ids"] == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_a_mean_over_target_tokens(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    task = generation()
    rows = task.splits(dev=4, report_limit=4).report
    data = task.encode(rows, tokenizer, 96, model=model)
    total, count, means = 0.0, 0, []
    for row in data:
        batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        with torch.no_grad():
            loss = float(model(**batch).loss)
        own = sum(label != -100 for label in row["labels"])
        total, count, means = total + loss * own, count + own, [*means, loss]
    for size in (1, 3, 64):
        found = task.evaluate(model, tokenizer, rows, batch_size=size, max_length=96, loss_only=True)
        assert found.loss == pytest.approx(total / count, rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found.loss != pytest.approx(np.mean(means), rel=1e-5)


def test_a_long_prompt_loses_its_middle(made: Any) -> None:
    tokenizer, model = made["llama"]
    task = generation(max_new_tokens=8)
    rows = task.splits(dev=4, report_limit=2).report
    prompt = " ".join([*rows["prompt"]] * 4)
    whole = tokenizer(prompt)["input_ids"]
    sequences = Sequences(tokenizer, model, 40, 8)
    assert len(whole) > 32 == sequences.prompt_room
    (cut,) = sequences.prompts([prompt])
    assert cut.ids == [*whole[:16], *whole[-16:]] and whole[0] == tokenizer.bos_token_id
    (row,) = sequences.examples([prompt], [TEXTS[0]])
    assert len(row["input_ids"]) <= 40 and row["labels"][:32] == [-100] * 32 and row["labels"][32] != -100
    data = task.encode(rows, tokenizer, 12, model=model)
    assert max(map(len, data["input_ids"])) == 12
    with pytest.raises(FfnkitError, match="max_length 3"):
        Sequences(tokenizer, model, 3, 8)


# Decoding -------------------------------------------------------------------------------------------------------------


def slow_greedy(model: Any, ids: list[int], end: int, most: int, start: int | None) -> list[int]:
    """Without a cache or padding, a prompt at a time."""
    written: list[int] = []
    while len(written) < most and end not in written:
        with torch.no_grad():
            if start is None:
                logits = model(torch.tensor([ids + written])).logits
            else:
                logits = model(torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *written]])).logits
        written.append(int(logits[0, -1].argmax()))
    return written[: written.index(end)] if end in written else written


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_is_the_slow_loop(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    task = generation()
    texts = [row["prompt"] for row in task.splits(dev=4, report_limit=6).report] + ["Aromi", "food: French ||"]
    sequences = Sequences(tokenizer, model, 96, 12)
    prompts = sequences.prompts(texts)
    start = None if kind in DECODERS else model.config.decoder_start_token_id
    wanted = [slow_greedy(model, each.ids, sequences.end, 12, start) for each in prompts]
    decoded = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    for size in (1, 3, 64):
        found, seconds = decode(model, sequences, prompts, GenerationSettings(batch_size=size), 12)
        assert found == decoded and seconds > 0
    assert len(set(decoded)) > 1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_beams_are_the_same_in_batches(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    texts = [row["prompt"] for row in generation().splits(dev=4, report_limit=6).report] + ["Aromi"]
    sequences = Sequences(tokenizer, model, 96, 12)
    prompts = sequences.prompts(texts)
    runs = [decode(model, sequences, prompts, GenerationSettings(num_beams=3, batch_size=b), 12)[0] for b in (1, 4)]
    assert runs[0] == runs[1] != decode(model, sequences, prompts, GenerationSettings(), 12)[0]


def grams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def test_settings_of_decoding_count(made: Any) -> None:
    tokenizer, model = made["gpt2"]
    sequences = Sequences(tokenizer, model, 96, 40)
    prompts = sequences.prompts([row["prompt"] for row in generation().splits(dev=4, report_limit=4).report])

    def ids(**settings: Any) -> list[list[int]]:
        texts, _ = decode(model, sequences, prompts, GenerationSettings(**settings), 40)
        return [tokenizer(text)["input_ids"] for text in texts]

    plain, barred = ids(), ids(no_repeat_ngram_size=2)
    assert any(len(set(grams(each, 2))) < len(grams(each, 2)) for each in plain)
    assert barred != plain
    beams = [
        decode(model, sequences, prompts, GenerationSettings(num_beams=4, length_penalty=p), 40)[0] for p in (-9, 9)
    ]
    assert sum(map(len, beams[0])) <= sum(map(len, beams[1]))
    one, _ = decode(model, sequences, prompts, GenerationSettings(), 1)
    assert all(len(tokenizer(text)["input_ids"]) <= 2 for text in one)


def test_a_models_own_search_plays_no_part(made: Any) -> None:
    tokenizer, _ = made["bart"]
    model = model_of("bart", tokenizer)
    sequences = Sequences(tokenizer, model, 96, 12)
    prompts = sequences.prompts(["name: Aromi ||", "Strada"])
    plain, _ = decode(model, sequences, prompts, GenerationSettings(), 12)
    own = model.generation_config
    own.num_beams, own.min_length, own.no_repeat_ngram_size, own.repetition_penalty = 4, 9, 1, 5.0
    assert decode(model, sequences, prompts, GenerationSettings(), 12)[0] == plain
    assert model.generation_config is own
    own.forced_bos_token_id = tokenizer.convert_tokens_to_ids("F")
    assert decode(model, sequences, prompts, GenerationSettings(), 12)[0] != plain  # what its tokens mean does


def test_a_text_stops_at_its_end(made: Any) -> None:
    """A model that was taught short answers gives them, whatever stands after them in the batch."""
    tokenizer, _ = made["llama"]
    model = model_of("llama", tokenizer)
    task = generation()
    splits = task.splits(dev=4)
    settings = tune.TrainSettings(learning_rate=2e-2, steps=60, batch_size=16, max_length=96)
    result = tune.train(model, tokenizer, task, splits, settings, out_dir=_temporary(), progress=False)
    found = tune.assess(result.model, tokenizer, task, splits.train, max_length=96)
    assert all(len(row["prediction"]) < 60 for row in found.predictions)
    assert sum(row["prediction"].endswith(".") for row in found.predictions) > len(found.predictions) / 2
    assert found.speed["generated_per_second"] > 0
    assert set(found.metrics) == {"bleu", "rougeL", "perplexity"} and found.metrics["rougeL"] > 30


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_parts_of_a_split_are_scored_on_its_own_texts(kind: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test split with its seen and unseen rows: what is written once gives the scores of writing for each anew."""
    tokenizer, model = made[kind]
    task = generation()
    rows = task.splits(dev=4).report
    again = rows.select([*range(len(rows)), 0, 1])  # rows that say the same, as DART has
    parts = {"test": again, "test_seen": rows.select(range(0, len(rows), 2)), "other": task.splits(dev=4).dev}
    splits = Splits(rows, rows, rows.select([2, 0]), parts)
    wanted = {
        name: tune.assess(model, tokenizer, task, part) for name, part in {"report": splits.report, **parts}.items()
    }
    asked: list[int] = []
    write = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **given: asked.append(len(given["input_ids"])) or write(self, **given)
    )
    found = tune.assess_all(model, tokenizer, task, splits, batch_size=64)
    assert list(found) == list(wanted) == ["report", "test", "test_seen", "other"]
    for name, each in found.items():
        assert each.metrics == pytest.approx(wanted[name].metrics) and each.loss == pytest.approx(wanted[name].loss)
        assert each.predictions == wanted[name].predictions
    assert asked == [2, len(rows) - 2, 4]  # each prompt once
    assert not found["test_seen"].speed and found["other"].speed["generated_per_second"] > 0
    tune.assess(model, tokenizer, task, splits.report)
    assert asked[-1] == 2  # another evaluation writes anew


def _temporary() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp()) / "run"


def test_predictions_go_to_a_file(made: Any, tmp_path: Path) -> None:
    tokenizer, model = made["t5"]
    task = generation()
    rows = task.splits(dev=4, report_limit=3).report
    found = tune.evaluate(model, tokenizer, task, rows, predictions=tmp_path / "written.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == rows["prompt"] and set(lines[0]) == {
        "prompt",
        "prediction",
        "references",
    }
    assert set(found) == {"bleu", "rougeL", "perplexity", "loss"}
    with pytest.raises(FfnkitError, match="writes no texts"):
        tune.evaluate(model, tokenizer, texts_task(8), texts_task(8).splits(dev=2).dev, predictions=tmp_path / "none")


# Token types and new tokens -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, made: Any) -> dict[str, Path]:
    """Folders of the models with their tokenizers."""
    base = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        tokenizer, model = made[kind]
        model.save_pretrained(base / kind)
        tokenizer.save_pretrained(base / kind)
    return {kind: base / kind for kind in KINDS}


def test_special_tokens_get_types_and_embeddings(saved: Any, made: Any) -> None:
    task = generation(typed=True)
    tokenizer = task.load_tokenizer(saved["gpt2"])
    rows = len(made["gpt2"][0])
    assert len(tokenizer) == rows + 6
    tune.seed_everything(0)
    model = task.load_model(saved["gpt2"], tokenizer=tokenizer)
    tune.seed_everything(1)
    again = task.load_model(saved["gpt2"], tokenizer=tokenizer)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == model.config.vocab_size == rows + 6
    assert torch.equal(weight, again.get_input_embeddings().weight)
    assert torch.equal(weight[:rows], made["gpt2"][1].get_input_embeddings().weight)
    assert weight[rows:].std(0).min() > 0 and weight[rows:].abs().max() < weight[:rows].abs().max()
    data = task.encode(task.splits(dev=4, report_limit=3).report, tokenizer, 96, model=model)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in task.special_tokens}
    for row in data:
        kinds = row["token_type_ids"]
        learnt = sum(label != -100 for label in row["labels"])
        assert row["labels"][-1] == ids["<eos>"] and kinds[-learnt - 1 :] == [ids["<target>"]] * (learnt + 1)
        current = None
        for token, kind in zip(row["input_ids"][:-learnt], kinds, strict=False):
            current = token if token in ids.values() else current
            assert kind == current
    batch = {name: torch.tensor([data[0][name]]) for name in ("input_ids", "labels", "token_type_ids")}
    with torch.no_grad():
        typed = model(**batch).logits
        untyped = model(input_ids=batch["input_ids"]).logits
    assert_differs(typed, untyped)


def test_types_are_gpt2s_only(saved: Any) -> None:
    task = generation(typed=True)
    for kind in ("llama", "t5"):
        tokenizer = task.load_tokenizer(saved[kind])
        model = task.load_model(saved[kind], tokenizer=tokenizer)
        data = task.encode(task.splits(dev=4, report_limit=3).report, tokenizer, 96, model=model)
        assert data.column_names == ["input_ids", "labels"]
        end = "<eos>" if kind == "llama" else "</s>"
        assert data[0]["labels"][-1] == tokenizer.convert_tokens_to_ids(end)


def test_typed_decoding_is_the_slow_loop(saved: Any) -> None:
    task = generation(typed=True)
    tokenizer = task.load_tokenizer(saved["gpt2"])
    model = task.load_model(saved["gpt2"], tokenizer=tokenizer).eval()
    rows = task.splits(dev=4, report_limit=5).report.to_dict()
    sequences = Sequences(tokenizer, model, 96, 10, "<eos>", "<target>")
    prompts = sequences.prompts(rows["prompt"], rows["segments"])
    found, _ = decode(model, sequences, prompts, GenerationSettings(batch_size=3), 10)
    for prompt, text in zip(prompts, found, strict=True):
        ids, kinds = list(prompt.ids), list(prompt.types or ())
        for _ in range(10):
            with torch.no_grad():
                output = model(torch.tensor([ids]), token_type_ids=torch.tensor([kinds]))
            ids.append(int(output.logits[0, -1].argmax()))
            kinds.append(tokenizer.convert_tokens_to_ids("<target>"))
            if ids[-1] == sequences.end:
                break
        new = ids[len(prompt.ids) :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == text


def test_new_tokens_survive_saving(saved: Any, tmp_path: Path) -> None:
    import ffnkit

    task = generation(typed=True)
    tokenizer = task.load_tokenizer(saved["gpt2"])
    model = task.load_model(saved["gpt2"], tokenizer=tokenizer)
    ffnkit.apply(model, ffnkit.plan(model, ffnkit.Fusion(width=0.5)))
    ffnkit.fold(model)
    ffnkit.save(model, tmp_path / "out", tokenizer=tokenizer)
    other = task.load_tokenizer(tmp_path / "out")
    again = task.load_model(tmp_path / "out", tokenizer=other, trained_head=True)
    assert other.get_vocab() == tokenizer.get_vocab()
    rows = task.splits(dev=4, report_limit=3).report
    assert_close(
        torch.tensor(task.evaluate(again, other, rows, max_length=96, loss_only=True).loss),
        torch.tensor(task.evaluate(model, tokenizer, rows, max_length=96, loss_only=True).loss),
    )


def test_models_that_cannot_write_are_refused(tmp_path: Path, saved: Any) -> None:
    from families import FAMILIES

    FAMILIES["bert"].model().save_pretrained(tmp_path)
    with pytest.raises(FfnkitError, match="cannot write"):
        generation().load_model(tmp_path)
    body = made_body(saved["gpt2"], tmp_path / "body")
    with pytest.raises(FfnkitError, match=r"tokens and the model"):
        generation().load_model(body, tokenizer=generation(typed=True).load_tokenizer(saved["gpt2"]))


def made_body(folder: Path, out: Path) -> Path:
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(out)
    return out


# Training -------------------------------------------------------------------------------------------------------------


def fit(kind: str, task: Any, out: Path, made: Any, **more: Any) -> Any:
    tokenizer = made[kind][0]
    base = {"learning_rate": 5e-3, "batch_size": 8, "steps": 6, "max_length": 64, "logging_every": 1}
    settings = tune.TrainSettings(**{**base, **more})
    model = model_of(kind, tokenizer)
    return tune.train(model, tokenizer, task, task.splits(dev=6), settings, seed=1, out_dir=out, progress=False)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accumulation_weights_by_tokens(kind: str, tmp_path: Path, made: Any) -> None:
    """Two batches of 4 are one batch of 8, though their numbers of target tokens differ; a mean of means is not."""
    small = {
        "steps": 2,
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "warmup": 0.0,
        "keep_best": False,
    }
    whole = fit(kind, generation(), tmp_path / "whole", made, **small)
    parts = fit(kind, generation(), tmp_path / "parts", made, batch_size=4, accumulation=2, **small)
    first, second = (torch.cat([p.flatten() for p in r.model.parameters()]) for r in (whole, parts))
    start = torch.cat([p.flatten() for p in model_of(kind, made[kind][0]).parameters()])
    assert_close(second - start, first - start, rel=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ffnkit.tune.loop.Loop._get_num_items_in_batch", lambda *_: None)
        means = fit(kind, generation(), tmp_path / "means", made, batch_size=4, accumulation=2, **small)
    third = torch.cat([p.flatten() for p in means.model.parameters()])
    assert_differs(third - start, first - start, rel=1e-3)


RUNS = {
    "generation": lambda: generation(),
    "language": lambda: texts_task(40),
    "words": lambda: WordsTask(food_task()),
}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("name", RUNS)
def test_a_kill_changes_nothing(
    name: str, kind: str, tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"eval_every": 2}
    whole = fit(kind, RUNS[name](), tmp_path / "whole", made, **more)
    killed_at(4, monkeypatch, lambda: fit(kind, RUNS[name](), tmp_path / "killed", made, **more))
    again = fit(kind, RUNS[name](), tmp_path / "killed", made, **more)
    assert_same(again.model, whole.model)
    assert again.history == whole.history and again.losses == whole.losses
    assert whole.losses[-1]["loss"] < whole.losses[0]["loss"]
    assert whole.best_metric_name == ("accuracy" if name == "words" else "loss")


def test_dev_may_be_judged_by_what_is_written(tmp_path: Path, made: Any) -> None:
    result = fit("llama", generation(), tmp_path, made, best_metric="rougeL", eval_every=3)
    assert result.best_metric_name == "rougeL" and all("rougeL" in entry for entry in result.history)
    assert result.best_metric == max(entry["rougeL"] for entry in result.history)
    with pytest.raises(FfnkitError, match="bleu or rougeL or perplexity or loss"):
        fit("llama", generation(), tmp_path / "other", made, best_metric="accuracy")


def test_lora_writes_too(tmp_path: Path, made: Any) -> None:
    tokenizer = made["llama"][0]
    task = generation()
    settings = tune.TrainSettings(steps=2, batch_size=4, max_length=64, best_metric="bleu")
    model = model_of("llama", tokenizer)
    result = tune.train(
        model, tokenizer, task, task.splits(dev=4), settings, tuner="lora", out_dir=tmp_path, progress=False
    )
    assert result.steps == 2 and math.isfinite(result.history[-1]["bleu"])


# Label words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_label_words_are_compared_by_likelihood(kind: str, made: Any) -> None:
    tokenizer, model = made[kind]
    task = WordsTask(food_task(), ("not at all", "yes"))
    rows = task.splits(dev=4, report_limit=5).report
    found, counts = task.scores(model, tokenizer, rows.to_dict(), 2, 64)
    right, words = [], []
    for row, text in enumerate(rows["text"]):
        prompt = f"food text: {text}" + (" label:" if kind in DECODERS else "")
        for word, name in enumerate(task.words):
            if kind in DECODERS:
                start = tokenizer(prompt)["input_ids"]
                ids = [*tokenizer(f"{prompt} {name}")["input_ids"], tokenizer.eos_token_id]
                labels = [-100] * len(start) + ids[len(start) :]
                batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            else:
                batch = {name_: torch.tensor([tokenizer(each)["input_ids"]])
                         for name_, each in (("input_ids", prompt), ("labels", name))}  # fmt: skip
                if kind == "bart":
                    assert batch["labels"][0, 0] == tokenizer.bos_token_id
            with torch.no_grad():
                loss = float(model(**batch).loss)
            own = int(batch["labels"].ne(-100).sum())
            assert counts[row, word] == own
            assert found[row, word] == pytest.approx(-loss * own, rel=1e-4)
        words.append(int(found[row].argmax()))
        right.append(words[-1] == rows["label"][row])
    metrics = tune.evaluate(model, tokenizer, task, rows, batch_size=3, max_length=64)
    assert metrics["accuracy"] == pytest.approx(np.mean(right)) and set(metrics) == {"accuracy", "f1", "loss"}


@pytest.mark.parametrize("kind", ["llama", "switch"])
def test_label_words_are_learnt(kind: str, tmp_path: Path, made: Any) -> None:
    result = fit(kind, WordsTask(food_task()), tmp_path, made, steps=80, eval_every=20, learning_rate=1e-2)
    assert result.best_metric == 1.0
    splits = WordsTask(food_task()).splits(dev=6)
    found = tune.evaluate(result.model, made[kind][0], WordsTask(food_task()), splits.report, max_length=64)
    assert found["accuracy"] >= 0.75


def test_label_words_want_classes_and_words() -> None:
    with pytest.raises(FfnkitError, match="regression"):
        WordsTask(food_task(kind="regression", label_names=(), metrics=("pearson",)))
    with pytest.raises(FfnkitError, match="word of its own"):
        WordsTask(food_task(), ("yes", "yes"))


# Choosing a task ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    rows = meanings()
    lines = [
        json.dumps({"facts": prompt.rstrip(" |"), "told": references})
        for prompt, references in zip(rows["prompt"], rows["references"], strict=True)
    ]
    (base / "meals.jsonl").write_text("\n".join(lines))
    (base / "stories.txt").write_text("\n\n".join(TEXTS))
    (base / "stories.jsonl").write_text("\n".join(json.dumps({"story": text}) for text in TEXTS))
    labels = [json.dumps({"text": text, "chinese": "yes" if "Chinese" in text else "no"}) for text in TEXTS]
    (base / "labels.jsonl").write_text("\n".join(labels))
    return base


def test_choices_give_every_kind(files: Path) -> None:
    def kind(**fields: Any) -> str:
        return tasks.choose(**fields).kind

    assert kind(name="sst2") == "classification" and kind(name="e2e") == "generation"
    assert kind(name="wikitext2", stride=64) == "language-modelling"
    assert kind(train=files / "stories.txt") == "language-modelling"
    assert kind(train=files / "stories.jsonl", text=("story",), kind="language-modelling") == "language-modelling"
    assert kind(train=files / "labels.jsonl", text=("text",), label="chinese") == "classification"
    assert isinstance(tasks.choose(name="mrpc", head="words"), WordsTask)
    task = tasks.choose(train=files / "meals.jsonl", inputs=("facts",), target="told", metric="bleu, ter")
    assert task.metrics == ("bleu", "ter", "perplexity") and task.main_metric == "bleu"
    assert task.splits(dev=4).train[0]["prompt"].endswith("told:")
    assert tasks.choose(name="e2e", metric="ter,chrf").metrics == ("ter", "chrf", "perplexity")
    assert Choice(train="a.jsonl", inputs=("x", "y"), target="z").where == "a.jsonl (x, y -> z)"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "no task and no file"),
        ({"name": "e2e", "train": "a.jsonl"}, "not both"),
        ({"train": "a.jsonl", "target": "y"}, "inputs"),
        ({"train": "a.jsonl", "inputs": ("x",)}, "target"),
        ({"train": "a.jsonl", "inputs": ("x",), "target": "y", "label": "z"}, "label"),
        ({"train": "a.txt", "label": "z"}, "text"),
        ({"train": "a.jsonl", "text": ("x",)}, "language-modelling"),
        ({"train": "a.jsonl", "template": "{x}"}, "template"),
        ({"name": "e2e", "stride": 3}, "stride 3"),
        ({"name": "e2e", "head": "words"}, "head 'words'"),
        ({"name": "stsb", "head": "words"}, "head 'words'"),
        ({"name": "sst2", "metric": "bleu"}, "accuracy"),
        ({"name": "e2e", "metric": "accurate"}, "accurate"),
    ],
)
def test_choices_that_do_not_fit_are_said(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(FfnkitError) as error:
        tasks.choose(**fields)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_every_setting_of_decoding_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text(encoding="utf-8")
    for name, info in GenerationSettings.model_fields.items():
        assert f"| `{name}` | {'null' if info.default is None else info.default} | {info.description} |" in page


# Through the recipe and the command line ------------------------------------------------------------------------------


def ffnkit_command(*arguments: object) -> dict[str, Any]:
    from typer.testing import CliRunner

    from ffnkit.cli import app

    result = CliRunner().invoke(app, ["--quiet", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_tune_and_eval_of_files(files: Path, saved: Any, tmp_path: Path) -> None:
    data = ("--train-file", files / "meals.jsonl", "--input-column", "facts", "--target-column", "told")
    short = ("--max-length", 64, "--generation-set", "max_new_tokens=8")
    report = ffnkit_command("tune", saved["t5"], *data, *short, "--steps", 2, "--out", tmp_path / "out")
    assert set(report["metrics"]) == {"rougeL", "rouge1", "rouge2", "perplexity", "loss"}
    assert report["speed"]["generated_per_second"] > 0
    written = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(written) == report["rows"]
    more = ("--predictions", tmp_path / "again.jsonl")
    again = ffnkit_command("eval", tmp_path / "out", *data, "--split", "report", *short, *more)
    ffnkit_command("eval", tmp_path / "out", *data, "--split", "report", *short, *more)  # in its own place
    assert again["metrics"] == pytest.approx(report["metrics"], rel=1e-4)
    assert (tmp_path / "again.jsonl").read_text().splitlines() == written


@pytest.mark.slow
def test_tune_on_plain_text_and_by_words(files: Path, saved: Any, tmp_path: Path) -> None:
    plain = ("--train-file", files / "stories.txt", "--max-length", 32, "--steps", 2)
    report = ffnkit_command("tune", saved["llama"], *plain, "--out", tmp_path / "text")
    assert set(report["metrics"]) == {"perplexity", "bits_per_byte", "loss"} and report["main_metric"] == "perplexity"
    table = ("--train-file", files / "labels.jsonl", "--text-column", "text", "--label-column", "chinese")
    words = ffnkit_command(
        "tune",
        saved["switch"],
        *table,
        "--head",
        "words",
        "--max-length",
        32,
        "--steps",
        2,
        "--out",
        tmp_path / "words",
    )
    assert set(words["metrics"]) == {"accuracy", "macro_f1", "loss"}


def recipe(files: Path, model: Path, **changes: Any) -> Any:
    data = {
        "name": "meals",
        "model": str(model),
        "task": {"train": str(files / "meals.jsonl"), "input": "facts", "target": "told", "metric": "ter,bleu"},
        "arms": {"whole": {}, "half": {"method": "fusion", "width": 0.5}},
        "generation": {"max_new_tokens": 8, "num_beams": 2},
        "tune": {"learning_rate": 3e-3, "steps": 2, "batch_size": 8, "max_length": 48},
        "export": "compact",
        "measure": {"batch_size": 2, "length": 8, "repeats": 1},
    }
    return recipe_from(data | changes)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_recipes_write(kind: str, files: Path, saved: Any, tmp_path: Path) -> None:
    from ffnkit.recipe import run

    results = run(recipe(files, saved[kind]), tmp_path / "out", progress=False, isolate=False)
    assert results.ok, results.failed
    assert results.metric == "ter" and set(results.rows[0]["metrics"]) == {"ter", "bleu", "perplexity"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Less is better: ter, perplexity." in table and "| ter |" in table
    assert results.summary().arms[1].difference is not None and results.rows[1]["latency_s"] > 0
    unit = tmp_path / "out" / "units" / "half" / "seed-0"
    rows = [json.loads(line) for line in (unit / "predictions-report.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "prediction", "references"}
    assert ("AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM") in (
        unit / "compact/README.md"
    ).read_text()
    assert json.loads((unit / "evaluate.json").read_text())["speed"]["report"]["generated_per_second"] > 0


def test_recipes_model_text(files: Path, saved: Any, tmp_path: Path) -> None:
    from ffnkit.recipe import run

    wanted = recipe(files, saved["gpt2"], task={"train": str(files / "stories.txt"), "stride": 8}, export="none")
    results = run(wanted, tmp_path / "out", progress=False, isolate=False)
    assert results.ok and results.metric == "perplexity"


@pytest.mark.parametrize(
    ("task", "part"),
    [
        ({"train": "a.jsonl", "target": "y"}, "task.input"),
        ({"train": "a.jsonl", "input": "x", "target": "y", "text": "z"}, "task.text"),
        ({"name": "e2e", "input": "x"}, "task.name"),
        ({"train": "a.jsonl", "text": "x", "kind": "language"}, "task.kind"),
    ],
)
def test_recipes_name_the_wrong_field(task: dict[str, Any], part: str, files: Path, saved: Any) -> None:
    with pytest.raises(FfnkitError) as error:
        recipe(files, saved["gpt2"], task=task)
    assert part in str(error.value)


def test_row_losses_leave_out_what_models_add(made: Any) -> None:
    from families import FAMILIES

    model = FAMILIES["mixtral"].model()
    model.config.output_router_logits = True
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        output = model(**batch, output_router_logits=True)
        losses, counts = row_losses(model, batch)
    plain = float(F.cross_entropy(output.logits[0, :-1], ids[0, 1:]))
    assert float(losses / counts) == pytest.approx(plain, rel=1e-5) and int(counts) == 4
    assert float(output.loss) != pytest.approx(plain, rel=1e-5)
