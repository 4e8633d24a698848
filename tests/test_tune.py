"""Fine-tuning: what each tuner trains, exact resuming, checkpoints, evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from methods import slow_but
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tolerance import assert_close, assert_differs
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from ffnkit.cli import describe
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.trainable import head_modules
from ffnkit.tasks.classification.classifier import Classifier
from ffnkit.tune import (
    TUNERS,
    DistilSettings,
    TrainSettings,
    checkpoints,
    clean,
    evaluate,
    get,
    seed_everything,
    train,
    trainable_parameters,
    training,
    tuners,
)
from ffnkit.tune.loop import GroupedSampler, Loop

WORDS = [f"w{i}" for i in range(20)]
VOCAB: dict[str, int] = {"[PAD]": 0, "[UNK]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}


@dataclass(frozen=True)
class WordTask(Classifier):
    """Which half of the vocabulary does the first word come from? (As a regression: its share of the way.)"""

    name: str = "words"
    kind: str = "classification"
    main_metric: str = "accuracy"
    metrics: tuple[str, ...] = ("accuracy",)

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        coded = tokenizer(list(dataset["text"]), truncation=True, max_length=max_length)
        return Dataset.from_dict({**coded, "labels": list(dataset["label"])})

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        if self.kind == "regression":
            return {"mse": float(np.mean((np.asarray(predictions)[:, 0] - labels) ** 2))}
        return {"accuracy": float(np.mean(np.argmax(predictions, -1) == labels))}


TASK = WordTask()
REGRESSION = WordTask("words-regression", "regression", "mse", ("mse",))


def tokenizer() -> Any:
    plain = Tokenizer(WordLevel(VOCAB, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names, padding_side="right"
    )


TOKENIZER = tokenizer()


def rows(count: int, seed: int, kind: str = "classification") -> Dataset:
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        ids = generator.integers(0, 20, size=generator.integers(2, 9))
        texts.append(" ".join(WORDS[i] for i in ids))
        labels.append(float(ids[0]) / 20 if kind == "regression" else int(ids[0] >= 10))
    return Dataset.from_dict({"text": texts, "label": labels})


def splits(kind: str = "classification", train: int = 44) -> Any:
    return SimpleNamespace(train=rows(train, 0, kind), dev=rows(30, 1, kind), report=rows(30, 2, kind))


SMALL: dict[str, Any] = {"vocab_size": len(VOCAB), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BERT: dict[str, Any] = {
    **SMALL, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 16,
}  # fmt: skip


def bert(num_labels: int = 2, problem: str = "", **more: Any) -> nn.Module:
    seed_everything(5)
    problem = problem or ("regression" if num_labels == 1 else "single_label_classification")
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=num_labels, problem_type=problem, **more))


def gpt2(num_labels: int = 2) -> nn.Module:
    seed_everything(5)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 40, "n_positions": 16}
    return GPT2ForSequenceClassification(GPT2Config(**SMALL, **sizes, num_labels=num_labels))


def llama(num_labels: int = 2) -> nn.Module:
    seed_everything(5)
    return LlamaForSequenceClassification(LlamaConfig(**BERT, num_labels=num_labels))


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama}


def settings(**more: Any) -> TrainSettings:
    base = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 2, "max_length": 16, "logging_every": 2}
    return TrainSettings(**{**base, **more})


def fit(model: nn.Module, out: Path, task: Any = TASK, **more: Any) -> Any:
    known = {key: more.pop(key) for key in ("tuner", "seed") if key in more}
    return train(model, TOKENIZER, task, splits(task.kind), settings(**more), out_dir=out, progress=False, **known)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


# Tuners --------------------------------------------------------------------------------------------------------------


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_every_tuner_says_what_it_is() -> None:
    wanted = ["full", "ffn", "lora", "sparsegrad", "dsee", "mask", "meprop", "combined"]
    wanted += ["bottleneck", "prefix", "bitfit", "head"]
    assert [tuner.name for tuner in TUNERS] == wanted == tuners.names()
    assert all(tuner.description and tuner.__doc__ for tuner in TUNERS)


def test_unknown_tuners_and_settings_are_said() -> None:
    with pytest.raises(FfnkitError, match="full, ffn, lora"):
        get("lorra")
    with pytest.raises(FfnkitError, match="rank, alpha"):
        get({"name": "lora", "rnk": 3})
    with pytest.raises(FfnkitError, match="greater than 0"):
        get({"name": "lora", "rank": 0})
    assert get({"name": "lora", "rank": 3}).rank == 3 and get(get("ffn")) == get("ffn")


def test_full_trains_everything_that_is_not_fixed() -> None:
    model = FAMILIES["marian"].model()  # sinusoidal positions are fixed
    before = [p for p in model.parameters() if p.requires_grad]
    tuned = tuners.prepare(model, "full")
    assert tuned is model and {id(p) for p in trainable_parameters(model)} == {id(p) for p in before}
    assert len(before) < len(list(model.parameters()))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_ffn_trains_ffns_and_head(name: str) -> None:
    model = FAMILIES[name].model()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    trained = trainable_parameters(tuners.prepare(model, "ffn"))
    inner = {id(p) for ffn in ffns(model) for p in ffn.parameters()}
    base = getattr(model, model.base_model_prefix, None)
    body = {id(p) for p in base.parameters()} if base is not None and base is not model else set()
    for parameter_name, p in model.named_parameters():
        if id(p) in inner:
            assert p.requires_grad, f"{parameter_name} of an FFN does not train"
        elif id(p) in body:
            assert p.requires_grad == ("pooler" in parameter_name.split(".")), f"{parameter_name} of the body trains"
    assert len({id(p) for p in trained}) == len(trained) < len(list(model.parameters()))
    tuners.finish(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_heads() -> None:
    assert list(head_modules(bert())) == ["bert.pooler", "classifier"]
    assert list(head_modules(gpt2())) == ["score"]
    assert list(head_modules(FAMILIES["distilbert"].model())) == ["pre_classifier", "classifier"]
    assert list(head_modules(FAMILIES["roberta"].model())) == ["classifier"]
    assert list(head_modules(FAMILIES["gpt2"].model())) == []  # shares its weights with the embeddings
    assert list(head_modules(FAMILIES["llama"].model())) == ["lm_head"]


def test_shared_parameters_count_once() -> None:
    model = bert()
    layers = model.bert.encoder.layer
    layers[1].intermediate, layers[1].output = layers[0].intermediate, layers[0].output
    tuners.prepare(model, "ffn")
    ffn = ffns(model)
    assert len(ffn) == 1
    head = sum(p.numel() for module in head_modules(model).values() for p in module.parameters())
    assert sum(p.numel() for p in trainable_parameters(model)) == ffn[0].num_parameters + head


def inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, len(VOCAB), (4, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def disturb_adapters(model: nn.Module) -> None:
    """LoRA starts with B = 0: give it something to merge."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return model.eval()(**inputs(model, seed)).logits


