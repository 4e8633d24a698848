"""What every tuner promises: what it says trains trains, and a finished or abandoned model is a plain one."""

from __future__ import annotations

import json
from typing import Any

import torch

from ffnkit.checkpoint.added import remove_added
from ffnkit.model.linear import added_to
from ffnkit.testing.contract import (
    Case,
    checking,
    difference,
    distance,
    eager,
    loss,
    missed,
    reached,
    require,
    snapshot,
    special_layers,
    stir,
)
from ffnkit.tune import trainable_parameters
from ffnkit.tune.base import Tuner
from ffnkit.tune.lifecycle import undone
from ffnkit.tune.tuners import finish, get, prepare


def check_tuner(tuner: str | dict[str, Any], case: Case) -> None:
    """Raises ContractError, naming the check, where a tuner does not keep what tuners promise.

    Args:
        tuner: a name, or a mapping of name and settings. case: with data where the tuner reads gradients.
    """
    given = get(tuner)
    _settings(given)
    _abandoned(given, case)
    _gradients(given, case)
    _trained(given, case)
    _refusing(given.name, case)


def _prepared(tuner: Tuner, model: Any, case: Case) -> Any:
    """The model to train, by a tuner that may want batches."""
    with checking("preparing"):
        return tuner.prepare(model, case.batches(model) if getattr(tuner.method, "needs_data", False) else None)


def _settings(tuner: Tuner) -> None:
    name = "settings round-trip"
    with checking(name):
        own = tuner.model_dump(mode="json")
        again = get({"name": tuner.name, **json.loads(json.dumps(own))})
        require(again == tuner, name, f"{own} became {again.model_dump(mode='json')}")


def _abandoned(tuner: Tuner, case: Case) -> None:
    """Finished before the first step it is the very model that it was, and can be prepared again."""
    name = "an untrained model comes back"
    model = eager(case.model())
    next(model.parameters()).requires_grad_(False)
    case.run(model)
    before = snapshot(model)
    for _ in range(2):
        tuned = _prepared(tuner, model, case)
        with checking(name):
            plain = undone(tuned) if tuner.stays else finish(tuned, tuner)
        require(plain is model, name, "another object than the model came back")
        odd = difference(before, snapshot(eager(plain)), identity=False)
        require(not odd, name, f"{odd} is another")


def _gradients(tuner: Tuner, case: Case) -> None:
    """Gradients reach all that trains, but what no output of the model itself depends on."""
    original = eager(case.model().double())
    expected = reached(original, case.run(original, grad=True))
    tuned = eager(_prepared(tuner, eager(case.model().double()), case))
    claimed = {id(p) for p in trainable_parameters(tuned)}
    require(
        claimed == {id(p) for p in tuned.parameters() if p.requires_grad}, "what is said to train trains", tuner.name
    )
    stir(tuned)
    with checking("gradients"):
        got = reached(tuned, case.run(tuned, grad=True))
    lost = missed(tuned, original, got, expected)
    require(not lost, "gradients reach what trains", f"none reaches {lost[:1]}")
    finish(tuned, tuner)


def _trained(tuner: Tuner, case: Case) -> None:
    """Two steps move what trains and nothing else; then a plain model of the same outputs comes back."""
    name, original, model = tuner.name, eager(case.model()), eager(case.model())
    plain_state = snapshot(original)
    tuned = eager(_prepared(tuner, model, case))
    start = case.run(tuned)
    gap = distance(start, case.run(original))
    if tuner.name != "prefix":  # virtual tokens take part in every attention from the start
        require(gap < 1e-5, "a tuner starts from the model", f"outputs differ by {gap:.2g}, relative ({name})")
    training = trainable_parameters(tuned)
    require(bool(training), "something trains", f"nothing does ({name})")
    frozen = {n: p.detach().clone() for n, p in tuned.named_parameters() if not p.requires_grad}
    with checking("training"):
        optimizer = torch.optim.AdamW(training, lr=1e-2)
        for _ in range(2):
            loss(case.run(tuned, grad=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    here = dict(tuned.named_parameters())
    moved = [n for n, bits in frozen.items() if n in here and not torch.equal(here[n], bits)]
    require(not moved, "what is frozen stays", f"{moved[:1]} moved ({name})")
    trained = case.run(eager(tuned))
    require(distance(trained, start) > 1e-6, "training changes the model", f"outputs are as before ({name})")
    with checking("finishing"):
        plain = finish(tuned, tuner)
    gap = distance(case.run(eager(plain)), trained)
    require(gap < 1e-4, "finish keeps outputs", f"they differ by {gap:.2g}, relative ({name})")
    require(bool(added_to(plain)) is tuner.stays, "what stays is on the finished model", name)
    if tuner.stays:
        with checking("taking off what stays"):
            plain = remove_added(plain)
        require(plain is model, "without what stays it is the model", "another object came back")
    require(not special_layers(plain), "finish gives a plain model", f"{special_layers(plain)[:1]} is left ({name})")
    now = snapshot(plain)
    require(now["modules"] == plain_state["modules"], "finish gives a plain model", f"modules are others ({name})")
    require(now["config"] == plain_state["config"], "finish gives a plain model", f"its config is another ({name})")
    flags = [{n: trains for n, (_, _, trains) in state["tensors"].items()} for state in (plain_state, now)]
    odd = [n for n in flags[0] | flags[1] if flags[0].get(n) != flags[1].get(n)]
    require(not odd, "flags come back", f"{odd[:1]} trains otherwise than before ({name})")


def _refusing(name: str, case: Case) -> None:
    """A setting that cannot be met is refused, and changes nothing."""
    kind = type(get(name)) if name != "combined" else None
    if kind is None or "targets" not in kind.model_fields:
        return
    model = case.model()
    before = snapshot(model)
    try:
        prepare(model, {"name": name, "targets": "no_such_module"})
    except Exception:
        odd = difference(before, snapshot(model))
        require(not odd, "what is refused changes nothing", f"{odd} changed ({name})")
    else:
        require(False, "what cannot be met is refused", f"targets that match nothing were taken ({name})")
