"""Texts compared by the cosine of their embeddings: numbers of two texts, triplets; losses, metrics, tuning."""

from __future__ import annotations

import copy
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_companions import cli, inside, sentences
from test_recipe_run import MOODS, THINGS, recipe_of, run, tiny
from torch.nn import functional as F

import ffnkit as fk
from ffnkit import tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.io.sentences import sentence_folder
from ffnkit.nn.comparing import SCALE, nearest, ordered
from ffnkit.tasks.running import forward_names

PAIRS = {"text": ("a", "b"), "label": "score", "head": "cosine"}
TRIPLETS = {"text": ("anchor", "near", "far"), "head": "cosine"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny(tmp_path_factory.mktemp("texts"))
    draw = np.random.default_rng(0)
    pairs, triplets = ["a,b,score"], ["anchor,near,far"]
    for _ in range(80):
        words = [" ".join(draw.choice(each, 3)) for each in (MOODS[:5], MOODS[5:], THINGS, THINGS)]
        alike = int(draw.integers(2))
        pairs.append(f"{words[0]} {words[2]},{words[1 - alike]} {words[3]},{[0, 5][alike]}")
        triplets.append(f"{words[0]} {words[2]},{words[0]} {words[3]},{words[1]} {words[3]}")
    (base / "pairs.csv").write_text("\n".join(pairs) + "\n")
    (base / "triplets.csv").write_text("\n".join(triplets) + "\n")
    return base


def chosen(source: Path, name: str, **fields: Any) -> Any:
    return tasks.choose(train=source / f"{name}.csv", **({"pairs": PAIRS, "triplets": TRIPLETS}[name] | fields))


def embedded(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Means over the tokens of each text, one text at a time."""
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return F.normalize(torch.stack([each.mean(0) for each in states]), dim=-1)


def test_losses_are_those_of_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    cosines, labels = torch.rand(5, generator=draw) * 2 - 1, torch.tensor([3.0, 1.0, 1.0, 0.0, 5.0])
    total = 1 + sum(
        math.exp(SCALE * float(cosines[i] - cosines[j])) for i in range(5) for j in range(5) if labels[i] < labels[j]
    )
    assert float(ordered(cosines, labels)) == pytest.approx(math.log(total), rel=1e-5)
    assert float(ordered(cosines, 7 * labels - 2)) == pytest.approx(math.log(total), rel=1e-5)  # any range
    assert float(ordered(cosines, torch.ones(5))) == 0.0
    rows = F.normalize(torch.randn(4, 3, 6, generator=draw), dim=-1)
    for among in (False, True):
        losses = []
        for row in rows:
            others = [*rows[:, 1], *rows[:, 2]] if among else [row[1], row[2]]
            scores = [math.exp(SCALE * float(row[0] @ other)) for other in others]
            losses.append(math.log(sum(scores)) - SCALE * float(row[0] @ row[1]))
        assert float(nearest(rows, among=among)) == pytest.approx(sum(losses) / 4, rel=1e-4, abs=1e-5)


def test_the_model_stays_what_it_is(source: Path, tmp_path: Path) -> None:
    task = chosen(source, "pairs")
    tokenizer = task.load_tokenizer(source / "model")
    model = task.load_model(source / "model", tokenizer=tokenizer)
    assert type(model).__name__ == "BertModel" and {"labels", "input_ids", "attention_mask"} <= forward_names(model)
    batch = {name: value for name, value in tokenizer(["good film", "bad plot"], return_tensors="pt").items()}
    plain = fk.load(source / "model")
    torch.testing.assert_close(model(**batch).last_hidden_state, plain(**batch).last_hidden_state, rtol=0, atol=0)
    assert model(**tokenizer("good film", return_tensors="pt")).logits is None  # one text is compared with nothing
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert set(model.state_dict()) == set(plain.state_dict())
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.save(model, tmp_path / "small")
    fk.export(model, tmp_path / "standard")
    for name in ("small", "standard"):
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["BertModel"]
    assert "labels" not in inspect.signature(type(fk.load(tmp_path / "small")).forward).parameters


@pytest.mark.parametrize("name", ["pairs", "triplets"])
def test_metrics_are_those_of_a_plain_loop(source: Path, name: str) -> None:
    task = chosen(source, name)
    tokenizer = task.load_tokenizer(source / "model")
    model = task.load_model(source / "model", tokenizer=tokenizer)
    rows = task.splits(seed=0).train
    found = task.evaluate(model, tokenizer, rows, batch_size=7)
    texts = [embedded(fk.load(source / "model"), tokenizer, rows[column]) for column in task.text]
    if name == "pairs":
        cosines = (texts[0] * texts[1]).sum(-1)
        assert found.metrics["spearman"] == pytest.approx(spearmanr(cosines, rows["score"]).statistic, abs=1e-4)
        assert set(found.metrics) == {"pearson", "spearman"} and task.main_metric == "pearson"
    else:
        right = (texts[0] * texts[1]).sum(-1) > (texts[0] * texts[2]).sum(-1)
        assert found.metrics == {"accuracy": pytest.approx(float(right.float().mean()))}


@pytest.mark.parametrize(
    ("name", "tuner"),
    [
        ("triplets", {"name": "sparsegrad"}),
        pytest.param("pairs", {"name": "full"}, marks=pytest.mark.slow),
        pytest.param("pairs", {"name": "lora"}, marks=pytest.mark.slow),
        pytest.param("triplets", {"name": "dsee"}, marks=pytest.mark.slow),
        pytest.param("triplets", {"name": "lora"}, marks=pytest.mark.slow),
    ],
)
def test_tuning_learns(source: Path, tmp_path: Path, name: str, tuner: dict[str, Any]) -> None:
    task = chosen(source, name)
    tokenizer, splits = task.load_tokenizer(source / "model"), task.splits(seed=0)
    tune.seed_everything(0)
    model = task.load_model(source / "model", tokenizer=tokenizer)
    before = task.evaluate(model, tokenizer, splits.dev)
    settings = tune.TrainSettings(
        steps=12, batch_size=16, max_length=16, learning_rate=5e-3, eval_every=6, device="cpu"
    )
    result = tune.train(model, tokenizer, task, splits, settings, tuner=tuner, out_dir=tmp_path / "run", progress=False)
    after = task.evaluate(result.model, tokenizer, splits.dev)
    assert after.loss < 0.999 * before.loss, (before, after)
    assert type(result.model).__name__ == "BertModel"


@pytest.mark.slow
def test_a_sentence_folder_is_tuned_and_judged(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    whole = sentences(source / "model", tmp_path / "st")
    columns = ("--text-column", "a", "--text-column", "b", "--label-column", "score", "--head", "cosine")
    steps = ("--steps", 2, "--batch-size", 8, "--max-length", 16)
    cli(
        "compress", whole, "--method", "fusion", "--set", "width=0.5", "--cost-tokens", "0", "--out", tmp_path / "small"
    )
    cli("tune", tmp_path / "small", "--train-file", source / "pairs.csv", *columns, *steps, "--out", tmp_path / "tuned")
    assert {"modules.json", "2_Dense/model.safetensors"} <= inside(tmp_path / "tuned")
    cli("eval", tmp_path / "tuned", "--validation-file", source / "pairs.csv", *columns)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_figures_and_losses_are_the_library_s(source: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, TripletEvaluator

    lively = fk.load(source / "model")  # as it is drawn, all its texts are nearly one
    for number, weight in enumerate(p for p in lively.parameters() if p.ndim > 1):
        torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(number))
    fk.save(lively, tmp_path / "lively")
    whole = sentences(tmp_path / "lively", tmp_path / "st")
    opened = library.SentenceTransformer(str(whole), device="cpu")
    for name, loss_of in (("pairs", losses.CoSENTLoss), ("triplets", losses.MultipleNegativesRankingLoss)):
        task = chosen(source, name)
        tokenizer = task.load_tokenizer(whole)
        model = task.load_model(whole, tokenizer=tokenizer)
        rows = task.splits(seed=0).train
        texts = [rows[column] for column in task.text]
        found = task.evaluate(model, tokenizer, rows, max_length=12).metrics
        if name == "pairs":
            told = EmbeddingSimilarityEvaluator(*texts, rows["score"], name="own")(opened)
            assert found["spearman"] == pytest.approx(told["own_spearman_cosine"], abs=1e-5)
        else:
            told = TripletEvaluator(*texts, name="own")(opened)
            assert found["accuracy"] == pytest.approx(told["own_cosine_accuracy"])
        few = rows.select(range(6))
        batch = task.collator(tokenizer)(list(task.encode(few, tokenizer, 12)))
        model.train()
        for module in (*model.modules(), *opened.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        opened.train()
        features = [opened.preprocess(few[column]) for column in task.text]
        labels = torch.tensor(few["score"]) if name == "pairs" else torch.zeros(6)
        assert float(model(**batch).loss) == pytest.approx(float(loss_of(opened)(features, labels)), rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "triplets"])
def test_a_recipe(source: Path, tmp_path: Path, name: str) -> None:
    fields = {"pairs": PAIRS, "triplets": TRIPLETS}[name]
    task = {"train": str(source / f"{name}.csv"), **{key: list(v) if key == "text" else v for key, v in fields.items()}}
    results = run(recipe_of(source, task=task, stages=["compress", "tune", "evaluate", "export"]), tmp_path / "out")
    assert results.ok, results.failed
    for row in results.rows:
        assert set(row["metrics"]) == ({"pearson", "spearman"} if name == "pairs" else {"accuracy"})
    (out,) = (tmp_path / "out").glob("units/half/seed-0/compact")
    assert type(fk.load(out)).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text": ("anchor", "near", "far")}, "label"),
        ({"text": ("anchor", "near", "far"), "head": "cosine", "metric": "f1"}, "triplets have no labels"),
        ({"text": ("anchor", "near", "missing"), "head": "cosine"}, "no column 'missing'"),
        ({"text": ("anchor", "near", "near"), "head": "cosine"}, "three columns"),
        ({"text": ("anchor",), "label": "near", "head": "cosine"}, "number"),
    ],
)
def test_what_does_not_go_together(source: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(FfnkitError, match=told):
        tasks.choose(train=source / "triplets.csv", **fields)


def test_of_a_known_task() -> None:
    task = tasks.choose(name="stsb", head="cosine")
    assert task.text == ("sentence1", "sentence2") and task.pipeline_tag == "sentence-similarity"
    with pytest.raises(FfnkitError, match="two texts and a number"):
        tasks.choose(name="sst2", head="cosine")


@pytest.mark.parametrize(
    ("path", "files", "told"),
    [
        ("parts/0_Transformer", ["parts/0_Transformer"], ""),
        ("sentence-transformers/all-MiniLM-L6-v2", [], "names sentence-transformers/all-MiniLM-L6-v2, and the folder"),
        (
            "0_Router",
            ["0_Router/query_0", "0_Router/document_0"],
            "of a module: 0_Router/document_0, 0_Router/que",
        ),
    ],
)
def test_where_the_transformer_of_a_folder_lies(tmp_path: Path, path: str, files: list[str], told: str) -> None:
    """In a folder of its own, however deep; under a name of the hub, or inside of a router, it is told in one line."""
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": "sentence_transformers.models.Any"}]))
    for folder in files:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    if told:
        with pytest.raises(FfnkitError, match=told) as caught:
            sentence_folder(tmp_path)
        assert "\n" not in str(caught.value)
    else:
        found = sentence_folder(tmp_path)
        assert found is not None and found.transformer == path
