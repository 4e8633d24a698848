"""What every method promises: it plans and changes nothing; its plans apply, fold, save and load exactly."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.plans import Plan
from ffnkit.testing.contract import (
    EXACT,
    Case,
    checking,
    difference,
    distance,
    eager,
    missed,
    reached,
    require,
    routed,
    snapshot,
    special_layers,
    stir,
    ties,
)
from ffnkit.testing.edits import check_edits_of, check_saved
from ffnkit.testing.forms import check_forms, check_usual

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ROUNDED = 16 * torch.finfo(torch.bfloat16).eps  # relative: folding in bfloat16, over a few layers


def check_method(
    method: Callable[[], Any], case: Case, *, dtypes: tuple[torch.dtype, ...] = DTYPES, folder: str | Path | None = None
) -> None:
    """Raises ContractError, naming the check, where a method does not keep what methods promise.

    Args:
        method: makes it, with settings that suit the case. case: a model to try it on.
        dtypes: of the models that are planned for, and folded.
        folder: where checkpoints stay, for :func:`ffnkit.testing.check_reopened`; None takes a temporary one.
    """
    _settings(method)
    for dtype in dtypes:
        _planning(method, case, dtype)
    plan = planned(method, case, case.model())
    check_edits_of(plan, case)
    _applying(plan, case)
    _refusing(plan, case)
    _folding(plan, case, torch.float64, EXACT)
    if torch.bfloat16 in dtypes:
        _folding(plan, case, torch.bfloat16, ROUNDED)
    _training(plan, case)
    with tempfile.TemporaryDirectory() as temporary:
        check_saved(plan, case)
        check_forms(plan, case, Path(folder or temporary))


def planned(method: Callable[[], Any], case: Case, model: Any) -> Plan:
    """The plan of a method for a model of the case."""
    return fk.plan(model, method(), data=case.batches(model))


def _settings(method: Callable[[], Any]) -> None:
    name = "settings round-trip"
    with checking(name):
        given = method()
        own = given.settings()
        again = type(given)(**own).settings()
        require(again == own, name, f"{own} became {again}")
        text = json.dumps(own)
        again = type(given)(**json.loads(text)).settings()
        require(json.dumps(again) == text, name, f"{own} became {again} through JSON")


def _planning(method: Callable[[], Any], case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype).train()
    next(model.parameters()).requires_grad_(False)
    case.run(model)  # some routers cast their own weights when they first run
    before = snapshot(model)
    with checking("planning"), global_seeds(0):
        plan = planned(method, case, model)
    written = difference(before, snapshot(model))
    require(not written, "planning writes nothing", f"{written} changed ({dtype})")
    left = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    require(not left, "planning writes nothing", f"{left[:1]} got a gradient ({dtype})")
    with checking("planning"), global_seeds(1):
        again = planned(method, case, model)
    require(plan == again, "plans are deterministic", f"two plans for one model differ ({dtype})")
    text = str(plan)
    require(text == str(again) or bool(plan.report), "plans are deterministic", f"one prints otherwise ({dtype})")
    places = [name for edit in plan.edits for name in (*edit.touched, edit.target)]
    missing = next((name for name in places if name not in text), None)
    require(bool(plan.edits) and missing is None, "plans print what they edit", f"{missing or 'no edit'} in:\n{text}")


@contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Other states of all global generators inside; those from before after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _applying(plan: Plan, case: Case) -> None:
    model = case.model()
    before, tied = snapshot(model), ties(model)
    places = [name for edit in plan.edits for name in (*edit.touched, *edit.claimed, edit.target)]
    tensors = [(t, t.clone()) for edit in plan.edits for t in edit.tensors().values()]
    with checking("applying"):
        require(fk.apply(model, plan) is model, "applying", "another object than the model came back")
    require(bool(difference(before, snapshot(model))), "applying", "nothing changed")
    now = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, (tensor, bits, _) in before["tensors"].items():
        inside = any(not place or name.startswith(f"{place}.") for place in places)
        if inside or any(edit.renumbers for edit in plan.edits):
            continue
        same = name in now and now[name] is tensor and torch.equal(now[name], bits)
        shared = any(name in group and any(o.startswith(f"{p}.") for o in group for p in places) for group in tied)
        require(same or shared, "apply touches what the plan names", f"{name} changed too")
    lost = [group for group in tied if not _still_tied(group, model)]
    require(not lost, "ties stay ties", f"{sorted(map(sorted, lost))[:1]} are no longer one")
    changed = next((t for t, old in tensors if not torch.equal(t, old)), None)
    require(changed is None, "a plan's tensors are its own", "applying the plan changed one of them")
    if not plan.trains:
        flags = [n for n, (_, _, trains) in before["tensors"].items() if n in now and now[n].requires_grad != trains]
        require(not flags, "apply touches what the plan names", f"whether {flags[:1]} trains")
        count = sum(p.numel() for p in model.parameters())
        said = plan.parameters - plan.saved_parameters
        require(count == said, "plans count what they save", f"{said:,} parameters planned, {count:,} there")


def _refusing(plan: Plan, case: Case) -> None:
    """A plan fits the model that it was made for, once."""
    name = "apply refuses what does not fit"
    repeats = all(edit.bears_updates or edit.zeros is not None for edit in plan.edits)
    models = [] if repeats else [("twice", fk.apply(case.model(), plan))]
    other = None if case.other is None else case.other()
    if other is not None and _shapes(plan, other) != _shapes(plan, case.model()):
        models.append(("to a model of another shape", other))
    for how, model in models:
        state = snapshot(model)
        with checking(name):
            try:
                fk.apply(model, plan)
            except FfnkitError:
                pass
            else:
                require(False, name, f"a plan was applied {how}")
        left = difference(state, snapshot(model))
        require(not left, "what is refused changes nothing", f"{left} changed, refused {how}")


def _shapes(plan: Plan, model: Any) -> dict[str, torch.Size]:
    """The shapes of what the edits of a plan are about."""
    places = tuple(f"{name}." for edit in plan.edits for name in (*edit.touched, *edit.claimed, edit.target) if name)
    return {name: value.shape for name, value in model.state_dict().items() if name.startswith(places)}


def _still_tied(group: frozenset[str], model: Any) -> bool:
    now = dict(model.named_parameters(remove_duplicate=False))
    here = {id(now[name]) for name in group if name in now}
    return len(here) <= 1


def _folding(plan: Plan, case: Case, dtype: torch.dtype, limit: float) -> None:
    model = eager(case.model().to(dtype))
    with checking("folding"):
        fk.apply(model, plan)
        eager(model)
        before = case.run(model)
        stir(model)
        trained = case.run(model)
        require(distance(trained, before) > 0, "folding", "what trains has no part in the outputs")
        differ = tuple(f"{owner}." for ffn in ffns(model) if ffn.differing for owner in ffn.owners)
        tied = [group for group in ties(model) if not any(name.startswith(differ) for name in group if differ)]
        require(fk.fold(model) is model, "folding", "another object than the model came back")
        gap = distance(case.run(eager(model)), trained)
    require(gap < limit, "fold keeps outputs", f"they differ by {gap:.2g}, relative ({dtype})")
    left = special_layers(model)
    require(not left, "fold leaves plain layers", f"{left[:1]} is none")
    check_usual(model, case.model(), "fold leaves plain layers")
    lost = [group for group in tied if not _still_tied(group, model)]
    require(not lost, "ties stay ties", f"{sorted(map(sorted, lost))[:1]} are no longer one, folded")
    with checking("folding"):
        again = case.run(fk.fold(copy.deepcopy(model)))
    require(distance(again, case.run(model)) == 0, "fold keeps outputs", "folded twice they differ")


def _training(plan: Plan, case: Case) -> None:
    original, model = eager(case.model().double()), fk.apply(eager(case.model().double()), plan)
    claimed = {id(p) for p in fk.trainable_parameters(model)}
    here = {id(p) for p in model.parameters() if p.requires_grad}
    require(claimed == here, "what is said to train trains", f"{len(claimed)} said, {len(here)} there")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    known = {n for n, p in original.named_parameters() if p.requires_grad}
    with checking("gradients"):
        stir(original)
        stir(model)
        expected = reached(original, case.run(original, grad=True))
        got = reached(eager(model), case.run(model, grad=True))
    chance = routed(original) | routed(model)
    lost = missed(model, original, got, expected)
    require(not lost, "gradients reach what trains", f"none reaches {lost[:1]}")
    require(bool(got), "gradients reach what trains", "none has one")
    if not plan.trains:
        stopped = known & {n for n, _ in model.named_parameters()} - trains
        require(not stopped, "what trained trains on", f"{sorted(stopped)[:1]} does not")
        more = (got & known) - expected - chance
        require(not more, "gradients reach what trains", f"{sorted(more)[:1]} had none before")
