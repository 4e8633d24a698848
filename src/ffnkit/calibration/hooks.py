"""What passes through single FFNs while a model runs: inputs, hidden activations and outputs, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, check_finite, run
from ffnkit.calibration.padding import TokenMasks
from ffnkit.errors import FfnkitError
from ffnkit.model.ffn import FFN
from ffnkit.ops.apart import held_out


@dataclass(frozen=True)
class Activations:
    """One call of one FFN (or of one routed expert).

    Attributes:
        input: (n, d) what up and gate receive.
        hidden: (n, ff) what down receives, before a factor that is kept apart.
        output: (n, d) what down gives, its bias included.
        weights: (n,) how much each token counts: 0 for padding, the squared routing weight for experts that share a
            3-D parameter; None where all count alike.
        expert: the expert's number, or None.
        missing: (n, d) what the output is to give beyond ``output`` (``calibration.streams``); None where nothing.
    """

    input: Tensor
    hidden: Tensor
    output: Tensor
    weights: Tensor | None = None
    expert: int | None = None
    missing: Tensor | None = None

    def kept(self) -> Activations:
        """The tokens that count."""
        if self.weights is None:
            return self
        chosen = self.weights > 0
        return self if bool(chosen.all()) else self.take(chosen)

    def apart(self) -> tuple[Activations, Activations]:
        """Nine tenths of the tokens, and a tenth that is held out; which ones follows from their places in the
        call (:func:`~ffnkit.ops.apart.held_out`).
        """
        out = held_out(len(self.input)).to(self.input.device)
        return self.take(~out), self.take(out)

    def take(self, chosen: Tensor) -> Activations:
        """These tokens, by a mask or by their places."""
        weights, missing = (None if each is None else each[chosen] for each in (self.weights, self.missing))
        return Activations(self.input[chosen], self.hidden[chosen], self.output[chosen], weights, self.expert, missing)

    def counted(self) -> Activations:
        """The tokens that count, with weights only where they do not count alike."""
        kept = self.kept()
        if kept.weights is None or kept.expert is not None:
            return kept
        return replace(kept, weights=None)  # a mask: what is left counts alike


Receive = Callable[[FFN, Activations], None]


@torch.no_grad()
def watch(model: nn.Module, batches: Iterable[Batch], found: list[FFN], receive: Receive) -> int:
    """Run the model over ``batches`` in eval mode and hand every call of the FFNs ``found`` to ``receive``.

    Nothing of the model is changed; no batch is kept.

    Args:
        batches: keyword arguments of the model (:func:`~ffnkit.calibration.batches.run`); labels are passed where the
            decoder's inputs are made from them.
        receive: called with the FFN and its :class:`Activations`, each time where an FFN runs several times in a pass.

    Returns:
        The number of batches.

    Raises:
        FfnkitError: an FFN never ran, or there were no batches.
    """
    ran: set[str] = set()
    masks = TokenMasks.of_ffns(model, found)

    def note(ffn: FFN, acts: Activations) -> None:
        ran.add(ffn.name)
        receive(ffn, acts)

    with masks.watching(), hooked(found, note, masks):
        count = run(model, batches, before=masks.start)
    silent = [ffn.name for ffn in found if ffn.name not in ran and not _routed(ffn)]
    if silent:
        found_text = f"{silent[0]} did not run on the data given"
        raise FfnkitError("watching the FFNs", found_text, "Give inputs of every stack (text, images, decoder inputs)")
    return count


@contextmanager
def hooked(found: list[FFN], receive: Receive, masks: TokenMasks) -> Iterator[None]:
    """Hooks on FFNs while the block runs.

    Args:
        masks: says which tokens count; it knows the FFNs by their names.

    Raises:
        FfnkitError: inside the block, where a token that counts gets no finite numbers.
    """
    handles: list[Any] = []

    def checked(ffn: FFN, acts: Activations) -> None:
        asked = f"what {ffn.name} gives"
        check_finite(asked, acts.hidden, lambda: acts.kept().hidden)
        check_finite(asked, acts.output, lambda: acts.kept().output)
        receive(ffn, acts)

    try:
        for ffn in found:
            if ffn.layout.experts:
                for owner in dict.fromkeys(ffn.owners.values()):
                    handles += _hook_experts(ffn, owner, checked, masks)
                continue
            # owners that share their weights share these very modules, or hold others with the same parameters
            for owner in {ffn.linear("down", owner): owner for owner in ffn.owners.values()}.values():
                handles += _hook_linears(ffn, owner, checked, masks)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_linears(ffn: FFN, owner: nn.Module, receive: Receive, masks: TokenMasks) -> list[Any]:
    held: dict[str, Tensor] = {}

    def take_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        held["input"] = args[0]

    def finish(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, hidden = held.pop("input"), args[0]
        x_flat, h_flat, y_flat = (t.reshape(-1, t.shape[-1]) for t in (x, hidden, output))
        receive(ffn, Activations(x_flat, h_flat, y_flat, masks.of(ffn.name, x)))

    up, down = ffn.linear("up", owner), ffn.linear("down", owner)
    return [up.register_forward_pre_hook(take_input), down.register_forward_hook(finish)]


def _hook_experts(ffn: FFN, owner: nn.Module, receive: Receive, masks: TokenMasks) -> list[Any]:
    def finish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        for number, x, share in routed(ffn, args, kwargs, partial(masks.of, ffn.name)):
            if len(x):
                inner, hidden, result = expert_forward(ffn, module, number, x)
                receive(ffn, Activations(inner, hidden, result, weights=share, expert=number))

    return [owner.register_forward_hook(finish, with_kwargs=True)]


def routed(
    ffn: FFN, args: tuple[Any, ...], kwargs: Mapping[str, Any], counting: Callable[[Tensor], Tensor | None]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens (n, d), how much each counts (n,)) for a call of experts in 3-D parameters.

    Experts are called with tokens, choices and weights; or, as in Llama 4, with every token for every expert, times
    its routing weight, which is 0 for those that were not chosen. ``counting`` says which of all tokens count.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) == 1 and tensors[0].numel() % (ffn.experts * ffn.d) == 0:
        each = tensors[0].reshape(ffn.experts, -1, ffn.d)
        counts = counting(each[0])
        for number, x in enumerate(each):
            token = torch.where((x != 0).any(-1))[0]
            yield number, x[token], torch.ones_like(x[token, 0].float()) if counts is None else counts[token]
        return
    x, index, weights = routing(ffn, args, kwargs)
    counts = counting(x)
    for number in range(ffn.experts):
        token, place = torch.where(index == number)
        share = weights[token, place].float().square()
        yield number, x[token], share if counts is None else share * counts[token]


def routing(ffn: FFN, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (n, d), chosen experts (n, k), their weights (n, k)) of a call of experts in 3-D parameters."""
    given = [*args, *kwargs.values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    if len(tensors) != 3 or tensors[1].is_floating_point() or tensors[1].shape != tensors[2].shape:
        found = f"its experts are called with {[tuple(t.shape) for t in tensors]}, not tokens, choices and weights"
        raise FfnkitError(f"watching {ffn.name}", found, "Use a method that needs no data for this family")
    return tensors[0].reshape(-1, tensors[0].shape[-1]), tensors[1], tensors[2]


def expert_forward(ffn: FFN, owner: Any, number: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(input, hidden, output) of one expert for tokens x (n, d), routing weight left out."""

    def apply(site: str, value: Tensor) -> Tensor:
        weight, bias = getattr(owner, ffn.path(site))[number], getattr(owner, f"{ffn.path(site)}_bias", None)
        given = None if bias is None else bias[number]
        return nn.functional.linear(value, weight.mT if ffn.layout.transposed else weight, given)

    pre = apply("up", x)
    if not ffn.gated:
        hidden = owner.act_fn(pre)
    elif not ffn.layout.fused:
        hidden = owner.act_fn(apply("gate", x)) * pre
    elif hasattr(owner, "_apply_gate"):
        hidden = owner._apply_gate(pre)
    else:
        gate, value = pre.chunk(2, dim=-1)
        hidden = owner.act_fn(gate) * value
    return x, hidden, apply("down", hidden)


def _routed(ffn: FFN) -> bool:
    """Whether tokens are routed to this FFN, so that few data may leave it out."""
    return ffn.active < 1
