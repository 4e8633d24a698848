"""What a row of a family promises: the FFN that it finds is the FFN that the model computes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ffnkit.calibration.hooks import watch
from ffnkit.model.attention import attentions
from ffnkit.model.ffn import FFN, activations
from ffnkit.model.finding import ffns
from ffnkit.model.linear import is_transposed, stored_weight
from ffnkit.ops import local
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.testing.contract import EXACT, Case, checking, difference, distance, eager, require, snapshot


def check_family(case: Case) -> None:
    """Raises ContractError, naming the check, where a model's FFNs are not what the row says.

    Permuting the neurons of every FFN leaves the outputs as they were (float64, 1e-12 relative), permuting ``up`` alone
    does not; and ``down (act(gate x) * (up x))`` is what each FFN gives, with the gate under the activation.
    """
    model = eager(case.model().double())
    with checking("the FFNs are found"):
        found = ffns(model)
    _numbers(model, found)
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
    _heads(model, case)


def _numbers(model: torch.nn.Module, found: list[FFN]) -> None:
    """Shapes agree with the tensors, these are the model's own, and what was read can be written and read again."""
    name = "the FFNs are found"
    mine, seen = {id(p) for p in model.parameters()}, set[int]()
    for ffn in found:
        neurons, own = ffn.read(), {id(p) for p in ffn.parameters()}
        require(tuple(neurons.up.shape[-2:]) == (ffn.width, ffn.d), name, f"up of {ffn.name} is {neurons.up.shape}")
        require(tuple(neurons.down.shape[-2:]) == (ffn.d, ffn.width), name, f"down of {ffn.name}: {neurons.down.shape}")
        require((neurons.gate is not None) == ffn.gated, name, f"{ffn.name} is said to be gated: {ffn.gated}")
        require(own <= mine and not own & seen, name, f"parameters of {ffn.name} are not the model's, or another's too")
        seen |= own
    written = copy.deepcopy(model)
    for ffn in ffns(written):
        ffn.write(ffn.read().map(torch.clone))
    odd = difference(snapshot(model), snapshot(written), identity=False)
    require(not odd, "reading and writing are exact", f"{odd} changed by writing what was read")
    for ffn in ffns(written):
        new = _permuted(ffn.read().map(torch.clone)).tensors()
        ffn.write(Neurons(**new))
        read = ffn.read().tensors()
        wrong = [key for key, value in new.items() if not torch.equal(read[key], value)]
        require(not wrong, "reading and writing are exact", f"{wrong[:1]} of {ffn.name} reads otherwise")


def _heads(model: torch.nn.Module, case: Case) -> None:
    """Heads can go, or there is a reason why not; their rows and columns belong together: where the columns of a
    group's output are zero, its values are of no consequence, and they are where the columns are not."""
    name = "attentions are described"
    for number, attention in enumerate(attentions(model)):
        require(bool(attention.why) or attention.heads > 0, name, f"{attention.name} has no heads")
        if attention.why or attention.kv_heads < attention.units:
            continue
        with checking(name), torch.no_grad():
            own = attentions(copied := copy.deepcopy(model))[number]
            members = own.members(torch.tensor([0]))
            values, out = (_oriented(own.linear(role)) for role in ("v", "o"))
            rows, columns = own.rows("v")[members["v"]].flatten(), own.columns()[members["q"]].flatten()
            out[:, columns] = 0
            expected = case.run(copied)
            values[rows] *= -3
            gap = distance(case.run(copied), expected)
        require(gap < EXACT, name, f"values of a head of {attention.name} reach others' outputs: {gap:.2g}, relative")


def _oriented(linear: torch.nn.Module) -> Tensor:
    """A view of the weight, (out, in)."""
    weight = stored_weight(linear)
    return weight.mT if is_transposed(linear) else weight


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
