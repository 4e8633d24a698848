"""Files that hold many recipes: cells of models and tasks, small variants, and running them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from methods import case_of
from test_recipe_run import folder, recipe_of  # noqa: F401 (a fixture)
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import ffnkit as fk
from ffnkit import methods
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.targets import targets
from ffnkit.nn.adapter_layer import adapter_layers
from ffnkit.recipe import Recipe, Table, load_any, load_recipe, run, run_table, shipped
from ffnkit.recipe.loading import parse_any
from ffnkit.recipe.schema import recipe_from
from ffnkit.recipe.sources import tuner_of
from ffnkit.recipe.tables import merged
from ffnkit.tune.tuners import prepare

TABLE = """
name: two by two
notes: as it should be
models: {small: quickstart, other: {model: ./other, tune: {batch_size: 8}}}
tasks: [cola, mrpc]
arms:
  full: {}
  head: {tuner: head, tune: {learning_rate: 1.0e-3}}
tune: {epochs: 2, learning_rate: 1.0e-4, batch_size: 32}
stages: [tune, evaluate]
export: none
cells:
  other/mrpc: {tune: {learning_rate: 2.0e-4}, arms: {head: null}}
small:
  models: [quickstart]
  limits: {dev: 50}
  tune: {steps: 3}
"""


def table(text: str = TABLE, **how: Any) -> Table:
    found = parse_any(text, "t.yaml", **how)
    assert isinstance(found, Table)
    return found


def test_a_cell_is_the_common_fields_with_its_own_in_their_place() -> None:
    found = table()
    assert list(found.cells) == ["small/cola", "small/mrpc", "other/cola", "other/mrpc"]
    cells = {name: (r.model, r.task.name, r.tune.batch_size, r.tune.learning_rate) for name, r in found.cells.items()}
    assert cells == {
        "small/cola": ("quickstart", "cola", 32, 1e-4),
        "small/mrpc": ("quickstart", "mrpc", 32, 1e-4),
        "other/cola": ("./other", "cola", 8, 1e-4),
        "other/mrpc": ("./other", "mrpc", 8, 2e-4),
    }
    assert list(found.cells["small/mrpc"].arms) == ["full", "head"] and list(found.cells["other/mrpc"].arms) == ["full"]
    assert found.cells["small/cola"].name == "two by two: small/cola" and found.notes == "as it should be"


def test_the_small_variant_stands_in_the_place_of_what_it_names() -> None:
    found = table(small=True)
    assert list(found.cells) == ["quickstart/cola", "quickstart/mrpc"]
    assert list(found.cells["quickstart/mrpc"].arms) == ["full", "head"]  # what cells say is of the large variant
    recipe = found.cells["quickstart/cola"]
    assert (recipe.tune.steps, recipe.tune.learning_rate, recipe.limits.dev) == (3, 1e-4, 50)
    assert table().cells["small/cola"].tune.steps is None  # the control: only when it is asked for


def test_one_axis_is_enough_and_a_recipe_may_have_a_small_variant(tmp_path: Path) -> None:
    one = table("name: t\nmodel: quickstart\ntasks: {a: cola, b: {task: rte, seeds: [3]}}\narms: {full: {}}\n")
    assert {name: (r.task.name, r.seeds) for name, r in one.cells.items()} == {"a": ("cola", (0,)), "b": ("rte", (3,))}
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: quickstart\ntask: cola\narms: {full: {}}\nsmall: {seeds: [7], task: rte}\n")
    assert load_recipe(path).seeds == (0,)
    small = load_any(path, small=True)
    assert not isinstance(small, Table) and (small.seeds, small.task.name) == ((7,), "rte")


def test_merging_goes_field_by_field_and_null_takes_out() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": None, "e": {"f": 5}}) == {
        "a": {"b": 4, "c": 2},
        "e": {"f": 5},
    }
    assert merged({"a": 1}, {"b": None}) == {"a": 1, "b": None}  # an arm without settings


def test_cells_are_chosen_by_pattern() -> None:
    assert list(table().only(["small/*", "other/mrpc"]).cells) == ["small/cola", "small/mrpc", "other/mrpc"]
    with pytest.raises(FfnkitError, match="--only huge.*small/cola"):
        table().only(["huge"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tasks: [cola, mrpc]", "tasks: []", "t.yaml: tasks: it is empty"),
        ("tasks: [cola, mrpc]", "tasks: [nosuch, mrpc]", r"\(small/nosuch\).*nosuch"),
        ("tasks: [cola, mrpc]", "tasks: 3", "t.yaml: tasks: it is 3"),
        ("tasks: [cola, mrpc]", "tasks: {a/b: cola}", "tasks.a/b: a name becomes a folder"),
        ("other/mrpc:", "other/rte:", "cells.other/rte: there is no such cell"),
        ("batch_size: 8", "batchsize: 8", r"\(other/cola\).*batchsize"),
        ("small:\n  models: [quickstart]\n  limits: {dev: 50}\n  tune: {steps: 3}", "small: 3", "small: it is 3"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(old: str, new: str, expected: str) -> None:
    assert old in TABLE
    with pytest.raises(FfnkitError, match=expected) as error:
        table(TABLE.replace(old, new))
    assert "\n" not in str(error.value)


def test_a_table_is_no_recipe_and_a_file_without_a_small_variant_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TABLE)
    with pytest.raises(FfnkitError, match="it is a table of 4 recipes"):
        load_recipe(path)
    path.write_text("name: r\nmodel: quickstart\ntask: cola\narms: {full: {}}\n")
    with pytest.raises(FfnkitError, match="no small variant"):
        load_any(path, small=True)


@pytest.mark.slow
def test_a_cell_that_cannot_run_leaves_the_others_alone(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(10)]
    bert, table_file = tmp_path / "bert", tmp_path / "train.csv"
    case_of("bert").model().save_pretrained(bert)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(bert)
    rows = [f"{a} {b},{'yes' if a < b else 'no'}" for a in words[:6] for b in words]
    table_file.write_text("text,liked\n" + "\n".join(rows) + "\n")
    text = (
        f"name: t\nmodels: {{tiny: {bert}, missing: {tmp_path / 'none'}}}\n"
        f"task: {{train: {table_file}, text: text, label: liked}}\narms: {{head: {{tuner: head}}}}\n"
        "stages: [tune, evaluate]\nexport: none\nmeasure: {latency: false}\ntune: {steps: 2, batch_size: 8}\n"
    )
    found = run_table(table(text), tmp_path / "out", progress=False, isolate=False)
    assert isinstance(found["missing"], FfnkitError) and not (tmp_path / "out" / "missing").exists()
    results = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    assert [row["status"] for row in results["rows"]] == ["done"]
    both = text.replace("models: {", "tasks: {one: {}, two: {}}\nmodels: {")
    whole = run_table(table(both), tmp_path / "both", progress=False, isolate=False)
    assert [name for name, each in whole.items() if isinstance(each, FfnkitError)] == ["missing/one", "missing/two"]
    assert (tmp_path / "both" / "tiny" / "table.md").is_file() and not (tmp_path / "both" / "missing").exists()
    again = run_table(table(text), tmp_path / "out", progress=False, isolate=False)
    assert again["tiny"].rows[0]["metrics"] == results["rows"][0]["metrics"]  # type: ignore[union-attr]


PAPERS = sorted((shipped.FOLDER / "papers").glob("*.yaml"))


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_recipe_of_the_papers_resolves(path: Path, small: bool) -> None:
    found = load_any(path, small=small)
    assert isinstance(found, Table) and found.cells
    for recipe in found.cells.values():
        assert len(recipe.arms) > 1
        for arm in recipe.arms:
            recipe.tune_of(arm), recipe.recover_of(arm), recipe.tuner_of(arm)


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_on_oasst1_every_arm_trains_ffn_weights_alone(small: bool) -> None:
    """As its notes say: what a preset of GLUE trains besides is not in it."""
    path = next(path for path in PAPERS if path.stem == "sparsegrad_oasst1")
    recipe = next(iter(load_any(path, small=small).cells.values()))  # type: ignore[union-attr]
    model = FAMILIES["llama"].model()
    ffn = {f"{each.name}.{each.path(site)}" for each in ffns(model) for site in each.sites}
    for name in recipe.arms:
        tuner = tuner_of(recipe, name)
        given = {"targets": "ffn"} if hasattr(tuner, "targets") else {}
        given |= {"count": 3, "basis": "none"} if tuner.name == "sparsegrad" else {}
        done = prepare(FAMILIES["llama"].model(), tuner.model_copy(update=given))
        trained = [n for n, p in done.named_parameters() if p.requires_grad]
        assert trained and all(any(place in n for place in ffn) for n in trained), (name, trained)


@cache
def prunes(rank: int, targets: str, method: str, settings: str) -> None:
    """Plan a method on a small model with DSEE's updates: what many arms share is tried once."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    fk.apply(model, fk.plan(model, fk.DSEE(rank=rank, nonzeros=3, targets=targets, support="random")))
    for layer in adapter_layers(model).values():
        layer.values.data.fill_(0.1)  # type: ignore[union-attr,operator]
    fk.plan(model, methods.build(method, **json.loads(settings)), [{"input_ids": torch.arange(24).view(2, 12)}])


