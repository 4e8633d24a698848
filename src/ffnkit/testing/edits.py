"""What every kind of edit promises: pure numbers, a structure that the meta device has too, and an undo."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ffnkit.edits import Edit, build, known
from ffnkit.edits.order import check_normal
from ffnkit.plans import Plan
from ffnkit.surgery.journal import journal
from ffnkit.surgery.meta import rehearse
from ffnkit.surgery.writer import ModelWriter
from ffnkit.testing.contract import Case, checking, difference, require, snapshot


class _Undone(Exception):
    pass


def check_edit(edit: Edit, case: Case) -> None:
    """Raises ContractError, naming the check, where an edit does not keep what edits promise.

    Args:
        edit: made for the case's model.
    """
    check_edits_of((edit,), case)


def check_edits_of(plan: Plan | tuple[Edit, ...], case: Case) -> None:
    """:func:`check_edit` for all edits of a plan together."""
    edits = plan.edits if isinstance(plan, Plan) else plan
    for edit in edits:
        _as_data(edit)
    model = case.model()
    before = snapshot(model)
    storages = [(t, t.detach().clone()) for t in (p.data for p in model.parameters())]
    with checking("edits are checked"):
        check_normal(edits)
        ModelWriter(model).check(edits)
    with checking("the rehearsal has the shapes of what comes"):
        twin = rehearse(model, edits)
    odd = difference(before, snapshot(model))
    require(not odd, "checking and rehearsing write nothing", f"{odd} changed")
    with checking("an edit is undone"):
        try:
            with journal(model):
                ModelWriter(model).carry_out(edits)
                after = copy.deepcopy(snapshot(model))
                raise _Undone
        except _Undone:
            pass
    wrote = [i for i, (data, bits) in enumerate(storages) if not torch.equal(data, bits)]
    require(not wrote, "numbers are new tensors", f"{len(wrote)} of the old ones were written to")
    odd = difference(before, snapshot(model))
    require(not odd, "an edit is undone", f"{odd} is not as before")
    _alike(twin, after)


def _as_data(edit: Edit) -> None:
    name = "edits are data"
    with checking(name):
        require(
            type(edit) in known(), name, f"{type(edit).__name__} is no known kind: name it in EDITS or entry points"
        )
        again = build(edit.kind, edit.settings(), edit.tensors(), edit.version)
        require(again.settings() == edit.settings(), name, f"{edit.settings()} became {again.settings()}")
        require(isinstance(edit.asked, str) and edit.stage is not None, name, "it says neither stage nor what is asked")


def _alike(twin: Any, after: Any) -> None:
    name = "the rehearsal has the shapes of what comes"
    rehearsed = snapshot(twin)
    frozen = {n.rpartition(".")[0] for n in after["tensors"] if n.endswith(".fingerprint")}  # updates: by their numbers
    shapes = {n: (tuple(t.shape), t.dtype) for n, (t, _, _) in rehearsed["tensors"].items()}
    for key, (tensor, _, _) in after["tensors"].items():
        if key.rpartition(".")[0] not in frozen or key.endswith(".base"):
            found = shapes.get(key)
            want = (tuple(tensor.shape), tensor.dtype)
            require(found == want, name, f"{key} is {found} there, and {want} in memory")
    kinds = {n: kind for n, (kind, _, _) in rehearsed["modules"].items()}
    odd = [n for n, (kind, _, _) in after["modules"].items() if kinds.get(n) is not kind]
    require(not odd, name, f"module {odd[:1]} is another one")
    require(rehearsed["config"] == after["config"], name, "the configs differ")
