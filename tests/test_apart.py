"""A base and its updates apart: opened equal, as sparse as it was made, by peft where it is low-rank only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_cutting_masks import ALL, ragged_plan
from test_heads import compare
from test_recipe_run import recipe_of, run, tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import ffnkit as fk
from ffnkit.cli.compressing import weights_bytes
from ffnkit.errors import FfnkitError
from ffnkit.model.trainable import parts_of
from ffnkit.nn.adapter_layer import adapter_layers, plain_state
from ffnkit.nn.masked import Masked
from ffnkit.recipe.state import unit_of
from ffnkit.report.measure import bytes_on_disk
from ffnkit.report.sparsity import sparsity
from ffnkit.surgery.journal import State
from ffnkit.tune import get
from ffnkit.tune.tuners import finish, prepare

NAMES = ("bert", "gpt2", "deberta-v2-keys", "t5-4", "mixtral", "albert")
LOW_RANK = ("bert", "gpt2")


def tuned(name: str, nonzeros: int = 5, **how: Any) -> Any:
    """A pruned model with DSEE, all that trains moved; linears without an update have masks."""
    model = ALL[name].model()
    fk.apply(model, fk.plan(model, fk.DSEE(**{"rank": 2, "nonzeros": nonzeros, "support": "random"} | how)))
    draw = torch.Generator().manual_seed(0)
    for parameter in fk.trainable_parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5, mode="WABS")))


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family with S2, and some of low rank only, with their outputs."""
    folder = tmp_path_factory.mktemp("apart")
    for name in NAMES:
        for low in (True, False) if name in LOW_RANK else (False,):
            model, key = tuned(name, 0 if low else 5), f"{name}-{'low' if low else 's2'}"
            inputs = ALL[name].inputs(model)
            before, state = State.of(model), {k: v.clone() for k, v in model.state_dict().items()}
            fk.save_apart(model, folder / key)
            ours, theirs = before.changed(State.of(model))
            assert not any((ours.rows, ours.parameters, theirs.rows, theirs.parameters)), "saving changes nothing"
            assert equal(model.state_dict(), state)
            torch.save((type(model).__name__, inputs, ALL[name].outputs(model, inputs)), folder / f"{key}.pt")
            assert (folder / key / "lora").is_dir() == low
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_opened_it_is_the_same_model(saved: Path, name: str) -> None:
    family, folder = ALL[name], saved / f"{name}-s2"
    _, inputs, outputs = torch.load(saved / f"{name}-s2.pt", weights_only=False)
    model = fk.load(folder).eval()
    assert equal(family.outputs(model, inputs), outputs)
    whole = tuned(name)
    assert sparsity(model).share() == sparsity(whole).share() > 0.49
    assert sparsity(model).share("merged") < sparsity(model).share()  # the control: merged, zeros are filled
    sizes = [[p.shape for p in fk.trainable_parameters(each)] for each in (model, whole)]
    assert sizes[0] == sizes[1]
    base = fk.load(folder / "base").eval()
    assert not adapter_layers(base) and not any(isinstance(module, Masked) for module in base.modules())
    assert sparsity(base).share() == sparsity(whole).share()
    assert not equal(family.outputs(base, inputs), outputs)
    plain = fk.fold(tuned(name))
    assert sparsity(plain).share() < sparsity(whole).share()
    parts = {name: p for name, p in base.named_parameters() if any(p is q for q in parts_of(base, ["head"]))}
    fresh = dict(ALL[name].model().named_parameters())
    assert all(torch.equal(p, fresh[key]) for key, p in parts.items())  # the head is in the adapter


PLAIN = """
import json, sys, torch, transformers
kinds = {}
for key in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{key}"
    name, inputs, outputs = torch.load(f"{folder}.pt", weights_only=False)
    if key.endswith("low"):
        import peft
        model = getattr(transformers, name).from_pretrained(f"{folder}/base")
        model = peft.PeftModel.from_pretrained(model, f"{folder}/lora").eval()
        assert "ffnkit" not in sys.modules
    else:
        import ffnkit
        model = ffnkit.load(folder).eval()
    with torch.no_grad():
        found = model(**inputs)
    kinds[key] = max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in outputs.items() if k in found)
print(json.dumps(kinds))
"""