@pytest.mark.parametrize("targets", ["ffn", "attention", "all"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_lora_merges_to_a_plain_model(name: str, targets: str) -> None:
    model = MODELS[name]()
    keys, before = list(model.state_dict()), weights(model)
    plain = logits(model)
    tuned = tuners.prepare(model, {"name": "lora", "rank": 4, "targets": targets})
    assert_close(logits(tuned), plain)
    disturb_adapters(tuned)
    adapted = logits(tuned)
    assert_differs(adapted, plain)
    merged = tuners.finish(tuned)
    assert type(merged) is type(MODELS[name]()) and list(merged.state_dict()) == keys
    assert not any("lora" in type(m).__module__ or "peft" in type(m).__module__ for m in merged.modules())
    assert_close(logits(merged), adapted, rel=1e-5)
    assert all(p.requires_grad for p in merged.parameters())
    inner = names_of(merged, [p for f in ffns(merged) for p in f.parameters()])
    heads = tuple(head_modules(merged))
    moved = {n for n, v in merged.state_dict().items() if not torch.equal(v, before[n]) and not n.startswith(heads)}
    assert moved and (targets != "ffn" or moved <= inner) and (targets != "attention" or not moved & inner)


def test_lora_by_expression() -> None:
    tuned = tuners.prepare(bert(), {"name": "lora", "targets": r".*\.layer\.1\.attention\.self\.(query|value)"})
    adapted = {n.split(".lora_")[0] for n, p in tuned.named_parameters() if p.requires_grad and "lora_" in n}
    assert {n.rpartition(".")[2] for n in adapted} == {"query", "value"} and all("layer.1" in n for n in adapted)
    with pytest.raises(FfnkitError, match="no linear of the model matches"):
        tuners.prepare(bert(), {"name": "lora", "targets": "nothing"})
    with pytest.raises(FfnkitError, match="not a regular expression"):
        tuners.prepare(bert(), {"name": "lora", "targets": "("})


def test_lora_adapts_shared_linears_everywhere() -> None:
    model = bert()
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense, layers[1].output.dense = layers[0].intermediate.dense, layers[0].output.dense
    tuned = tuners.prepare(model, "lora")
    disturb_adapters(tuned)
    adapted = logits(tuned)
    merged = tuners.finish(tuned)
    layers = merged.bert.encoder.layer
    assert layers[1].output.dense is layers[0].output.dense and type(layers[0].output.dense) is nn.Linear
    assert_close(logits(merged), adapted, rel=1e-5)


def test_lora_of_experts() -> None:
    family = FAMILIES["mixtral"]
    model = family.model()
    batch = family.inputs(model)
    plain = family.outputs(model, batch)["logits"]
    tuned = tuners.prepare(model, {"name": "lora", "rank": 2})
    disturb_adapters(tuned)
    with torch.no_grad():
        adapted = tuned.eval()(**batch).logits
    assert_differs(adapted, plain)
    merged = tuners.finish(tuned)
    assert type(merged) is type(model)
    assert_close(family.outputs(merged, batch)["logits"], adapted, rel=1e-5)


def test_adapters_are_saved_in_the_form_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    tuner = get({"name": "lora", "adapter_dir": tmp_path / "adapter"})
    tuned = tuner.prepare(bert())
    disturb_adapters(tuned)
    adapted = logits(tuned)
    tuner.finish(tuned)
    assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path / "adapter")), adapted, rel=1e-5)


