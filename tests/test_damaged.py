"""Damaged files: plans and configs of ours field by field, sizes beyond the files, and a part of ``tools/fuzz.py``."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import ffnkit as fk
from ffnkit.errors import FfnkitError

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fuzz


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz.good_plans(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def models(plans: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fuzz.good_models(tmp_path_factory.mktemp("models"), plans)


@pytest.mark.parametrize("kind", ["plans", "recipes", "data"])
def test_what_is_damaged_at_random_is_refused_or_right(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found = fuzz.KINDS[kind][0](tmp_path), []
    for index in range(40):
        told, use = made.one(random.Random(f"test {kind} {index}"))
        outcome, where = fuzz.tried(use)
        found.append(outcome)
        assert not outcome.isupper(), (told, outcome, where)
    assert {"accepted", "refused"} == set(found)


# --- plans ----------------------------------------------------------------------------------------------------------


def rewritten(plan: Path, path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """The plan file with its description and tensors changed."""
    with safe_open(plan, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    data = json.loads(metadata["ffnkit_plan"])
    change(data, tensors)
    save_file(tensors, path, metadata=metadata | {"ffnkit_plan": json.dumps(data)})
    return path


def first(name: str, value: Any) -> Callable[[Any, Any], None]:
    """The first edit's field, or its tensor, set; a function of the old tensor changes that."""

    def change(data: Any, tensors: Any) -> None:
        if callable(value):
            key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
            tensors[key] = value(tensors[key])
            return
        holder = data["edits"][0]["settings"]
        *outer, last = name.split("/")
        for part in outer:
            holder = holder[part]
        holder[last] = value

    return change


def tie(**values: Any) -> Callable[[Any, Any], None]:
    """Fields of the first edit that shares FFNs."""

    def change(data: Any, _: Any) -> None:
        next(edit for edit in data["edits"] if edit["kind"] == "Tie")["settings"].update(values)

    return change


