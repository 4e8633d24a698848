"""Fit one FFN to several: what each of them receives and gives is measured once, then any group of them is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ffnkit.calibration.batches import Batch
from ffnkit.calibration.features import Features
from ffnkit.calibration.reading import Metric, output_metric
from ffnkit.edits import Edit, KeepOwn, ReplaceNeurons, Tie
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import generator, lifted
from ffnkit.model.ffn import FFN, activations
from ffnkit.ops import local, sharing
from ffnkit.ops.local import Activation
from ffnkit.ops.neurons import Neurons
from ffnkit.ops.sharing import Own
from ffnkit.ops.union import (
    Member,
    balanced,
    biases,
    choose_from,
    fitted,
    pooled,
    thin_difference,
    union,
    with_one_bias,
)
from ffnkit.plans import check_weights

SELECTION = 0.3  # ridge of the choice, relative to the mean square of the activations
BEFORE, ALONE = 1.0, 0.1  # of the output layer: a regression starts best from one that has hardly been fitted
THIN = 1e-2  # and of a difference of low rank, which is fitted last
# Neurons among which a group's are chosen, whose Gram matrix is of this size: at most so many, and of narrow FFNs so
# many times their width, or as many as cost next to nothing.
CANDIDATES, TIMES, CHEAP = 6144, 4, 1024
# Of how much a token counts to the norm that reads it. As it is, a token of massive values, which attention uses as a
# sink, counts as nothing, and the model breaks without it; where all count alike, it is all that is fitted.
POWER = 0.5
HELD = 4  # one over the share of the fitted tokens that are kept apart, at most


@dataclass(frozen=True)
class Fit:
    """One FFN for a group.

    Attributes:
        neurons: shared, in the dtype of the members. owns: what each member keeps beside it.
        errors: of each member on rows kept apart: its squared error relative to its outputs, as their reader sees it.
    """

    neurons: Neurons
    owns: list[Own]
    errors: list[float]

    def edits(self, group: Sequence[FFN], extras: bool) -> list[Edit]:
        """The edits that let the group share it."""
        first, *rest = group
        edits: list[Edit] = [ReplaceNeurons.of(first.name, self.neurons)]
        if extras:
            edits += [KeepOwn.of(f.name, "down", **own.tensors()) for f, own in zip(group, self.owns, strict=True)]
        orders = torch.arange(first.width, dtype=torch.int32).expand(len(rest), -1).contiguous()
        return [*edits, Tie(first.name, members=[f.name for f in rest], average=False, orders=orders)]


class Fitting:
    """What FFNs receive and give on data, and shared FFNs fitted to it. Large features lie in memory-mapped files.

    Args:
        found: the FFNs. fit, held: batches to fit on, and others that judge. tokens: of each FFN, at most.
    """

    def __init__(self, model: nn.Module, found: list[FFN], fit: list[Batch], held: list[Batch], tokens: int) -> None:
        kinds = {ffn.name: ["input", "output"] for ffn in found}
        self.seen = [
            (Features(model, batches, found, kinds, most, aligned=False), output_metric(model, found, batches))
            for batches, most in ((fit, tokens), (held, max(tokens // HELD, 2)))
        ]

    def of(
        self, group: Sequence[FFN], *, refine: int, ridge: float | None, extras: bool, rank: int, seed: int = 0
    ) -> Fit:
        """The shared FFN of a group.

        Args:
            refine: steps of regression. ridge: of the output layer; None: ``BEFORE`` a regression, else ``ALONE``.
            extras: whether members keep a scale and a bias of their own. rank: of a difference of their own.

        Raises:
            FfnkitError: an activation function that is not known.
        """
        for ffn in group:
            check_weights(ffn.raw(), ffn.name)
        ridge = (BEFORE if refine else ALONE) if ridge is None else ridge
        used, judges = (self.members(group, when) for when in (0, 1))
        act = self.activation(group[0], used[0], "sharing", "Use merging, which needs to know the weights only")
        best, owns = self._chosen(used, act, group[0].width, ridge, extras)
        errors = sharing.errors(best, owns, judges, act)
        if refine:
            draw = generator(seed, *(ffn.layer for ffn in group))
            start = best, owns
            end = sharing.regress(*start, used, act, steps=refine, generator=draw, scales=extras)
            for share in local.SHARES:
                tried = sharing.between(start, end, share)
                found = sharing.errors(*tried, judges, act)
                if sum(found) < sum(errors):
                    (best, owns), errors = tried, found
        if rank:
            wider = [_with_difference(best, *each, act, rank) for each in zip(owns, used, strict=True)]
            gained = sharing.errors(best, wider, judges, act)
            owns = [w if new < old else w.without() for w, new, old in zip(wider, gained, errors, strict=True)]
            errors = [min(pair) for pair in zip(gained, errors, strict=True)]
        if not extras:
            best = dataclasses.replace(best, down_bias=owns[0].bias)
        dtype = group[0].raw().up.dtype
        return Fit(best.to(dtype), owns, errors)

    def members(self, group: Sequence[FFN], when: int) -> list[Member]:
        """What the FFNs of a group did on the fitted rows (``when`` 0), or on those that judge (1)."""
        return balanced([self._member(ffn, when) for ffn in group])

    def _member(self, ffn: FFN, when: int) -> Member:
        features, metrics = self.seen[when]
        x, y = (features.get(ffn.name, kind) for kind in ("input", "output"))
        metric: Metric = metrics[ffn.name]
        neurons = lifted(ffn.raw())
        device = neurons.up.device
        given = (x, y, metric.tokens[: len(x)] ** POWER, self.seen[0][1][ffn.name].dimensions)
        return Member.of(neurons, *(value.to(device, neurons.up.dtype) for value in given))

    def _chosen(
        self, members: list[Member], act: Activation, width: int, ridge: float, extras: bool
    ) -> tuple[Neurons, list[Own]]:
        """Neurons chosen from the union, the output layer refitted; what members keep."""
        every = min(CANDIDATES, max(TIMES * width, CHEAP))
        most = max(every // len(members), -(-width // len(members)))
        sizes = [_sizes(member, act) for member in members] if most < width else None
        candidates = union([member.neurons for member in members], most, sizes)
        moments = pooled(candidates, members, act)
        shared = moments if extras else with_one_bias(moments, members)
        dimensions = torch.stack([m.dimensions for m in members]).mean(0)
        kept = choose_from(shared, width, dimensions, SELECTION)
        neurons = fitted(candidates, shared, kept, len(members), ridge)
        found = biases(neurons, moments, kept, members, one=not extras)
        none = Own.none(neurons)
        owns = [dataclasses.replace(none, bias=bias) for bias in found]
        return neurons, owns if extras else [owns[0]] * len(owns)

    def activation(self, ffn: FFN, member: Member, doing: str, do: str) -> Activation:
        """The activation function of an FFN: that which explains its outputs; an error that says what to do."""
        x, y = member.inputs[:64], member.outputs[:64]
        if (found := local.activation_of(member.neurons, x, y, activations(ffn), local.forward)) is not None:
            return found
        raise FfnkitError(f"{doing} {ffn.name}", "its activation is none that is known", do)


def _sizes(member: Member, act: Activation) -> torch.Tensor:
    """(ff,) how much each of a member's own neurons moves its outputs, relative to these."""
    hidden = local.hidden(member.neurons, member.inputs[:4096], act)
    return (
        hidden.square().mean(0).sqrt()
        * (member.neurons.down * member.dimensions[:, None].sqrt()).norm(dim=0)
        * member.scale**0.5
    )


def _with_difference(neurons: Neurons, own: Own, member: Member, act: Activation, rank: int) -> Own:
    hidden = local.hidden(neurons, member.inputs, act) * own.scale
    gap = member.outputs - sharing.forward(neurons, own, member.inputs, act)
    first, second = thin_difference(hidden, gap, member.tokens, member.dimensions, rank, THIN)
    return dataclasses.replace(own, first=first, second=second)