def test_lora_folds_first() -> None:
    import ffnkit as fk

    model = bert()
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fused = logits(model)
    tuned = tuners.prepare(model, "lora")
    assert_close(logits(tuned), fused, rel=1e-5)
    disturb_adapters(tuned)
    adapted = logits(tuned)
    assert_close(logits(tuners.finish(tuned)), adapted, rel=1e-5)
    assert all(not f.special for f in ffns(tuned))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tuner"), [("bert", "full"), ("bert", "ffn"), ("bert", "lora"), ("gpt2", "lora"), ("llama", "full")]
)
def test_training_learns(name: str, tuner: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    use_cache = model.config.use_cache
    result = fit(model, tmp_path, tuner=tuner, learning_rate=1e-2, epochs=5, logging_every=6)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    after = evaluate(result.model, TOKENIZER, TASK, splits().dev)
    assert result.best_metric == pytest.approx(after["accuracy"])
    assert result.steps == 30 and len(result.history) == 5 and result.losses[-1]["step"] == 30
    assert result.best_step in {entry["step"] for entry in result.history}
    assert type(result.model) is type(MODELS[name]()) and not result.model.training
    assert result.model.config.use_cache == use_cache and "forward" not in vars(result.model)
    assert result.seconds > 0 and result.samples_per_second > 0 and result.peak_rss > 1e7
    assert 0 < result.trainable_parameters <= sum(p.numel() for p in model.parameters()) * 2
    json.dumps(result.to_dict())
    assert not checkpoints.checkpoints(tmp_path)


def test_ffn_leaves_the_rest_alone(tmp_path: Path) -> None:
    model = bert()
    before = weights(model)
    result = fit(model, tmp_path, tuner="ffn")
    changed = {n for n, v in result.model.state_dict().items() if not torch.equal(v, before[n])}
    claimed = names_of(result.model, [p for f in ffns(result.model) for p in f.parameters()])
    claimed |= {n for n in before if n.startswith(("classifier", "bert.pooler"))}
    assert changed == claimed


def test_regression_goes_down(tmp_path: Path) -> None:
    model = bert(num_labels=1)
    result = fit(model, tmp_path, REGRESSION, epochs=4)
    values = [entry["mse"] for entry in result.history]
    assert result.best_metric == pytest.approx(min(values))
    assert evaluate(result.model, TOKENIZER, REGRESSION, splits("regression").dev)["mse"] == pytest.approx(min(values))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_checkpoint_comes_back(metric: str, tmp_path: Path) -> None:
    result = fit(bert(), tmp_path, best_metric=metric, eval_every=2, learning_rate=0.02)
    values = [entry[metric] for entry in result.history]
    best = min(values) if metric == "loss" else max(values)
    assert result.best_metric == pytest.approx(best) and len(set(values)) > 1
    assert evaluate(result.model, TOKENIZER, TASK, splits().dev)[metric] == pytest.approx(best, rel=1e-4)
    last = fit(bert(), tmp_path / "last", best_metric=metric, eval_every=2, learning_rate=0.02, keep_best=False)
    assert evaluate(last.model, TOKENIZER, TASK, splits().dev)[metric] == pytest.approx(values[-1], rel=1e-4)


def test_early_stopping(tmp_path: Path) -> None:
    result = fit(bert(), tmp_path, eval_every=1, early_stopping=2, learning_rate=1e-12, epochs=3)
    assert result.steps == 3  # the first evaluation, and two without a gain


def test_an_unknown_metric_is_said(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match="accuracy or loss"):
        fit(bert(), tmp_path, best_metric="f1")


def test_settings_are_checked() -> None:
    for wrong in ({"learning_rate": -1}, {"lr": 1}, {"precision": "fp8"}, {"schedule": "wild"}, {"steps": 0}):
        with pytest.raises(ValidationError):
            TrainSettings(**wrong)
    with pytest.raises(ValidationError, match="keep_best"):
        TrainSettings(early_stopping=1, keep_best=False)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match="no GPU"):
        fit(bert(), tmp_path, precision="fp16")