NAN = float("nan")
DAMAGES = [
    ("fusion", first("width", 10**6), "labels"),
    ("fusion", first("width", True), "field width"),
    ("fusion", first("width", 0), "field width"),
    ("fusion", first("labels", lambda t: t.float()), "field labels"),
    ("fusion", first("labels", lambda t: -t), "field labels"),
    ("fusion", first("labels", lambda t: t[:5].clone()), "labels"),
    ("fusion", first("balance", 1), "field balance"),
    ("fusion", first("target", ""), "edit"),
    ("fusion", first("target", "bert.nowhere"), "bert.nowhere"),
    ("fusion", first("more", 1), "more"),
    ("fusion, experts", first("labels", lambda t: t[:1].clone()), "labels"),
    ("fusion, experts", first("scale", lambda t: t * NAN), "field scale"),
    ("fusion, gated", first("scale", lambda t: t[:3].clone()), "tensors"),
    ("svd", first("first", lambda t: t.bool()), "field first"),
    ("svd", first("first", lambda t: t[:1].clone()), "tensors"),
    ("svd", first("site", "gata"), "field site"),
    ("magnitude", first("index", lambda t: t * 0), "different neurons"),
    ("magnitude", first("index", lambda t: t + 1000), "numbers do not fit"),
    ("sketch", first("up", lambda t: t.T.contiguous()), "its up"),
    ("sketch", first("down", lambda t: t / 0), "field down"),
    ("merging", tie(members=[]), "field members"),
    ("merging", tie(members=["bert.encoder.layer.0", "bert.encoder.layer.0"]), "twice"),
    ("merging", tie(average="no"), "field average"),
    ("layer-drop", first("layer", "model"), "dropping model"),
    ("layer-drop", first("layer", "model.layers.0"), "no layer model.layers.0 around"),
    ("layer-drop", first("parameters", -1), "field parameters"),
    ("heads", first("heads", 3), "units"),
    ("heads", first("index", lambda t: t.flip(0) if len(t) > 1 else t + 7), ""),
    ("masks", first("shape", [10**9, 10**9]), "bytes"),
    ("masks", first("shape", [3, 3]), "bytes"),
    ("masks", first("bits", lambda t: t.int()), "field bits"),
    ("sparsegrad", first("given/trained", -1), "trained"),
    ("sparsegrad", first("given/selection", "sometimes"), "selection"),
    ("sparsegrad", first("given/core", [10**6, 10**6]), ""),
    ("sparsegrad", first("index", lambda t: t + 10**6), "index"),
    ("sparsegrad", first("layer", "other"), "other"),
    ("dsee", first("given/rank", 10**9), "rank"),
    ("dsee", first("given/alpha", "x"), "alpha"),
    ("dsee", first("given/more", 1), "more"),
    ("dsee", first("shape", [1]), "made for"),
    ("dsee", lambda data, tensors: data["edits"][-1]["settings"].update(parts=["nose"]), "parts"),
    ("fusion", lambda data, tensors: data["shapes"].clear(), "shape"),
    ("fusion", lambda data, tensors: data["shapes"][0].update(width="24"), "width"),
    ("fusion", lambda data, tensors: data.update(edits={}), "edits"),
    ("fusion", lambda data, tensors: data["edits"][0]["tensors"].append("more"), "missing"),
    ("fusion", lambda data, tensors: data.update(parameters=None), "parameters"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_every_field_of_a_plan_is_checked(tmp_path: Path, plans: dict[str, Any], number: int) -> None:
    name, change, word = DAMAGES[number]
    path, make = plans[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = rewritten(path, tmp_path / "plan", change)
    with pytest.raises(FfnkitError) as error:
        fk.apply(model, fk.Plan.load(file))
    assert word in str(error.value) and len(str(error.value)) < 2000, error.value
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- configs --------------------------------------------------------------------------------------------------------


def changed(model: Path, out: Path, change: Callable[[Any], Any]) -> Path:
    """The checkpoint with its description changed; what ``change`` gives takes the description's place."""
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = change(config["quantization_config"]) or config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def row(**values: Any) -> Callable[[Any], None]:
    """Fields of the last FFN's row."""

    def change(described: Any) -> None:
        described["ffns"][list(described["ffns"])[-1]].update(values)

    return change


def without(field: str) -> Callable[[Any], None]:
    return lambda described: described["ffns"][list(described["ffns"])[-1]].pop(field) and None


CONFIGS = [
    ("fusion", row(width=10**6), "wide"),
    ("masks", row(width=10**6), "wide"),
    ("svd", row(special={"down": {"kind": "lowrank", "rank": 10**6}}), "wide"),
    ("fusion", row(width=13), "13"),
    ("fusion", row(width="12"), "width"),
    ("fusion", row(width=True), "width"),
    ("fusion", row(width=-1), "width"),
    ("fusion", row(key=["", "hidden_size"]), "hidden_size"),
    ("fusion", row(key="intermediate_size"), "key"),
    ("fusion", row(special={}), "scale"),
    ("fusion", row(special={"middle": {"kind": "scaled"}}), "special"),
    ("fusion", row(special={"down": {"kind": "magic"}}), "magic"),
    ("fusion", row(special={"down": {"kind": "masked"}}), "scale"),
    ("fusion", row(twins=["bert.encoder.layer.0"]), "twice"),
    ("fusion", row(more=1), "more"),
    ("fusion", without("key"), "key"),
    ("fusion", lambda d: d.update(format=99), "format"),
    ("fusion", lambda d: d.update(ffns=[]), "ffns"),
    ("fusion, experts", row(special={}), "neuron_"),
    ("svd", row(special={}), "first"),
    ("svd", row(special={"up": {"kind": "lowrank"}}), "rank"),
    ("merging", lambda d: d["ffns"].update({"bert.encoder.layer.9": {}}), "ffns"),
    ("heads", lambda d: d["attention"][next(iter(d["attention"]))].update(heads=[0, 0]), "heads"),
    ("heads", lambda d: d["attention"][next(iter(d["attention"]))].update(of=[4]), "of"),
    ("prune", lambda d: d.pop("linears") and None, "mask"),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_every_field_of_a_description_is_checked_before_weights_are_read(
    tmp_path: Path, models: dict[str, Path], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, word = CONFIGS[number]
    folder = changed(models[name], tmp_path / "changed", change)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read, and memory is taken for those that do not fit")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", never)
    with pytest.raises(FfnkitError) as error:
        fk.load(folder)
    assert word in str(error.value) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**7),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", -3),
        ("num_attention_heads", -4),
        ("hidden_dropout_prob", NAN),
        ("max_position_embeddings", 10**8),
        ("hidden_act", [1]),
        ("layer_norm_eps", "x"),
        ("architectures", [3]),
        ("architectures", 7),
        ("model_type", ["bert"]),
        ("dtype", 7),
        ("quantization_config", []),
        ("quantization_config", 3),
    ],
)
@pytest.mark.parametrize("name", ["plain", "fusion"])
def test_other_fields_of_a_config_are_one_line(
    tmp_path: Path, models: dict[str, Path], name: str, key: str, value: Any
) -> None:
    for file in models[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FfnkitError) as error:
        fk.load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_are_no_floats_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    for file in models["fusion"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.weight"] = tensors["bert.encoder.layer.0.output.dense.weight"] > 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FfnkitError, match="bool"):
        fk.load(tmp_path)


@pytest.mark.parametrize("odd", ["a" * 300, "a\0b", "/" + "x/" * 3000])
def test_names_that_no_file_can_have_are_one_line(odd: str) -> None:
    from ffnkit.recipe.loading import load_recipe
    from ffnkit.tasks import file_task

    model = fuzz.bert()
    for use in (
        lambda: fk.load(odd),
        lambda: fk.Plan.load(odd),
        lambda: fk.save(model, odd),
        lambda: fk.load_adapter(model, odd),
        lambda: fk.plan(model, fk.Fusion(width=0.5)).save(odd),
        lambda: file_task(odd, text=("text",), label="label"),
        lambda: load_recipe(odd),
    ):
        with pytest.raises(FfnkitError) as error:
            use()
        assert len(str(error.value)) < 2000
