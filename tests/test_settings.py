"""Every setting of every method is declared once, and what its declaration says is what is checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from families import FAMILIES
from typer.main import get_command
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit import methods
from ffnkit.cli import app, describe
from ffnkit.cli.data_options import OPTIONS
from ffnkit.cli.training_options import FLAGS, Training, sentence
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.model.targets import select
from ffnkit.recipe.schema import TaskSpec
from ffnkit.recipe.settings import method_fields
from ffnkit.settings import Doc, Setting, build, check, settings_of
from ffnkit.tasks.fields import TaskFields
from ffnkit.tune.settings import TrainSettings

KINDS = {kind.name: kind for kind in (*methods.METHODS, fk.DSEE, fk.SparseGrad)}
NEEDED: dict[str, dict[str, Any]] = {  # what makes a method that can be planned
    "merging": {"layers": "0-1"},
    "layer-drop": {"layers": "0"},
    "ffn-drop": {"layers": "0"},
    "combined": {"methods": [fk.Fusion(width=0.5, layers="0"), fk.Fusion(width=0.5, layers="1")]},
}
EVERY = [(name, each) for name, kind in KINDS.items() for each in settings_of(kind)]
IDS = [f"{name}-{each.name}" for name, each in EVERY]


def made(name: str, **given: Any) -> Any:
    width = {"width": 0.5} if "width" in (each.name for each in settings_of(KINDS[name])) else {}
    return KINDS[name](**{**width, **NEEDED.get(name, {}), **given})


def numbers(each: Setting) -> tuple[list[Any], list[Any]]:
    """Numbers just inside and just outside of the bounds."""
    doc, whole = each.doc, each.kinds == (int,)
    small = 1 if whole else 1e-6
    inside, outside = [], []
    for bound, included, sign in (
        (doc.at_least, True, 1),
        (doc.above, False, 1),
        (doc.at_most, True, -1),
        (doc.below, False, -1),
    ):
        if bound is not None:
            inside += [bound] if included else [bound + sign * small]
            outside += [bound - sign * small] if included else [bound]
    return inside, outside


def right(each: Setting) -> list[Any]:
    if each.doc.choices:
        return [[], list(each.choices)]
    return [*each.choices, *numbers(each)[0], *([None] if each.optional else [])] + (
        [True, False] if each.kinds == (bool,) else []
    )


def wrong(each: Setting) -> list[Any]:
    found = [object(), *([] if each.optional else [None])]
    if each.choices:
        found += ["no such word", ["no such word"]]
    if each.kinds in ((int,), (float,)):
        found += [*numbers(each)[1], True, "many", float("nan"), float("inf")]
    if each.kinds == (int,):
        found += [2.5]
    if each.kinds == (bool,):
        found += ["yes", 1]
    return found


@pytest.mark.parametrize(("name", "each"), EVERY, ids=IDS)
def test_what_a_declaration_allows_passes(name: str, each: Setting) -> None:
    for value in right(each):
        check(made(name, **{each.name: value}))


@pytest.mark.parametrize(("name", "each"), EVERY, ids=IDS)
def test_what_a_declaration_does_not_allow_is_refused_when_it_is_planned(name: str, each: Setting) -> None:
    model = FAMILIES["bert"].model()
    for value in wrong(each):
        with pytest.raises(FfnkitError) as caught:
            fk.plan(model, made(name, **{each.name: value}), data=[])
        text = str(caught.value)
        assert "\n" not in text and each.name in text, text


@pytest.mark.parametrize("name", [name for name, each in EVERY if each.name == "layers"])
def test_layers_are_given_by_expression_number_or_list(name: str) -> None:
    model = FAMILIES["bert"].model()
    for layers in ([0, 1], (0, 1), range(2), ["0", 1]):
        method = made(name, layers=layers)
        check(method)
        kept = json.loads(json.dumps(method.settings()))  # as a plan or a card holds them
        assert kept["layers"] == list(layers)
        check(made(name, layers=kept["layers"]))
        assert [ffn.layer for ffn in select(ffns(model), kept["layers"])] == [0, 1]


@pytest.mark.parametrize("name", KINDS)
def test_all_who_tell_of_settings_tell_of_the_declared_ones(name: str) -> None:
    declared = [each.name for each in settings_of(KINDS[name])]
    assert list(describe.fields(KINDS[name])) == declared
    assert all(each.doc.text for each in settings_of(KINDS[name]))
    if name in methods.names():
        assert method_fields(name) == declared
    assert set(made(name).settings()) | {"preset"} == set(declared) | {"preset"}  # told where one is chosen


@dataclass(frozen=True)
class Toy:
    """Has settings."""

    often: Annotated[int, Doc("how often", at_least=1)]
    kind: Annotated[Literal["a", "b"], Doc("which")] = "a"

    name: ClassVar[str] = "toy"


@dataclass(frozen=True)
class Silent:
    """As a method of another package may be: its settings say nothing of themselves."""

    often: int = 1
    what: Unknown = None  # type: ignore[name-defined]  # noqa: F821


def test_a_setting_without_a_word_is_one_too() -> None:
    assert [(each.name, each.default, each.doc.text) for each in settings_of(Silent)] == [
        ("often", 1, ""),
        ("what", None, ""),
    ]
    check(Silent(often=-1))


def test_building_suggests_the_name_that_was_meant() -> None:
    assert build(Toy, {"often": 2}, "toy") == Toy(often=2)
    with pytest.raises(FfnkitError, match="Did you mean often"):
        build(Toy, {"ofen": 2}, "toy")
    with pytest.raises(FfnkitError, match="no value for 'often'"):
        build(Toy, {}, "toy")
    check(Toy(often=1))
    for bad in (Toy(often=0), replace(Toy(often=1), kind="c")):  # type: ignore[arg-type]
        with pytest.raises(FfnkitError):
            check(bad)


def test_bounds_in_words() -> None:
    said = [Doc("", at_least=0), Doc("", above=0), Doc("", above=0, at_most=1), Doc("", at_least=0, below=1)]
    assert [doc.bounds for doc in said] == ["at least 0", "above 0", "above 0 and up to 1", "from 0 up to below 1"]
    assert Doc("", above=0, below=1).bounds == "between 0 and 1" and Doc("").bounds == ""


def test_the_fields_of_a_task_are_told_once() -> None:
    declared = {each.name: each for each in settings_of(TaskFields)}
    spec = {{"input": "inputs"}.get(name, name): info for name, info in TaskSpec.model_fields.items()}
    assert set(spec) == set(declared)
    assert {name: info.description for name, info in spec.items()} == {n: d.doc.text for n, d in declared.items()}
    assert TaskSpec.model_json_schema()["properties"]["label"]["description"] == declared["label"].doc.text
    assert set(declared) - set(OPTIONS) == {"test"}  # of recipes and Python alone
    for command in ("tune", "eval"):
        helps = {p.name: p.help for p in get_command(app).commands[command].params if hasattr(p, "help")}
        assert {name: helps[name] for name in OPTIONS} == {name: declared[name].doc.text for name in OPTIONS}


def test_the_settings_of_training_are_told_once() -> None:
    declared, taken = TrainSettings.model_fields, get_type_hints(Training) | {"max_length": int | None}
    assert taken.keys() == FLAGS.keys() <= declared.keys()
    printed = " ".join(CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "400"}).output.split())
    for name, flag in FLAGS.items():
        text = declared[name].description or ""
        assert flag in printed and text and sentence(text) in printed, name
        assert kinds(taken[name]) <= kinds(declared[name].annotation), name
    assert sentence("bf16: of a GPU") == "bf16: of a GPU." and sentence("stops at ...") == "Stops at ..."


def kinds(annotation: Any) -> set[Any]:
    """The types that an annotation takes, None aside; a choice of words is text too."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*map(kinds, parts)) - {NoneType}
    if origin is Annotated:
        return kinds(parts[0])
    return {annotation, str} if origin is Literal else {annotation}