def test_bf16_leaves_a_plain_model(tmp_path: Path) -> None:
    result = fit(bert(), tmp_path, precision="bf16", steps=3)
    assert "forward" not in vars(result.model) and not hasattr(result.model, "_original_forward")
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tuner", ["full", "ffn"])
def test_gradient_checkpointing_changes_nothing(tuner: str, tmp_path: Path) -> None:
    first = fit(bert(), tmp_path / "a", steps=3, tuner=tuner)
    second = fit(bert(), tmp_path / "b", steps=3, tuner=tuner, gradient_checkpointing=True)
    for (name, p), q in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert_close(q, p, rel=1e-4, what=name)


# Order of the data ---------------------------------------------------------------------------------------------------


def batches_seen(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[list[list[int]]]:
    seen: list[list[list[int]]] = []
    step = Loop.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "training_step", training_step)
        run()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_equal_seeds_see_the_same_batches(grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(make: Any, where: str, **more: Any) -> list[list[list[int]]]:
        return batches_seen(
            monkeypatch, lambda: fit(make(), tmp_path / where, group_by_length=grouped, epochs=3, **more)
        )

    first = run(bert, "a", seed=1)
    assert run(gpt2, "b", seed=1, tuner="lora") == first  # other numbers are drawn for dropout and adapters
    assert run(bert, "c", seed=2) != first
    assert sorted(map(len, first[:6])) == [4, 8, 8, 8, 8, 8] and first[:6] != first[6:12]


def test_grouping_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=2000)

    def waste(order: list[int]) -> int:
        groups = [lengths[order[i : i + 8]] for i in range(0, len(order), 8)]
        return sum(int((g.max() - g).sum()) for g in groups)

    grouped = GroupedSampler(lengths, 8, seed=0)
    order = list(grouped)
    assert sorted(order) == list(range(2000)) and list(grouped) == order
    assert waste(order) < 0.2 * waste(list(range(2000)))
    grouped.set_epoch(1)
    assert list(grouped) != order


# Resuming ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Run until the optimizer is about to take step ``step``."""
    original = Loop.training_step

    def training_step(self: Any, *args: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "training_step", training_step)
        with pytest.raises(Killed):
            run()


RUNS: dict[str, dict[str, Any]] = {
    "steps": {"eval_every": 4},
    "epochs": {"save_every": 3},
    "epochs saved at their ends": {"save_every": 2, "batch_size": 11},
    "grouped": {"eval_every": 4, "group_by_length": True},
    "accumulated": {"eval_every": 2, "accumulation": 2, "batch_size": 4},
    "last": {"eval_every": 4, "keep_best": False},
    "cosine, stopping early": {"eval_every": 2, "schedule": "cosine", "early_stopping": 3},
    "ffn": {"eval_every": 4, "tuner": "ffn"},
    "lora": {"eval_every": 4, "tuner": "lora"},
    "sparsegrad": {"tuner": {"name": "sparsegrad", "density": 0.1, "batches": 3}, "eval_every": 4},
    "sparsegrad-refresh": {
        "tuner": {"name": "sparsegrad", "selection": "refresh", "every": 5, "density": 0.1},
        "eval_every": 4,
        "accumulation": 2,
    },
    "sparsegrad-step": {
        "tuner": {"name": "sparsegrad", "selection": "step", "modules_to_train": ["norms"]},
        "eval_every": 4,
    },
    "meprop": {"tuner": {"name": "meprop", "density": 0.1}, "eval_every": 4},
    "dsee": {"tuner": {"name": "dsee", "rank": 2, "nonzeros": 5, "support": "gradient", "batches": 3}, "eval_every": 4},
    "dsee-coefficients": {
        "tuner": {"name": "dsee", "rank": 2, "nonzeros": 5, "coefficients": 0.3},
        "eval_every": 4,
        "accumulation": 2,
        "batch_size": 4,
    },
    "lora with norms": {"tuner": {"name": "lora", "rank": 2, "modules_to_train": ["norms"]}, "eval_every": 4},
    "bottleneck": {"tuner": {"name": "bottleneck", "size": 4}, "eval_every": 4},
    "prefix": {"tuner": {"name": "prefix", "tokens": 3}, "eval_every": 4},
    "bitfit": {"tuner": "bitfit", "eval_every": 4},
    "meprop-outputs": {"tuner": {"name": "meprop", "of": "outputs", "density": 0.2}, "eval_every": 4},
}


