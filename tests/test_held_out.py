"""What judges a fit was never seen by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES

import ffnkit as fk
from ffnkit.calibration.hooks import Activations
from ffnkit.methods.common import lifted
from ffnkit.methods.narrow.judging import Judged
from ffnkit.methods.narrow.observed import Part
from ffnkit.model.finding import ffns
from ffnkit.ops import local
from ffnkit.ops.apart import FEWEST, RUN, held_out
from ffnkit.ops.neurons import Neurons


def _call(tokens: int, d: int = 3, ff: int = 5) -> Activations:
    draw = torch.Generator().manual_seed(tokens)
    x, h = torch.randn(tokens, d, generator=draw), torch.randn(tokens, ff, generator=draw)
    return Activations(x, h, x, torch.arange(tokens).float() + 1, 0)


@pytest.mark.parametrize(("tokens", "together"), [(57, 1), (160, RUN), (4096, RUN)])
def test_a_tenth_is_held_out_in_runs_of_neighbours(tokens: int, together: int) -> None:
    call = _call(tokens)
    fitted, apart = call.apart()
    assert apart.weights is not None and fitted.weights is not None
    places = apart.weights.long() - 1
    assert torch.equal(torch.cat((fitted.weights, apart.weights)).sort().values, call.weights)  # each once
    assert abs(len(places) - tokens / 10) <= together
    assert bool((places // together % 10 == 9).all())
    assert torch.equal(call.input[places], apart.input)
    assert torch.equal(call.hidden[places], apart.hidden)


def test_the_sums_are_of_the_fitted_tokens_alone() -> None:
    call, part = _call(400), Part(1000)
    part.update(call)
    rows = [(h, w) for n, (h, w) in enumerate(zip(call.hidden, call.weights, strict=True)) if n // RUN % 10 != 9]
    gram = sum(w * torch.outer(h, h) for h, w in rows) / sum(w for _, w in rows)
    assert torch.allclose(part.moments.second().float(), gram, rtol=1e-5, atol=1e-6)
    every = torch.einsum("nf,ng,n->fg", call.hidden, call.hidden, call.weights) / call.weights.sum()
    assert not torch.allclose(part.moments.second().float(), every, rtol=1e-3)  # the control
    held, apart = torch.cat(part.held.inputs), torch.cat(part.apart.inputs)
    assert len(held) + len(apart) == 400
    assert not bool((held[:, None] == apart[None]).all(-1).any())


def test_the_error_is_that_of_a_loop_over_half_of_the_tokens_held_out() -> None:
    draw = torch.Generator().manual_seed(0)
    old = Neurons(torch.randn(6, 3, generator=draw), torch.randn(3, 6, generator=draw))
    new = old.take(torch.tensor([0, 2, 5]))
    part, call = Part(0), _call(400)
    part.update(replace(call, hidden=local.hidden(old, call.input, torch.relu)))
    places = torch.nonzero(held_out(400)).flatten()
    places = places[torch.arange(len(places)) // RUN % 2 == 0]
    assert call.weights is not None
    x, w = call.input[places], call.weights[places]
    outs = [(old.down @ torch.relu(old.up @ each), new.down @ torch.relu(new.up @ each)) for each in x]
    mean = sum(k * a for k, (a, _) in zip(w, outs, strict=True)) / w.sum()
    lost = sum(k * (a - b).square().sum() for k, (a, b) in zip(w, outs, strict=True))
    spread = sum(k * (a - mean).square().sum() for k, (a, _) in zip(w, outs, strict=True))
    judged = Judged(old, part, [torch.relu], torch.float32)
    assert judged.error(new) == pytest.approx(float(lost / spread), rel=1e-5)
    assert torch.allclose(judged.gives(old, x)[0], outs[0][0], atol=1e-5)


@pytest.mark.parametrize("refine", [0, 5])
def test_tokens_that_tell_the_error_change_no_weight(refine: int) -> None:
    ffn = ffns(FAMILIES["bert"].model())[0]
    method, old = fk.CalibratedFusion(width=0.5, refine=refine), lifted(ffn.raw())
    tokens = 40 * FEWEST
    apart = torch.nonzero(held_out(tokens)).flatten()
    odd = torch.arange(len(apart)) // RUN % 2 == 1
    tells, decides = apart[~odd], apart[odd]

    def fitted(places: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
        x = torch.randn(tokens, old.up.shape[1], generator=torch.Generator().manual_seed(1))
        x[places] *= scale
        hidden = local.hidden(old, x, torch.nn.functional.gelu)
        part = Part(tokens)
        part.update(Activations(x, hidden, hidden @ old.down.T))
        one = method._fit(ffn, old, part, 20, 0)
        return one.neurons.down, one.error

    (one, error), (two, other) = fitted(tells, 1.0), fitted(tells, 3.0)
    assert torch.equal(one, two)
    assert error != other  # the control: the tokens did change
    assert not torch.equal(one, fitted(decides, 3.0)[0])  # and those that decide do
