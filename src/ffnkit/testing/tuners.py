"""What every tuner promises: what it says trains trains, and a finished or abandoned model is a plain one."""

from __future__ import annotations

from typing import Any

import torch

from ffnkit.testing.contract import Case, checking, difference, distance, eager, loss, require, snapshot, special_layers
from ffnkit.tune import trainable_parameters
from ffnkit.tune.tuners import finish, get, prepare


def check_tuner(tuner: str | dict[str, Any], case: Case) -> None:
    """Raises ContractError, naming the check, where a tuner does not keep what tuners promise.

    Args:
        tuner: a name, or a mapping of name and settings.
    """
    name = tuner if isinstance(tuner, str) else str(tuner.get("name"))
    original = case.model()
    classes = [type(m) for m in original.modules()]
    flags = {n: p.requires_grad for n, p in original.named_parameters()}
    model = case.model()
    with checking("preparing"):
        tuned = prepare(model, get(tuner))
        start = case.run(eager(tuned))
    gap = distance(start, case.run(eager(original)))
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
        plain = finish(tuned, get(tuner))
    gap = distance(case.run(eager(plain)), trained)
    require(gap < 1e-4, "finish keeps outputs", f"they differ by {gap:.2g}, relative ({name})")
    require(not special_layers(plain), "finish gives a plain model", f"{special_layers(plain)[:1]} is left ({name})")
    same = [type(m) for m in plain.modules()] == classes
    require(same, "finish gives a plain model", f"its modules are of other classes ({name})")
    now = {n: p.requires_grad for n, p in plain.named_parameters()}
    require(now == flags, "flags come back", f"other parameters train than before ({name})")
    _refusing(name, case)


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
        raise AssertionError("targets that match nothing were not refused")