RECIPES = sorted(shipped.FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_prunes_by_updates_finds_them(path: Path) -> None:
    """Of every recipe that ships: what an arm prunes by is there behind its tuning, not told after hours of it."""
    found = load_any(path)
    recipes = list(found.cells.values())[:1] if isinstance(found, Table) else [found]
    for recipe in recipes:
        for name, arm in recipe.arms.items():
            wanted = [spec for spec in arm.prune if "update" in spec.settings.values()]
            tuner = tuner_of(recipe, name)
            if not wanted or tuner.name != "dsee":
                continue
            for spec in wanted:
                prunes(min(tuner.rank, 2), tuner.targets, spec.method, json.dumps(spec.settings))


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_expressions_over_names_find_linears(small: bool) -> None:
    """Those of the papers' recipes, in a LLaMA as deep as the largest of them."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5 if small else 32, **sizes))
    seen = 0
    for path in PAPERS:
        recipe = next(iter(load_any(path, small=small).cells.values()))  # type: ignore[union-attr]
        for name in recipe.arms:
            asked = getattr(tuner_of(recipe, name), "targets", "all")
            if asked not in ("all", "ffn", "attention", "qv"):
                seen += 1
                assert len(targets(model, asked)[0]) == (4 if small else 22)
    assert seen == 2


@pytest.mark.parametrize("tuner", ["lora", "dsee", "sparsegrad", "meprop"])
def test_a_tuner_that_finds_nothing_is_told_before_anything_is_trained(
    tuner: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    arms = {"first": {}, "odd": {"tuner": {"name": tuner, "targets": r"encoder\.layer\.0\.output"}}}
    with pytest.raises(FfnkitError, match=r"arms\.odd\.tuner: targets .*: no linear of the model matches"):
        run(recipe_of(folder, arms=arms), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "units" / "first").exists()


SHORT = {"steps": 2, "eval_every": 1, "early_stopping": None}


def shortened(recipe: Recipe) -> Recipe:
    """The same recipe with a few rows and steps, one seed."""
    data = recipe.to_dict()
    data |= {"seeds": data["seeds"][:1], "limits": {"train": 64, "dev": 16, "report": 16}}
    for part in (data, *data["arms"].values()):
        for stage in ("tune", "recover", "distil"):
            if isinstance(part.get(stage), dict):
                part[stage] = {**part[stage], **(SHORT if stage != "distil" else {"steps": 2})}
    data["calibration"] = {**data["calibration"], "tokens": 600}
    data["generation"] = {**data["generation"], "max_new_tokens": 4, "num_beams": 1}
    return recipe_from(data)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of the papers' own settings some take minutes beside other work
@pytest.mark.parametrize(
    "path",
    [
        p
        for p in PAPERS
        if "$FFNKIT_" not in p.read_text().split("small:")[1] or "$FFNKIT_MODELS" in p.read_text().split("small:")[1]
    ],
    ids=lambda path: path.stem,
)
def test_small_variants_run(path: Path, data_dir: Path, models_dir: Path, minilm_path: Path, tmp_path: Path) -> None:
    """Every arm on its first cell, with a few steps."""
    found = load_any(path, small=True)
    assert isinstance(found, Table)
    results = run(shortened(next(iter(found.cells.values()))), tmp_path / "out", progress=False, isolate=False)
    assert [(row["arm"], row.get("error")) for row in results.rows if row["status"] != "done"] == []
