"""Tuners undo what they did: where preparing or finishing fails, where they are abandoned, where a run stops."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import TUNERS, case_of, crossed
from test_tune import TASK, TOKENIZER, assert_same, bert, fit, settings, splits
from torch import nn

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.nn.reparametrized import ReparametrizedLinear
from ffnkit.testing.contract import difference, snapshot
from ffnkit.tune import lifecycle, load_adapter, remove_added, train, tuners
from ffnkit.tune.loop import Loop

MORE: dict[str, dict[str, Any]] = {
    "lora with norms": {"name": "lora", "rank": 2, "modules_to_train": ["norms"], "keep_zeros": True, "targets": "all"},
    "dsee with coefficients": {"name": "dsee", "rank": 2, "nonzeros": 4, "coefficients": 0.1, "keep_zeros": True},
    "meprop of outputs": {"name": "meprop", "of": "outputs"},
    "refreshed": {"name": "sparsegrad", "basis": "none", "selection": "refresh"},
}
EVERY = {name: {"name": name, **more} for name, more in TUNERS.items()} | MORE
WANTING = ("refreshed", "sparsegrad on data")  # gradients
FAMILIES = ("bert", "albert", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama", "t5")))


def prepared(model: Any, tuner: str, data: Any = None) -> Any:
    if data is None and tuner in WANTING:
        data = case_of("bert").data(model)
    return tuners.get(EVERY[tuner]).prepare(model, data)


def trained_numbers(model: Any) -> int:
    return sum(p.numel() for p in tuners.trainable_parameters(model))


def shape_of(model: nn.Module) -> Any:
    """What a model is, hooks included, without its values."""
    kinds = {n: (type(m), m.training) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = {n: [k for k, v in vars(m).items() if "hook" in k and v] for n, m in model.named_modules()}
    names = {n: sorted(k for k in vars(m) if "hooks" not in k) for n, m in model.named_modules()}
    return kinds, flags, hooks, names, getattr(model.config, "use_cache", None), model.is_gradient_checkpointing  # type: ignore[union-attr]


# Abandoned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuner", list(EVERY))
def test_what_is_abandoned_is_undone_exactly(tuner: str, family: str) -> None:
    case = case_of(family)
    model = case.model()
    data = case.data(model) if tuner in WANTING else None
    before, shape = snapshot(model), shape_of(model)
    try:
        tuned = prepared(model, tuner, data)
    except FfnkitError:
        pass  # experts in one parameter have no linears
    else:
        assert tuner == "full" or difference(before, snapshot(model)) or shape_of(model) != shape
        assert lifecycle.undone(tuned) is model
    assert difference(before, snapshot(model)) == ""
    assert shape_of(model) == shape


@pytest.mark.parametrize(
    ("first", "second"),
    crossed(EVERY, TUNERS, always=[(name, after) for name in EVERY for after in ("full", "head") if after in TUNERS]),
)
def test_the_next_tuner_finds_the_model_as_it_was(first: str, second: str) -> None:
    case = case_of("bert")
    fresh, model = case.model(), case.model()
    alone = prepared(fresh, second)
    given = prepared(model, first, case.data(model) if first in WANTING else None)
    tuned = prepared(given if len(first) % 2 else model, second)  # either is what a caller may have kept
    assert trained_numbers(tuned) == trained_numbers(alone)
    assert [type(m) for m in tuned.modules()] == [type(m) for m in alone.modules()]
    ours, theirs = tuners.finish(tuned, EVERY[second]), tuners.finish(alone, EVERY[second])
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert lifecycle.undone(ours) is ours
    ours, theirs = (remove_added(each) if tuners.get(EVERY[second]).stays else each for each in (ours, theirs))
    assert trained_numbers(ours) == trained_numbers(theirs) == trained_numbers(case.model())


def test_without_the_note_a_tuner_stays() -> None:
    """The control: what is forgotten is not undone, and is found by what the tests above compare."""
    model: Any = case_of("bert").model()
    before = trained_numbers(model)
    tuners.prepare(model, "head")
    lifecycle.forget(model)
    assert trained_numbers(tuners.prepare(model, "full")) < before


@pytest.mark.parametrize("tuner", ["sparsegrad", "dsee", "mask"])
def test_what_was_folded_by_hand_stays(tuner: str) -> None:
    model: Any = case_of("bert").model()
    start = model.state_dict()
    tuned = prepared(model, tuner)
    with torch.no_grad():
        for parameter in tuners.trainable_parameters(tuned):
            parameter += 0.1
    fk.fold(tuned)
    folded = {n: t.clone() for n, t in model.state_dict().items()}
    tuners.prepare(model, "full")
    assert all(torch.equal(value, folded[n]) for n, value in model.state_dict().items())
    assert any(not torch.equal(value, start[n]) for n, value in folded.items())


@pytest.mark.parametrize("tuner", ["lora", "sparsegrad", "dsee"])
def test_the_note_holds_no_weight_and_goes(tuner: str) -> None:
    model: Any = case_of("bert").model()
    tuned = prepared(model, tuner)
    layers = [weakref.ref(p) for m in tuned.modules() if isinstance(m, ReparametrizedLinear) for p in m.parameters()]
    if tuner == "lora":
        layers = [weakref.ref(p) for n, p in tuned.named_parameters() if "lora_" in n]
        tuned.merge_and_unload()  # past the toolkit
    else:
        fk.fold(tuned)
    del tuned
    gc.collect()
    held = {id(p) for p in model.parameters()}
    assert layers and not [r for r in layers if r() is not None and id(r()) not in held]
    tuners.finish(prepared(model, tuner), EVERY[tuner])
    assert not [name for name in vars(model) if name.startswith("_ffnkit_tuned")]


def test_copies_are_undone_apart() -> None:
    model: Any = case_of("bert").model()
    before = shape_of(model)
    for tuner in ("sparsegrad", "lora", "head", "meprop of outputs"):
        tuned = prepared(model, tuner)
        twin = copy.deepcopy(model)
        assert shape_of(lifecycle.undone(twin)) == before, tuner
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert twin.state_dict().keys() != model.state_dict().keys() or tuner not in ("sparsegrad", "lora")
        assert shape_of(lifecycle.undone(tuned)) == before, tuner
        assert_same(twin, model)


# Failures -----------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: BaseException) -> list[int]:
    """Let the ``at``-th call fail, and no other; how many there were."""
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(("at", "error"), [(7, KeyboardInterrupt()), (30, torch.OutOfMemoryError("full"))])
@pytest.mark.parametrize("tuner", list(EVERY))
def test_preparing_is_all_or_nothing(
    tuner: str, error: BaseException, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("bert")
    model = case.model()
    data = case.data(model)
    before, shape = snapshot(model), shape_of(model)
    with monkeypatch.context() as patch:
        calls = failing(patch, nn.Parameter, "requires_grad_", at, error)
        end = failing(patch, lifecycle.Preparation, "note", 1, error)
        with pytest.raises(type(error)):
            prepared(model, tuner, data)
        assert calls[0] >= at or end[0] == 1
    assert difference(before, snapshot(model)) == ""
    assert shape_of(model) == shape
    assert trained_numbers(prepared(model, tuner, data)) == trained_numbers(prepared(case.model(), tuner, data))


def test_loading_an_adapter_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("bert")
    tuner = {"name": "lora", "rank": 2, "adapter_dir": tmp_path / "a"}
    tuners.finish(tuners.prepare(case.model(), tuner), tuner)
    model: Any = case.model()
    before, shape = snapshot(model), shape_of(model)
    with monkeypatch.context() as patch:
        failing(patch, lifecycle.Preparation, "note", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            load_adapter(model, tmp_path / "a")
    assert difference(before, snapshot(model)) == "" and shape_of(model) == shape
    prepared(model, "head")
    tuned = load_adapter(model, tmp_path / "a")
    assert trained_numbers(tuned) == 0
    assert lifecycle.undone(tuned) is model and shape_of(model) == shape


FINISHED = [
    ("lora", "peft.tuners.lora.layer.Linear", "get_base_layer", 7),
    ("sparsegrad", "ffnkit.nn.adapter_layer.AdapterLayer", "folded", 2),
    ("dsee", "ffnkit.nn.adapter_layer.AdapterLayer", "folded", 2),
    ("mask", "ffnkit.nn.adapter_layer.AdapterLayer", "folded", 2),
    ("combined updates", "ffnkit.nn.adapter_layer.AdapterLayer", "folded", 3),
    ("lora with norms", "ffnkit.tune.zeros", "restore", 1),
    ("dsee with coefficients", "ffnkit.tune.zeros", "restore", 1),
    ("head", "torch.nn.Parameter", "requires_grad_", 3),
    ("meprop of outputs", "torch.nn.Parameter", "requires_grad_", 3),
]


def found(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("tuner", "path", "name", "at"), FINISHED)
def test_finishing_can_be_done_again(
    tuner: str, path: str, name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("bert")
    results = []
    for fails in (False, True):
        torch.manual_seed(0)
        tuned = prepared(case.model(), tuner)
        with torch.no_grad():
            for parameter in tuners.trainable_parameters(tuned):
                parameter += 0.01 * torch.randn(parameter.shape)
        if fails:
            flags = {n: p.requires_grad for n, p in tuned.named_parameters()}
            with monkeypatch.context() as patch:
                calls = failing(patch, found(path), name, at, KeyboardInterrupt())
                with pytest.raises(KeyboardInterrupt):
                    tuners.finish(tuned, EVERY[tuner])
            assert calls[0] >= at
            assert {n: p.requires_grad for n, p in tuned.named_parameters()} == flags
        results.append(tuners.finish(tuned, EVERY[tuner]))
    if tuner.startswith("lora"):  # what was added to a weight was subtracted again
        ours, theirs = (result.state_dict() for result in results)
        assert all(torch.allclose(value, theirs[n], atol=1e-6) for n, value in ours.items())
    else:
        assert_same(*results)
    assert shape_of(results[0]) == shape_of(results[1])


@pytest.mark.parametrize("tuner", ["lora", "sparsegrad", "dsee"])
def test_finishing_where_nothing_can_be_written(tuner: str, tmp_path: Path) -> None:
    given = EVERY[tuner] | {"adapter_dir": tmp_path / "file" / "adapter"}
    tuned = tuners.prepare(case_of("bert").model(), given)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((FfnkitError, OSError)):
        tuners.finish(tuned, given)
    (tmp_path / "file").unlink()
    plain = tuners.finish(tuned, given)
    assert list((tmp_path / "file" / "adapter").iterdir())
    assert shape_of(plain) == shape_of(case_of("bert").model())


# Runs ---------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """Something that nobody foresees."""


def _collator(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, type(TASK), "collator", 1, error)


def _forward(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, Loop, "compute_loss", 1, error)


def _later(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, Loop, "compute_loss", 9, error)  # behind the first checkpoint


def _evaluation(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, type(TASK), "evaluate", 1, error)


def _saving(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, Loop, "_save", 1, error)


def _finishing(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing(patch, found("ffnkit.tune.training"), "finish", 1, error)


STOPS: dict[str, Callable[[pytest.MonkeyPatch, BaseException], None]] = {
    "collator": _collator, "forward": _forward, "later": _later, "evaluation": _evaluation, "saving": _saving,
    "finish": _finishing,
}  # fmt: skip


def stopped(tuner: Any, stop: str, error: BaseException, out: Path, patch: pytest.MonkeyPatch, **more: Any) -> Any:
    model: Any = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].eval()
    before = shape_of(model)
    with patch.context() as inner:
        STOPS[stop](inner, error)
        with pytest.raises(type(error)):
            fit(model, out, tuner=tuner, save_every=5, **more)
    assert shape_of(model) == before
    return model


@pytest.mark.parametrize(("tuner", "stop"), crossed(["head", "lora", "sparsegrad", "meprop of outputs", "full"], STOPS))
def test_a_run_that_stops_leaves_a_plain_model(
    tuner: str, stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = KeyboardInterrupt() if stop in ("forward", "saving") else Broken()
    more = {"gradient_checkpointing": stop == "later"}
    model = stopped(EVERY[tuner], stop, error, tmp_path, monkeypatch, **more)
    assert trained_numbers(tuners.prepare(model, "full")) == trained_numbers(model)


@pytest.mark.parametrize("tuner", ["lora", "sparsegrad", "ffn"])
def test_a_run_that_stopped_goes_on(tuner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(EVERY[tuner], "later", KeyboardInterrupt(), tmp_path / "a", monkeypatch)

    def start() -> Any:
        model: Any = bert()
        model.bert.embeddings.requires_grad_(False)
        return model

    resumed = fit(start(), tmp_path / "a", tuner=EVERY[tuner], save_every=5)
    whole = fit(start(), tmp_path / "b", tuner=EVERY[tuner], save_every=5)
    assert_same(resumed.model, whole.model)


def test_updates_that_were_there_stay_where_a_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = bert()
    kept = train(
        model, TOKENIZER, TASK, splits(), settings(epochs=1), tuner=EVERY["mask"], out_dir=tmp_path / "a",
        progress=False, merge=False,
    ).model  # fmt: skip
    before = shape_of(kept)
    with monkeypatch.context() as patch:
        _later(patch, Broken())
        with pytest.raises(Broken):
            train(
                kept, TOKENIZER, TASK, splits(), settings(), tuner=EVERY["mask"], out_dir=tmp_path / "b",
                progress=False, go_on=True,
            )  # fmt: skip
    assert shape_of(kept) == before and any(isinstance(m, ReparametrizedLinear) for m in kept.modules())