# What differs between these is which state comes back; of the tuners' runs each kind of state is in one that is fast.
QUICK = (
    "epochs saved at their ends", "accumulated", "sparsegrad-step", "dsee",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but(QUICK, sorted(RUNS)))
def test_a_kill_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"learning_rate": 0.01, "epochs": 3, **RUNS[name]}
    whole = fit(bert(), tmp_path / "whole", **more)
    for step in (6, 11):
        if step <= whole.steps:
            killed_at(step, monkeypatch, lambda: fit(bert(), tmp_path / "killed", **more))
    torch.rand(3)
    again = fit(bert(), tmp_path / "killed", **more)
    assert_same(again.model, whole.model)
    assert again.history == whole.history and again.best_step == whole.best_step and again.steps == whole.steps
    assert [e["loss"] for e in again.losses] == [e["loss"] for e in whole.losses]


@pytest.mark.slow
def test_the_state_of_the_generators_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with another state of torch's generator a resumed run ends elsewhere."""
    more = {"eval_every": 4, "keep_best": False}
    whole = fit(bert(), tmp_path / "whole", **more)
    killed_at(6, monkeypatch, lambda: fit(bert(), tmp_path / "killed", **more))
    path = tmp_path / "killed" / "checkpoint-4" / "rng_state.pth"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "cpu": torch.Generator().manual_seed(99).get_state()}, path)
    again = fit(bert(), tmp_path / "killed", **more)
    pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["vit", "mixtral", "t5", "phi3", "distilbert"])
