"""What the regression of data-aware fusion counts errors by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from methods import case_of
from torch import Tensor

import ffnkit as fk
from ffnkit.methods import deciding
from ffnkit.methods.calibrating import calibrate
from ffnkit.methods.narrow import calibrated
from ffnkit.ops import local
from ffnkit.ops.neurons import Neurons


def counted(neurons: Neurons, x: Tensor, target: Tensor, metric: Tensor) -> float:
    """The mean of e^T M e, number by number."""
    total = 0.0
    for e in (local.forward(neurons, x, torch.relu) - target).double():
        for i, left in enumerate(e):
            for j, right in enumerate(e):
                total += float(left * metric[i, j].double() * right)
    return total / len(x)


def drawn() -> tuple[Neurons, Tensor, Tensor]:
    """Three neurons, 300 inputs, and targets that three neurons cannot give."""
    draw = torch.Generator().manual_seed(0)
    start = Neurons(torch.randn(3, 4, generator=draw), torch.randn(4, 3, generator=draw))
    x = torch.randn(300, 4, generator=draw)
    wide = Neurons(torch.randn(12, 4, generator=draw), torch.randn(4, 12, generator=draw))
    return start, x, local.forward(wide, x, torch.relu)


def fit(dimensions: Tensor | None) -> Neurons:
    start, x, target = drawn()
    draw = torch.Generator().manual_seed(1)
    return local.regress(start, local.Sample(x, target), torch.relu, steps=150, generator=draw, dimensions=dimensions)


def test_a_matrix_counts_as_the_form_that_it_is() -> None:
    _, x, target = drawn()
    direction = torch.tensor([1.0, -1.0, 1.0, 1.0])
    metric = torch.outer(direction, direction) + 0.01 * torch.eye(4)
    mine, plain = fit(metric), fit(None)
    assert counted(mine, x, target, metric) < 0.9 * counted(plain, x, target, metric)
    assert counted(plain, x, target, torch.eye(4)) < 0.9 * counted(mine, x, target, torch.eye(4))


def test_a_diagonal_matrix_is_weights_of_the_dimensions() -> None:
    weights = torch.tensor([3.0, 0.5, 0.25, 0.25])
    torch.testing.assert_close(fit(torch.diag(weights)).down, fit(weights).down, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(fit(weights).down, fit(None).down, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_the_information_is_taken_where_it_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name)
    model: Any = FAMILIES[name].model()
    data, asked, regressed = case.batches(model), [], []
    monkeypatch.setattr(calibrated, "fisher", lambda *a, f=calibrated.fisher, **k: asked.append(1) or f(*a, **k))

    def regress(*args: Any, f: Any = local.regress, **given: Any) -> Any:
        regressed.append(given["dimensions"].ndim)
        return f(*args, **given)

    monkeypatch.setattr(local, "regress", regress)
    for metric, refine_metric, refine, times, sides in (
        ("norm", "norm", 2, 0, 1),
        ("norm", "fisher", 2, 1, 2),
        ("fisher", "norm", 2, 1, 1),
        ("norm", "fisher", 0, 0, 0),
        ("norm", None, 2, 0, 1),  # as the choice
        ("fisher", None, 2, 1, 2),
    ):
        asked.clear()
        regressed.clear()
        method = fk.CalibratedFusion(0.5, metric=metric, refine_metric=refine_metric, refine=refine)
        fk.plan(model, method, data=data)
        assert len(asked) == times
        assert set(regressed) == ({sides} if sides else set())


def test_best_takes_more_tokens_and_settings_are_decided_on_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    best = fk.CalibratedFusion(0.5, effort="best")
    assert (best.refine, best.metric, best.refine_metric, best.tokens) == (500, "fisher", None, 65536)
    assert fk.CalibratedFusion(0.5).refine_metric is None
    case = case_of("llama")
    model: Any = FAMILIES["llama"].model()
    data, held = case.batches(model), []
    monkeypatch.setattr(deciding, "HELD", 4)

    def noted(*args: Any, **given: Any) -> Any:
        held.append(given["held"])
        return calibrate(*args, **given)

    monkeypatch.setattr(deciding, "calibrate", noted)
    decided = deciding.decide(model, data, data, fk.CalibratedFusion(0.5, refine=2, tokens=64), {"ridge": (0.2,)})
    assert held == [64] and len(decided.tried) == 2
    few = calibrate(model, data, held=4)  # what as many as before would hold
    with pytest.raises(fk.FfnkitError, match="tokens were kept, and 64 are asked for"):
        fk.plan(model, fk.CalibratedFusion(0.5, refine=2, tokens=64), data=few)


@pytest.mark.parametrize("gives", [local.hidden, local.forward])
def test_an_activation_is_found_among_what_is_none(gives: Any) -> None:
    """Beside an FFN stand modules that take other things than numbers one by one, and raise whatever they raise."""

    def transform(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fftn(x, dim=(1, 2)).real  # FNet's, of (batch, tokens, d)

    def asking(x: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such state")

    neurons = Neurons(up=torch.randn(6, 4), down=torch.randn(4, 6))
    x = torch.randn(5, 4)
    silu = torch.nn.functional.silu
    observed = gives(neurons, x, silu)
    others: list[Any] = [transform, asking, torch.tanh]
    assert local.activation_of(neurons, x, observed, [*others, silu], gives) is silu
    assert local.activation_of(neurons, x, observed, others, gives) is None


@pytest.mark.parametrize(
    "method",
    [fk.CalibratedFusion(width=0.5, refine=2), fk.CalibratedMerging(layers=[0, 1], refine=2)],
    ids=["fusion", "merging"],
)
def test_an_ffn_beside_a_fourier_transform_is_fitted(method: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 50}
    model = transformers.FNetForMaskedLM(transformers.FNetConfig(**sizes)).eval()
    data = [{"input_ids": torch.randint(3, 50, (4, 20))}]
    fk.apply(model, fk.plan(model, method, data=data))
    assert torch.isfinite(model(**data[0]).logits).all()
