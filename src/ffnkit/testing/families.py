"""What a row of a family promises: the FFN that it finds is the FFN that the model computes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ffnkit.calibration.hooks import watch
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN, activations
from ffnkit.model.finding import ffns
from ffnkit.ops import local
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.testing.contract import EXACT, Case, checking, distance, eager, require


def check_family(case: Case) -> None:
    """Raises ContractError, naming the check, where a model's FFNs are not what the row says.

    Permuting the neurons of every FFN leaves the outputs as they were (float64, 1e-12 relative), permuting ``up`` alone
    does not; and ``down (act(gate x) * (up x))`` is what each FFN gives, with the gate under the activation.
    """
    model = eager(case.model().double())
    with checking("the FFNs are found"):
        found = ffns(model)
    expected = case.run(model)
    whole = copy.deepcopy(model)
    for ffn in ffns(whole):
        ffn.write(_permuted(ffn.read()))
    gap = distance(case.run(whole), expected)
    require(gap < EXACT, "neurons can be permuted", f"outputs differ by {gap:.2g}, relative")
    for number, ffn in enumerate(found):
        broken = copy.deepcopy(model)
        target = ffns(broken)[number]
        own = target.read()
        moved = Neurons(**(own.tensors() | {"up": _permuted(own).up}))
        target.write(moved)
        gap = distance(case.run(broken), expected)
        require(gap > 1e-9, "an FFN's weights matter", f"another up in {ffn.name} changes no output")
    _formula(model, found, case)
    for attention in attentions(model):
        require(
            bool(attention.why) or attention.heads > 0, "attentions are described", f"{attention.name} has no heads"
        )


def _permuted(neurons: Neurons) -> Neurons:
    order = torch.arange(neurons.ff).roll(1)
    if not neurons.experts:
        return neurons.take(order)
    return concatenate([neurons.expert(e).take(order) for e in range(neurons.experts)])


def _formula(model: torch.nn.Module, found: list[FFN], case: Case) -> None:
    """Each FFN's output by the canonical formula, with one of the activations that it may have."""
    name = "the gate is under the activation"
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(ffn: FFN, flow: object) -> None:
        if getattr(flow, "expert", None) is None:
            seen.setdefault(ffn.name, (flow.input, flow.hidden))  # type: ignore[attr-defined]

    with checking(name):
        watch(model, [case.inputs(model)], found, receive)
        for ffn in found:
            if ffn.name in seen and not ffn.experts:
                x, hidden = seen[ffn.name]
                act = local.activation_of(ffn.read(), x, hidden, activations(ffn))
                require(
                    act is not None, name, f"no activation explains what {ffn.name} gives: are gate and up swapped?"
                )