@pytest.mark.slow
def test_in_a_fresh_process_by_peft_and_by_ffnkit(saved: Path) -> None:
    keys = [*(f"{name}-low" for name in LOW_RANK), "deberta-v2-keys-s2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN, str(saved), *keys], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(keys) and max(found.values()) < 1e-5, found


def test_nobody_opens_the_base_in_its_place(saved: Path) -> None:
    folder = saved / "bert-s2"
    for opener in (AutoModel, AutoConfig):
        with pytest.raises(ValueError, match="model_type"):
            opener.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bert-4", "deberta-4", "gpt2-4", "phi3-8"])
def test_after_heads_went(name: str, tmp_path: Path) -> None:
    family, model = ALL[name], tuned(name, targets="attention")
    fk.apply(model, ragged_plan(model))
    fk.save_apart(model, tmp_path)
    again = fk.load(tmp_path).eval()
    assert equal(plain_state(again), {key: value for key, value in plain_state(model).items() if "mask" not in key})
    compare(family, again, model, 1e-5)  # sums of another order: fewer heads lie otherwise in memory


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_in_another_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = tuned("bert").to(stored)
    fk.save_apart(model, tmp_path)
    for opened in (torch.float32, torch.bfloat16):
        again = fk.load(tmp_path, dtype=opened).eval()
        assert next(again.parameters()).dtype == opened and adapter_layers(again)
        if opened == stored:
            assert equal(family.outputs(again), family.outputs(model))


def test_other_parts_that_trained_and_shared_ffns(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Merging(layers="0-1", match=False)))
    given = {"rank": 2, "nonzeros": 3, "targets": "ffn", "modules_to_train": ["embeddings", "norms", "rest"]}
    for parts in (["embeddings", "norms"], ["rest"]):
        fk.apply(model, fk.plan(model, fk.DSEE(**given | {"modules_to_train": parts})))
        for parameter in fk.trainable_parameters(model):
            parameter.data.add_(0.05)
        fk.save_apart(model, tmp_path)
        again = fk.load(tmp_path).eval()
        assert equal(family.outputs(again), family.outputs(model))
        fk.fold(model)


def test_the_next_save_takes_its_place_and_the_other_way_round(tmp_path: Path) -> None:
    family, model = FAMILIES["bert"], tuned("bert")
    fk.save_apart(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    fk.save(model, tmp_path)
    assert not adapter_layers(fk.load(tmp_path)) and not (tmp_path / "base").exists()
    fk.save_apart(model, tmp_path)
    assert adapter_layers(fk.load(tmp_path)) and not (tmp_path / "config.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    sizes = [(tmp_path / part).stat().st_size for part in ("base/model.safetensors", "adapter/adapter.safetensors")]
    assert bytes_on_disk(tmp_path).weights == weights_bytes(tmp_path) == sum(sizes)
    fk.export(fk.load(tmp_path), tmp_path / "standard")
    plain = type(model).from_pretrained(tmp_path / "standard").eval()
    one, two = family.outputs(plain), family.outputs(model)
    assert all(torch.allclose(one[key], value, atol=1e-5) for key, value in two.items())


def test_without_updates_there_is_nothing_apart(tmp_path: Path) -> None:
    with pytest.raises(FfnkitError, match="no update is on it"):
        fk.save_apart(FAMILIES["bert"].model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_tuners_save_it_before_they_merge(merge: bool, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    fk.apply(model, fk.plan(model, fk.Prune(sparsity=0.5)))
    tuner = get({"name": "dsee", "rank": 2, "nonzeros": 3, "apart_dir": tmp_path / "apart"})
    tuned_model: nn.Module = prepare(model, tuner)
    for parameter in fk.trainable_parameters(tuned_model):
        parameter.data.add_(0.1)
    outputs = family.outputs(tuned_model)
    finish(tuned_model, tuner, merge=merge)
    again = fk.load(tmp_path / "apart").eval()
    assert equal(family.outputs(again), outputs) and sparsity(again).share() == 0.5


@pytest.mark.slow
def test_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    folder = tiny(tmp_path / "data")
    stages = ["compress", "tune", "prune", "recover", "evaluate", "export"]
    dsee = {"name": "dsee", "rank": 2, "nonzeros": 4}
    half: dict[str, Any] = {"method": "prune", "sparsity": 0.5}
    arms = {"whole": {"tuner": "full"}, "half": {"prune": half}, "first": half}
    recipe = recipe_of(folder, stages=stages, tuner=dsee, arms=arms, seeds=[0], export="all",
                       recover={"steps": 2, "learning_rate": 1e-3})  # fmt: skip
    results = run(recipe, tmp_path / "run")
    assert results.ok
    rows = {row["arm"]: row for row in results.rows}
    for arm in ("half", "first"):
        place = unit_of(tmp_path / "run", arm, 0).folder / "apart"
        assert rows[arm]["checkpoints"]["apart"].endswith("apart") and place.is_dir()
        assert sparsity(fk.load(place)).share() == pytest.approx(rows[arm]["zeros"]) == pytest.approx(0.5, abs=1e-3)
        assert rows[arm]["bytes_on_disk_apart"] == bytes_on_disk(place).weights > 0
        assert "- zeros in linears: 50.0%" in (place / "README.md").read_text()
    merged = fk.load(unit_of(tmp_path / "run", "half", 0).folder / "compact")
    assert sparsity(merged).share() == pytest.approx(rows["half"]["zeros_merged"])
    assert rows["half"]["zeros_merged"] < 0.5
    assert "bytes_on_disk_apart" not in rows["whole"]
    table = (tmp_path / "run" / "table.md").read_text()
    assert (
        "on disk apart" in table
        and "50.0% (" in table
        and "on disk apart" in (tmp_path / "run/report.html").read_text()
    )
