"""What every method promises: it plans and changes nothing; its plans apply, fold, save and load exactly."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ffnkit as fk
from ffnkit.errors import FfnkitError
from ffnkit.plans import Plan
from ffnkit.testing.contract import (
    EXACT,
    RELOADED,
    Case,
    checking,
    difference,
    distance,
    eager,
    loss,
    require,
    snapshot,
    special_layers,
    ties,
)
from ffnkit.testing.edits import check_edits_of

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_method(
    method: Callable[[], Any], case: Case, *, dtypes: tuple[torch.dtype, ...] = DTYPES, folder: str | Path | None = None
) -> None:
    """Raises ContractError, naming the check, where a method does not keep what methods promise.

    Args:
        method: makes it, with settings that suit the case. case: a model to try it on.
        dtypes: of the models that are planned for; the other checks take float32, and float64 for folding.
        folder: where checkpoints are written; None takes a temporary one.
    """
    _settings(method)
    for dtype in dtypes:
        _planning(method, case, dtype)
    model = case.model()
    plan = planned(method, case, model)
    check_edits_of(plan, case)
    _applying(plan, case)
    _folding(method, case)
    _training(plan, case)
    with tempfile.TemporaryDirectory() as temporary:
        _saved_plan(plan, case, Path(folder or temporary))
        _checkpoints(plan, case, Path(folder or temporary))


def planned(method: Callable[[], Any], case: Case, model: Any) -> Plan:
    """The plan of a method for a model of the case."""
    return fk.plan(model, method(), data=case.batches(model))


def _settings(method: Callable[[], Any]) -> None:
    name = "settings round-trip"
    with checking(name):
        given = method()
        again = type(given)(**given.settings())
        require(again.settings() == given.settings(), name, f"{given.settings()} became {again.settings()}")


def _planning(method: Callable[[], Any], case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype).train()
    before = snapshot(model)
    with checking("planning"):
        plan = planned(method, case, model)
    written = difference(before, snapshot(model))
    require(not written, "planning writes nothing", f"{written} changed ({dtype})")
    with checking("planning"):
        torch.manual_seed(1)
        again = planned(method, case, model)
    require(plan == again, "plans are deterministic", f"two plans for one model differ ({dtype})")
    text = str(plan)
    places = [name for edit in plan.edits for name in edit.touched]
    missing = next((name for name in places if name not in text), None)
    require(bool(plan.edits) and missing is None, "plans print what they edit", f"{missing or 'no edit'} in:\n{text}")


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
        count = sum(p.numel() for p in model.parameters())
        said = plan.parameters - plan.saved_parameters
        require(count == said, "plans count what they save", f"{said:,} parameters planned, {count:,} there")
    state = snapshot(model)
    with checking("apply refuses what does not fit"):
        try:
            fk.apply(model, plan)
        except FfnkitError:
            pass
        else:
            kept = all(edit.bears_updates or edit.zeros is not None for edit in plan.edits)
            require(kept, "apply refuses what does not fit", "a plan was applied twice")
            return
    left = difference(state, snapshot(model))
    require(not left, "what is refused changes nothing", f"{left} changed")


def _still_tied(group: frozenset[str], model: Any) -> bool:
    now = dict(model.named_parameters(remove_duplicate=False))
    here = {id(now[name]) for name in group if name in now}
    return len(here) <= 1


def _folding(method: Callable[[], Any], case: Case) -> None:
    original = eager(case.model().double())
    model = copy.deepcopy(original)
    with checking("folding"):
        fk.apply(model, planned(method, case, case.model()))
        eager(model)
        before = case.run(model)
        for parameter in fk.trainable_parameters(model):
            parameter.data.add_(torch.full_like(parameter, 1e-3))
        trained = case.run(model)
        require(distance(trained, before) > 0, "folding", "what trains has no part in the outputs")
        require(fk.fold(model) is model, "folding", "another object than the model came back")
        gap = distance(case.run(eager(model)), trained)
    require(gap < EXACT, "fold keeps outputs", f"they differ by {gap:.2g}, relative (float64)")
    left = special_layers(model)
    require(not left, "fold leaves plain layers", f"{left[:1]} is none")
    with checking("folding"):
        again = case.run(fk.fold(model))
    require(distance(again, case.run(model)) == 0, "fold keeps outputs", "folded twice they differ")


def _training(plan: Plan, case: Case) -> None:
    model = case.model()
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    fk.apply(model, plan)
    claimed = {id(p) for p in fk.trainable_parameters(model)}
    here = {id(p) for p in model.parameters() if p.requires_grad}
    require(claimed == here, "what is said to train trains", f"{len(claimed)} said, {len(here)} there")
    with checking("gradients"):
        outputs = case.run(eager(model), grad=True)
        loss(outputs).backward()
    got = [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    require(not got, "what does not train has no gradient", f"{got[:1]} has one")
    reached = [n for n, p in model.named_parameters() if p.grad is not None]
    require(bool(reached), "gradients reach what trains", "none has one")
    if not plan.trains:
        stopped = [n for n, p in model.named_parameters() if not p.requires_grad and n in before]
        require(not stopped, "what trained trains on", f"{stopped[:1]} does not")


def _saved_plan(plan: Plan, case: Case, folder: Path) -> None:
    name = "a saved plan applies equally"
    with checking(name):
        plan.save(folder / "plan.safetensors")
        loaded = Plan.load(folder / "plan.safetensors")
        require(loaded == plan, name, "what is read back is another plan")
        require(str(loaded) == str(plan) or bool(plan.report), name, "it prints otherwise")
        first, second = fk.apply(case.model(), plan), fk.apply(case.model(), loaded)
        odd = difference(snapshot(first), snapshot(second), identity=False)
        require(not odd, name, f"{odd} differs")


def _checkpoints(plan: Plan, case: Case, folder: Path) -> None:
    model = eager(fk.apply(case.model(), plan))
    expected, before = case.run(model), snapshot(model)
    with checking("the compact form reloads"):
        fk.save(model, folder / "compact")
        gap = distance(case.run(eager(fk.load(folder / "compact"))), expected)
        require(gap < RELOADED, "the compact form reloads", f"outputs differ by {gap:.2g}, relative")
    with checking("the standard form reloads"):
        fk.export(model, folder / "standard")
        plain = eager(type(model).from_pretrained(folder / "standard"))
        gap = distance(case.run(plain), expected)
        require(gap < RELOADED, "the standard form reloads", f"outputs differ by {gap:.2g}, relative")
        require(not special_layers(plain), "the standard form reloads", "it holds reparametrized layers")
    odd = difference(before, snapshot(model))
    require(not odd, "saving changes nothing", f"{odd} changed")
