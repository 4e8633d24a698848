"""No stage loses what an earlier one saved: every pair of docs/composition.md, through training, saving and opening."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import EVERY, TUNERS, case_of, slow_but

import ffnkit as fk
from ffnkit.checkpoint.added import without_added
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attentions
from ffnkit.model.finding import ffns
from ffnkit.model.linear import added_to
from ffnkit.nn.lowrank import LowRank
from ffnkit.nn.masked import Masked
from ffnkit.surgery.apply import SAVING
from ffnkit.testing.contract import distance
from ffnkit.tune import tuners

FIRST: dict[str, Any] = {
    "fused": lambda: fk.Fusion(width=0.5, restarts=1),
    "narrowed": lambda: EVERY["magnitude"](),
    "merged": lambda: EVERY["merging"](),
    "factored": lambda: EVERY["svd"](),
    "heads": lambda: fk.RemoveHeads(remove=1),
    "pruned": lambda: fk.Prune(sparsity=0.5),
    "pruned FFNs": lambda: EVERY["unstructured"](),
}
SECOND = ("magnitude", "fusion", "svd", "merging", "heads", "prune", "unstructured", "sparsegrad", "dsee")
STAGES = [f"tune {name}" for name in TUNERS] + list(SECOND)


def saved(model: Any) -> dict[str, Any]:
    """What a model does not have or hold any more, in numbers that no later stage may raise."""
    thin = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRank)}
    filled = {name: int(m.mask.sum()) for name, m in model.named_modules() if isinstance(m, Masked)}
    found = fk.inspect(model)
    return {
        "parameters": found.parameters,
        "FLOPs": found.flops_per_token,
        "neurons": sum(ffn.width for ffn in ffns(model)),
        "FFNs": len(ffns(model)),
        "heads": sum(each.heads for each in attentions(model)),
        **{f"rank of {name}": rank for name, rank in thin.items()},
        **{f"weights of {name}": count for name, count in filled.items()},
    }


def lost(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What is more than it was, or forgotten."""
    for name, value in before.items():
        # of a layer that went there is nothing; where it is there, its rank and its mask are
        if name not in after:
            if not name.startswith(("rank", "weights")):
                yield name
        elif after[name] > value:
            yield name
    for kind in ("rank of", "weights of"):
        names = [sum(name.startswith(kind) for name in each) for each in (before, after)]
        if names[1] < names[0]:
            yield f"{names[0] - names[1]} {kind}"


def second(model: Any, stage: str, data: list[dict[str, Any]]) -> Any:
    """A stage as the command line does it; what trains takes a step."""
    if not stage.startswith("tune "):
        fk.apply(model, fk.plan(model, EVERY[stage](), data=data))
        return model
    tuner = tuners.get(TUNERS[stage.removeprefix("tune ")])
    tuned = tuner.prepare(model, data)
    parameters = fk.trainable_parameters(tuned)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for batch in data:
        tuned(**batch).loss.backward()
    optimizer.step()
    done: Any = tuner.finish(tuned).eval()
    return done if tuner.stays else fk.fold(done, keep=SAVING)


def both(name: str, first: str, stage: str, folder: Path) -> None:
    family, case = FAMILIES[name], case_of(name)
    model: Any = family.model()
    data = case.batches(model)
    fk.apply(model, fk.plan(model, FIRST[first](), data=data))
    before = saved(model)
    try:
        model = second(model, stage, data)
    except FfnkitError as error:
        known = (
            "Fold",
            "fold",
            "edited already",
            "group of one",
            "one has to stay",
            "has no FFN",
            "no bias",
            "not bear",
        )
        assert any(word in str(error) for word in known), error
        return
    added = added_to(model)
    with without_added(model) if added else nullcontext(model) as below:
        after = saved(below)
    if stage in ("sparsegrad", "dsee"):  # what trains beside the weights is theirs
        for each in (before, after):
            del each["parameters"]
    assert not list(lost(before, after)), f"{first}, then {stage}"
    wanted = family.outputs(model)
    fk.save(model, folder / "compact")
    again: Any = fk.load(folder / "compact")
    assert distance(family.outputs(again.eval()), wanted) < 1e-5
    with without_added(again) if added else nullcontext(again) as below:
        assert not list(lost(before, saved(below))), f"{first}, then {stage}, saved"
    if added:
        return
    report = fk.export(model, folder / "standard")
    assert report.output_error is not None and report.output_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("first", slow_but({"factored", "pruned"}, FIRST))
@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5", "gpt2"))])
def test_no_stage_loses_what_an_earlier_one_saved(name: str, first: str, tmp_path: Path) -> None:
    stages = STAGES if name != "bert" else STAGES[list(FIRST).index(first) % 3 :: 3]
    for stage in stages:
        both(name, first, stage, tmp_path / stage.replace(" ", "-"))


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_and_the_rest_of_the_pairs(first: str, tmp_path: Path) -> None:
    for stage in STAGES:
        both("bert", first, stage, tmp_path / stage.replace(" ", "-"))


def test_folding_all_is_seen_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for first, stage in itertools.product(("factored", "pruned"), ("tune full",)):
        model: Any = FAMILIES["bert"].model()
        data = case_of("bert").batches(model)
        fk.apply(model, fk.plan(model, FIRST[first]()))
        before = saved(model)
        with caplog.at_level(logging.WARNING):
            fk.fold(second(model, stage, data))
        assert list(lost(before, saved(model))), "the control: folding thin pairs and masks loses them"
        assert ("multiplied out" in caplog.text) == (first == "factored")
        caplog.clear()


def test_a_tuner_that_is_abandoned_leaves_masks_and_thin_pairs() -> None:
    for first in ("factored", "pruned", "pruned FFNs"):
        for name in ("lora", "mask", "meprop of outputs"):
            settings = TUNERS[name]
            model: Any = FAMILIES["bert"].model()
            data = case_of("bert").batches(model)
            fk.apply(model, fk.plan(model, FIRST[first]()))
            before, wanted = saved(model), FAMILIES["bert"].outputs(model)
            tuners.get(settings).prepare(model, data)
            back = tuners.get("full").prepare(model)
            assert saved(back) == before, f"{first}, {name}"
            assert distance(FAMILIES["bert"].outputs(back), wanted) < 1e-6


def test_flops_of_a_thin_pair_are_those_of_the_two() -> None:
    model: Any = FAMILIES["bert"].model()
    dense = fk.inspect(model)
    fk.apply(model, fk.plan(model, EVERY["svd"](width=0.5)))
    thin = fk.inspect(model)
    ffn = ffns(model)[0]
    pairs = [m for m in ffn.module.modules() if isinstance(m, LowRank)]
    assert ffn.flops_per_token == sum(2 * m.rank * sum(m.features) for m in pairs) < dense.rows[0].flops_per_token
    gone = sum(row.flops_per_token for row in dense.rows) - sum(row.flops_per_token for row in thin.rows)
    assert dense.flops_per_token - thin.flops_per_token == pytest.approx(gone)
    assert thin.ffn_parameters == sum(row.parameters for row in thin.rows) < dense.ffn_parameters
