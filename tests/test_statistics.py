"""Statistics: two halves merged are all, what is saved is what is loaded, of one model and its data only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.fingerprints import batch_fingerprint, model_fingerprint
from ffnkit.calibration.gradients import weight_gradients
from ffnkit.calibration.statistics import (
    ColumnSquares,
    GradientSquares,
    HeldInputs,
    HiddenMoments,
    NeuronSquares,
    RoutingCounts,
    Rows,
    Statistics,
)
from ffnkit.errors import FfnkitError
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.finding import ffns

OF_FFNS: dict[str, Callable[[str], Any]] = {
    "neurons": lambda _: NeuronSquares(),
    "moments": lambda _: HiddenMoments(),
    "held": lambda _: HeldInputs(10),
    "routing": lambda _: RoutingCounts(),
    "part": lambda _: Part(10),
}
FAMILY_NAMES = ("bert", "t5", "mixtral", "switch", "clip")


def _data(name: str) -> tuple[nn.Module, list[Batch]]:
    model = FAMILIES[name].model()
    return model, [FAMILIES[name].inputs(model, seed=seed) for seed in range(4)]


def _gap(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    if set(one) != set(two) or any(one[k].shape != two[k].shape for k in one):
        return float("inf")
    return max(
        (float((one[k] - two[k]).double().norm() / two[k].double().norm().clamp_min(1e-12)) for k in one), default=0.0
    )


def _states(statistics: Statistics[Any]) -> dict[str, Tensor]:
    return {f"{key} {name}": v for key, part in statistics.parts.items() for name, v in part.state_dict().items()}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("kind", OF_FFNS)
def test_halves_merged_are_all_and_loaded_is_saved(kind: str, family: str, tmp_path: Path) -> None:
    model, batches = _data(family)
    found, make = ffns(model), OF_FFNS[kind]
    every = Statistics.collect(model, batches, found, make)
    half = Statistics.collect(model, batches[:2], found, make)
    assert _gap(_states(half), _states(every)) > 1e-3 or kind == "held"  # the negative control
    half.merge(Statistics.collect(model, batches[2:], found, make))
    assert _gap(_states(half), _states(every)) < 1e-6
    assert (half.model, half.data) == (every.model, every.data)
    path = tmp_path / "statistics.safetensors"
    every.save(path)
    loaded = Statistics.load(path, make, model)
    assert _gap(_states(loaded), _states(every)) == 0
    assert (loaded.model, loaded.data) == (every.model, every.data)
    loaded.merge(half)  # what is loaded goes on
    if kind == "neurons":
        for key, part in every.parts.items():
            assert torch.allclose(loaded.parts[key].sums["count"], 2 * part.sums["count"])


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (ColumnSquares, lambda rows: (rows, None)),
        (ColumnSquares, lambda rows: (rows, (rows[:, 0] > 0).float())),
        (GradientSquares, lambda rows: rows[:5]),
        (lambda: Rows(17), lambda rows: rows),
    ],
    ids=["columns", "weighed columns", "gradients", "rows"],
)
def test_accumulators_of_tensors_merge_and_load(make: Callable[[], Any], given: Callable[[Tensor], Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 5, generator=draw) for _ in range(4)]
    every, first, second = make(), make(), make()
    for number, each in enumerate(rows):
        every.update(given(each))
        (first if number < 2 else second).update(given(each))
    assert _gap(first.state_dict(), every.state_dict()) > 1e-3
    first.merge(second)
    assert _gap(first.state_dict(), every.state_dict()) < 1e-6
    fresh = make()
    fresh.merge(make())  # nothing to nothing
    assert not fresh.state_dict()
    fresh.load(every.state_dict())
    assert _gap(fresh.state_dict(), every.state_dict()) == 0


def test_gradients_of_halves_merged_are_those_of_all() -> None:
    model, batches = _data("bert")
    batches = [{**batch, "labels": torch.tensor([0, 1])} for batch in batches]
    linears: dict[str, nn.Module] = {ffns(model)[0].name: ffns(model)[0].linear("up")}  # type: ignore[dict-item]
    sums = [GradientSquares() for _ in range(3)]
    for one, data in zip(sums, (batches, batches[:1], batches[1:]), strict=True):
        weight_gradients(model, data, linears, lambda _, gradient, one=one: one.update(gradient))
    assert _gap(sums[1].state_dict(), sums[0].state_dict()) > 1e-3
    sums[1].merge(sums[2])
    assert _gap(sums[1].state_dict(), sums[0].state_dict()) < 1e-5


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    model, batches = _data("bert")
    make = OF_FFNS["neurons"]
    one = Statistics.collect(model, batches, ffns(model), make)
    one.save(tmp_path / "one")
    other = FAMILIES["bert"].model(seed=5)
    with pytest.raises(FfnkitError, match="two models"):
        one.merge(Statistics.collect(other, batches, ffns(other), make))
    with pytest.raises(FfnkitError, match="other weights"):
        Statistics.load(tmp_path / "one", make, other)
    with pytest.raises(FfnkitError, match="cannot be read"):
        Statistics.load(tmp_path / "none", make)


def test_fingerprints_tell_models_and_data_apart() -> None:
    model, batches = _data("bert")
    print_ = model_fingerprint(model)
    assert model_fingerprint(FAMILIES["bert"].model()) == print_
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert model_fingerprint(model) != print_
    assert batch_fingerprint(batches[0]) == batch_fingerprint(dict(batches[0])) != batch_fingerprint(batches[1])