def test_checkpoints_go_back_into_the_model(name: str, tmp_path: Path) -> None:
    """Some families are written under names of older layouts, which would be passed over on the way back."""
    model = FAMILIES[name].model()
    loop = Loop(model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    loop._save(str(tmp_path / "checkpoint-1"))
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    loop._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])] == []
    if name == "mixtral":
        model.save_pretrained(tmp_path / "checkpoint-2")  # the negative control
        with pytest.raises(FfnkitError, match="do not match"):
            loop._load_from_checkpoint(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("lost", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_a_half_written_checkpoint_is_skipped(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"eval_every": 3, "save_total_limit": None}
    whole = fit(bert(), tmp_path / "whole", **more)
    killed_at(8, monkeypatch, lambda: fit(bert(), tmp_path / "killed", **more))
    last = tmp_path / "killed" / "checkpoint-6"
    assert checkpoints.newest(tmp_path / "killed") == last
    content = (last / lost).read_bytes()
    (last / lost).write_bytes(content[: len(content) // 2])
    assert checkpoints.newest(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-3"
    assert_same(fit(bert(), tmp_path / "killed", **more).model, whole.model)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"eval_every": 4, "keep_checkpoints": True, "learning_rate": 0.02}
    whole = fit(bert(), tmp_path, **more)
    seen = batches_seen(monkeypatch, lambda: assert_same(fit(bert(), tmp_path, **more).model, whole.model))
    again = fit(bert(), tmp_path, **more)
    assert seen == [] and again.history == whole.history and again.seconds == pytest.approx(whole.seconds, rel=0.5)
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stopped_early_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"eval_every": 1, "early_stopping": 2, "learning_rate": 1e-12, "keep_checkpoints": True}
    fit(bert(), tmp_path, **more)
    assert batches_seen(monkeypatch, lambda: fit(bert(), tmp_path, **more)) == []


def test_a_moved_folder_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"eval_every": 2, "learning_rate": 0.05}
    whole = fit(bert(), tmp_path / "whole", **more)
    killed_at(8, monkeypatch, lambda: fit(bert(), tmp_path / "killed", **more))
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    assert_same(fit(bert(), tmp_path / "moved", **more).model, whole.model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-4}, "settings.learning_rate"),
        ({"seed": 3}, "seed"),
        ({"tuner": "ffn"}, "tuner.name"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    more = {"steps": 2, "keep_checkpoints": True}
    fit(bert(), tmp_path, **more)
    with pytest.raises(FfnkitError, match=f"differs in {named}"):
        fit(bert(), tmp_path, **{**more, **change})
    fit(bert(), tmp_path, **{**more, "eval_batch_size": 7, "logging_every": 1})  # no part of the outcome


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    more = {"steps": 2, "keep_checkpoints": True}
    fit(bert(), tmp_path, **more)
    other = bert()
    nn.init.normal_(other.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(FfnkitError, match="initial weights"):
        fit(other, tmp_path, **more)
    with pytest.raises(FfnkitError, match="differs in model"):
        fit(gpt2(), tmp_path, **more)


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FfnkitError, match="it is a file"):
        fit(bert(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_fused_model_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears with a factor kept apart go through the Trainer's checkpoints, the factor unchanged."""
    import ffnkit as fk

    def fused() -> nn.Module:
        model = bert()
        return fk.apply(model, fk.plan(model, fk.Fusion(width=0.25, layers="last:1")))

    more = {"eval_every": 3, "learning_rate": 0.01}
    scale = ffns(fused())[-1].linear("down").scale
    whole = fit(fused(), tmp_path / "whole", **more)
    killed_at(8, monkeypatch, lambda: fit(fused(), tmp_path / "killed", **more))
    again = fit(fused(), tmp_path / "killed", **more)
    assert_same(again.model, whole.model)
    assert torch.equal(ffns(again.model)[-1].linear("down").scale, scale) and scale.max() > 1


# Evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_evaluation_is_the_plain_loop(name: str) -> None:
    model = MODELS[name]().train()
    data = splits().dev
    found = evaluate(model, TOKENIZER, TASK, data, batch_size=7)
    assert model.training
    model.eval()
    losses, right = [], []
    for row in data:
        batch = TOKENIZER(row["text"], return_tensors="pt")
        with torch.no_grad():
            out = model(**batch, labels=torch.tensor([row["label"]]))
        losses.append(float(out.loss))
        right.append(int(out.logits.argmax()) == row["label"])
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_evaluation_keeps_the_order() -> None:
    class Order(WordTask):
        def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
            kept.append((predictions, labels))
            return {}

    kept: list[Any] = []
    model = bert()
    for size in (1, 64):
        evaluate(model, TOKENIZER, Order(), splits().dev, batch_size=size)
    (one, labels), (many, _) = kept
    assert list(labels) == list(splits().dev["label"])
    assert_close(torch.tensor(many), torch.tensor(one), rel=1e-5)
    assert_differs(torch.tensor(many[::-1].copy()), torch.tensor(one))


def test_evaluation_agrees_with_the_trainer(tmp_path: Path) -> None:
    result = fit(bert(), tmp_path, steps=4)
    found = evaluate(result.model, TOKENIZER, TASK, splits().dev, batch_size=4)
    assert found["loss"] == pytest.approx(result.history[-1]["loss"], rel=1e-4)


def test_the_seed_fixes_a_head() -> None:
    assert_same(bert(), bert())
    assert training.seed_everything is seed_everything


# Documentation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [TrainSettings, DistilSettings, tuners.Lora, tuners.SparseGrad, tuners.SparseMask, tuners.MeProp]
)
def test_every_setting_is_documented(kind: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text(encoding="utf-8")
    for name, field in kind.model_fields.items():
        default = describe.default({"default": field.get_default(call_default_factory=True)})
        row = f"| `{name}` | {default} | {field.description}"
        assert row in page, f"docs/tuning.md has no such row for {kind.__name__}.{name}: {row}"


def test_a_checkpoint_that_is_half_written_is_removed(tmp_path: Path) -> None:
    from ffnkit.tune.checkpoints import remove_broken

    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "other").mkdir()
    remove_broken(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_checkpoint_knows_the_seconds_so_far() -> None:
    from ffnkit.tune.loop import Clock

    clock = Clock()
    clock.seconds, clock.step_seconds = 7.0, 3.0
    assert clock.state()["attributes"] == {"seconds": 7.0, "step_seconds": 3.0}
