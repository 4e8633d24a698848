"""Distillation by answers, end to end: what trains, resuming, heads, unlabelled text, commands and recipes."""

# ruff: noqa: F811
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from test_cli import COLUMNS, WORDS, bad, bert, good, table, verbosity  # noqa: F401  (fixtures)
from test_distil import Dying, Killed, batches, noisy
from tolerance import assert_close
from torch import nn

from ffnkit.errors import FfnkitError
from ffnkit.io.loading import newly_initialized
from ffnkit.model.finding import ffns
from ffnkit.tasks import get
from ffnkit.tune import DistilSettings, distil, distil_examples, text_examples
from ffnkit.tune.distil_state import FILE

HOT = {"learning_rate": 0.01, "steps": 25, "temperature": 2.0}


def labelled(name: str, model: nn.Module, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches with labels for the model's head."""
    found = batches(name, model, count)
    for seed, batch in enumerate(found):
        generator = torch.Generator().manual_seed(seed)
        if name in ("bert", "distilbert"):
            batch["labels"] = torch.randint(2, (len(batch["input_ids"]),), generator=generator)
        else:
            size = (2, 5) if name in ("t5", "switch") else tuple(batch["input_ids"].shape)
            batch["labels"] = torch.randint(5, 90, size, generator=generator)
            for key in [key for key in batch if key.startswith("decoder_")]:
                del batch[key]
    return found


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral", "switch"])
@pytest.mark.parametrize("objective", ["logits", "both"])
def test_the_loss_falls_and_only_ffns_change(name: str, objective: str) -> None:
    teacher = FAMILIES[name].model()
    student = noisy(teacher)
    before = copy.deepcopy(student.state_dict())
    weight = 0.1 if objective == "both" else 0.0
    settings = DistilSettings(objective=objective, hard_weight=weight, logits_weight=5, **HOT)
    result = distil(student, teacher, labelled(name, teacher), settings, progress=False)
    assert result.last_loss < 0.8 * result.first_loss
    wanted = {"logits": {"logits"}, "both": {"layers", "logits", "hard"}}[objective]
    assert set(result.parts) == wanted and all(len(values) == 25 for values in result.parts.values())
    assert set(result.log[0]) == {"step", "loss", "learning_rate", *wanted}
    assert "parts" not in result.to_dict()
    claimed = {id(p) for ffn in ffns(student) for p in ffn.parameters()}
    names = {n for n, p in student.named_parameters(remove_duplicate=False) if id(p) in claimed}
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and changed <= names


def test_the_logged_parts_make_the_loss() -> None:
    teacher = FAMILIES["bert"].model()
    settings = DistilSettings(objective="both", hard_weight=0.25, layers_weight=0.5, logits_weight=3, **HOT)
    result = distil(noisy(teacher), teacher, labelled("bert", teacher), settings, progress=False)
    layers, logits, hard = (torch.tensor(result.parts[name]) for name in ("layers", "logits", "hard"))
    assert_close(torch.tensor(result.losses), 0.5 * layers + 3 * (0.75 * logits + 0.25 * hard), rel=1e-5)
    assert_close(torch.tensor(result.log[1]["hard"]), hard[10:20].mean(), rel=1e-5)


def test_all_trains_everything_that_has_a_gradient() -> None:
    teacher = FAMILIES["bert"].model()
    student = noisy(teacher)
    frozen = student.get_parameter("bert.embeddings.position_embeddings.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    settings = DistilSettings(objective="logits", trains="all", **HOT)
    result = distil(student, teacher, labelled("bert", teacher), settings, progress=False)
    same = {name for name, p in student.named_parameters() if torch.equal(p, before[name])}
    assert same == {"bert.embeddings.position_embeddings.weight"} and not frozen.requires_grad
    assert result.trainable_parameters == sum(p.numel() for p in student.parameters()) - frozen.numel()
    with pytest.raises(FfnkitError, match="Leave out the names"):
        distil(student, teacher, [], settings, names=[ffns(student)[0].name], progress=False)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(FfnkitError, match="no parameter"):
        distil(student, teacher, labelled("bert", teacher), settings, progress=False)


@pytest.mark.parametrize("name", ["bert", "switch"])
@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_kill_changes_nothing(tmp_path: Path, name: str, after: int) -> None:
    """Parameters without a gradient at first (of an expert that no token meets, of a head) resume too."""
    teacher = FAMILIES[name].model()
    data = labelled(name, teacher, 5)
    more = {"learning_rate": 0.01, "epochs": 2, "save_every": 3, "warmup": 0.2, "trains": "all", "hard_weight": 0.5}
    settings = DistilSettings(objective="both", **more)
    straight, resumed = noisy(teacher), noisy(teacher)
    whole = distil(straight, teacher, data, settings, progress=False)
    with pytest.raises(Killed):
        distil(noisy(teacher), teacher, Dying(data, after), settings, out_dir=tmp_path, progress=False)
    again = distil(resumed, teacher, data, settings, out_dir=tmp_path, progress=False)
    assert (again.losses, again.parts, again.log) == (whole.losses, whole.parts, whole.log)
    for (key, p), q in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q), key


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1.0}, {"hard_weight": 0.5}, {"objective": "both"}, {"trains": "all"}, {"text": "other.txt"}],
)
def test_states_with_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    teacher = FAMILIES["bert"].model()
    data, base = labelled("bert", teacher), {"objective": "logits", "steps": 1}
    distil(noisy(teacher), teacher, data, DistilSettings(**base), out_dir=tmp_path, progress=False)
    with pytest.raises(FfnkitError, match="differs in settings"):
        distil(noisy(teacher), teacher, data, DistilSettings(**{**base, **changes}), out_dir=tmp_path, progress=False)
    assert (tmp_path / FILE).exists()
    harmless = DistilSettings(**base, save_every=7)
    distil(noisy(teacher), teacher, data, harmless, out_dir=tmp_path, progress=False)


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def body(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without its head."""
    folder = tmp_path_factory.mktemp("models") / "body"
    transformers.BertModel.from_pretrained(bert).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    task = get("sst2")
    return task.load_model(folder, tokenizer=task.load_tokenizer(folder))


def short(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 15, (4, 6), generator=torch.Generator().manual_seed(1))}]


def test_drawn_heads_are_known_until_they_change(bert: Path, body: Path) -> None:
    assert newly_initialized(opened(bert)) == ()
    model = opened(body)
    assert newly_initialized(model) == ("classifier.weight", "classifier.bias")
    assert newly_initialized(copy.deepcopy(model).bfloat16()) == ("classifier.weight", "classifier.bias")
    with torch.no_grad():
        model.classifier.bias += 1
    assert newly_initialized(model) == ()


def test_a_teacher_without_a_head_is_refused(bert: Path, body: Path) -> None:
    teacher = opened(body)
    student = noisy(teacher)
    with pytest.raises(FfnkitError, match=r"freshly drawn \(classifier.weight.*Tune the teacher first"):
        distil(student, teacher, short(teacher), DistilSettings(objective="both", steps=1), progress=False)
    distil(student, teacher, short(teacher), DistilSettings(steps=1), progress=False)  # hidden states need no head
    with torch.no_grad():
        teacher.classifier.weight += 1  # as tuning does
    distil(student, teacher, short(teacher), DistilSettings(objective="both", steps=1), progress=False)


def test_a_drawn_head_takes_the_teachers(bert: Path, body: Path) -> None:
    teacher, student = opened(bert), opened(body)
    named = [ffns(student)[0].name]
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)
    own = student.classifier.weight.clone()
    first = distil(student, teacher, short(teacher), DistilSettings(steps=1), names=named, progress=False)
    assert first.head == () and torch.equal(student.classifier.weight, own)
    answers = DistilSettings(objective="logits", steps=1)
    result = distil(student, teacher, short(teacher), answers, names=named, progress=False)
    assert result.head == ("classifier.weight", "classifier.bias")
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    with torch.no_grad():
        student.classifier.weight += 1
    again = distil(student, teacher, short(teacher), answers, names=named, progress=False)
    assert again.head == () and not torch.equal(student.classifier.weight, teacher.classifier.weight)
    alone = transformers.BertModel.from_pretrained(bert)
    with pytest.raises(FfnkitError, match="the teacher has none of its shape"):
        distil(opened(body), alone, short(teacher), answers, names=named, progress=False)


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(bert: Path) -> Any:
    return get("sst2").load_tokenizer(bert)


TEXTS = ["good film " * 20, " ", "bad meal", "awful"]


def test_encoders_read_every_piece_of_a_text(tokenizer: Any) -> None:
    model = FAMILIES["bert"].model()
    examples, collate = text_examples(TEXTS, tokenizer, model, 10)
    assert max(len(row["input_ids"]) for row in examples) == 10
    words = [i for row in examples for i in row["input_ids"] if i not in tokenizer.all_special_ids]
    assert words == [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    batch = collate(list(examples))
    assert batch["attention_mask"].sum() == sum(len(row["input_ids"]) for row in examples)
    assert "labels" not in batch and batch["attention_mask"].sum() < batch["input_ids"].numel()


@pytest.mark.parametrize("name", ["llama", "t5", "switch"])
def test_models_that_write_read_blocks(tokenizer: Any, name: str) -> None:
    model, marked = FAMILIES[name].model(), copy.deepcopy(tokenizer)
    marked.eos_token = "[SEP]"
    examples, collate = text_examples(TEXTS, marked, model, 12)
    batch = collate(list(examples))
    flat = [i for row in examples for i in row["input_ids"]]
    words = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if name == "llama":
        assert {len(row["input_ids"]) for row in list(examples)[:-1]} == {12}
        assert [i for i in flat if i not in tokenizer.all_special_ids] == words
    targets = batch["labels"][batch["labels"] != -100]
    assert len(targets) >= len(words) // 2 if name != "llama" else len(targets) == len(flat)
    settings = DistilSettings(objective="both", hard_weight=0.5, steps=10, batch_size=4, learning_rate=0.01)
    result = distil(noisy(model), model, examples, settings, collate=collate, progress=False)
    assert result.last_loss < result.first_loss


def test_files_of_text(tokenizer: Any, tmp_path: Path) -> None:
    plain, lines = tmp_path / "some.txt", tmp_path / "some.jsonl"
    plain.write_text("good film\n\nbad meal\n")
    lines.write_text('{"words": "good film"}\n{"words": "bad meal"}\n')
    model = FAMILIES["bert"].model()
    first, _ = distil_examples(model, tokenizer, DistilSettings(text=str(plain)))
    second, _ = distil_examples(model, tokenizer, DistilSettings(text=str(lines), text_column="words"))
    assert list(first) == list(second) and len(first) == 2
    with pytest.raises(FfnkitError, match="no column"):
        distil_examples(model, tokenizer, DistilSettings(text=str(lines)))
    with pytest.raises(FfnkitError, match="has no labels for a Bert"):
        distil_examples(model, tokenizer, DistilSettings(text=str(plain), objective="logits", hard_weight=0.1))
    with pytest.raises(FfnkitError, match="Set text to a file"):
        distil_examples(model, tokenizer, DistilSettings())


def test_text_that_cannot_be_used(tokenizer: Any) -> None:
    model = FAMILIES["bert"].model()
    with pytest.raises(FfnkitError, match="not blank"):
        text_examples([" ", "\n"], tokenizer, model)
    with pytest.raises(FfnkitError, match="no room"):
        text_examples(TEXTS, tokenizer, model, 2)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(FfnkitError, match="padding"):
        text_examples(TEXTS, bare, model)


# The command line ----------------------------------------------------------------------------------------------------

DISTIL = ("--distil-set", "steps=3", "--distil-set", "batch_size=8")
BOTH = ("--distil-set", "objective=both", *DISTIL)


def tune_words(table: Path, out: Path) -> tuple[object, ...]:
    return ("--train-file", table, *COLUMNS, "--steps", 2, "--batch-size", 8, "--out", out)


@pytest.fixture(scope="module")
def tuned(body: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tuned"
    good("tune", body, *tune_words(table, folder), "--quiet")
    return folder


def test_tune_the_teacher_first_then_distil_from_it(body: Path, tuned: Path, table: Path, tmp_path: Path) -> None:
    good("compress", body, "--method", "fusion", "--set", "width=0.5", "--out", tmp_path / "small")
    result = good("tune", tmp_path / "small", *tune_words(table, tmp_path / "out"), "--distil-from", tuned, *BOTH)
    assert "the new head starts as the teacher's" in result.stderr
    assert "layers " in result.stderr and "logits " in result.stderr and " -> " in result.stderr
    line = bad("tune", tmp_path / "small", *tune_words(table, tmp_path / "no"), "--distil-from", body, *BOTH, "--quiet")
    assert "no trained head" in line and "Tune it on this task first" in line and not (tmp_path / "no").exists()
    words = (*tune_words(table, tmp_path / "layers"), "--distil-from", body, *DISTIL, "--quiet")
    good("tune", tmp_path / "small", *words)  # the hidden states need no head


def test_distil_on_unlabelled_text(bert: Path, tuned: Path, table: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("\n\n".join(f"{a} {b}" for a in WORDS for b in WORDS))
    words = ("tune", bert, *tune_words(table, tmp_path / "out"), "--distil-set", "trains=all", *BOTH)
    report = good(*words, "--distil-from", tuned, "--distil-text", text, "--json", "--quiet")
    seen = json.loads(report.stdout)
    assert seen["distil"]["text"] == str(text) and seen["distil"]["objective"] == "both" and "distil_files" not in seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--distil-text", "x.txt"], "--distil-from"),
        (["--distil-from", "BODY", "--distil-text", "no-such.txt"], "no-such.txt"),
        (["--distil-from", "BODY", "--distil-text", "a.txt", "--distil-set", "text=b.txt"], "Give one of the two"),
        (["--distil-from", "BODY", "--distil-set", "teacher=x"], "--distil-from"),
        (["--distil-from", "BODY", "--distil-set", "objective=head"], "objective"),
        (["--distil-from", "BODY", "--distil-set", "hard_weight=0.5"], "objective"),
    ],
)
def test_wrong_words_are_refused(body: Path, table: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    words = [str(body) if word == "BODY" else word for word in words]
    assert expected in bad("tune", body, *tune_words(table, tmp_path / "out"), *words, "--quiet")


# Recipes -------------------------------------------------------------------------------------------------------------


def test_recipes_distil_answers_from_a_tuned_teacher_on_text(
    body: Path,
    tuned: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    from ffnkit.recipe import run as run_recipe
    from ffnkit.recipe.schema import recipe_from

    text = tmp_path / "some.txt"
    text.write_text("\n\n".join(f"{a} {b}" for a in WORDS for b in WORDS))
    data: dict[str, Any] = {
        "name": "answers",
        "model": str(body),
        "task": {"train": str(table), "text": "text", "label": "liked"},
        "stages": ["compress", "distil", "evaluate"],
        "arms": {"half": {"method": "fusion", "width": 0.5}},
        "distil": {"objective": "both", "steps": 3, "batch_size": 8, "teacher": str(tuned), "text": str(text)},
        "export": "none",
        "measure": {"latency": False},
    }

    def run(out: str, **changes: Any) -> Any:
        distil = {**data["distil"], **changes}
        recipe = recipe_from({**data, "distil": {key: value for key, value in distil.items() if value is not None}})
        return run_recipe(recipe, tmp_path / out, progress=False, isolate=False)

    assert run("out").ok
    mark = json.loads(next((tmp_path / "out").glob("units/*/*/distil.json")).read_text())
    assert set(mark["parts"]) == {"layers", "logits"}
    with pytest.raises(FfnkitError, match="no trained head"):
        run("no-head", teacher=None)
    with pytest.raises(FfnkitError, match="no such file"):
        run("no-text", text="no-such.txt")
    text.write_text("good film\n\nbad meal\n")
    with pytest.raises(FfnkitError, match="distil.text was"):  # other text under the same name
        run("out")
