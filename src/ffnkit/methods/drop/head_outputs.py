"""What attentions hand to their output linears and what these give: watched, and refitted once heads are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import check_finite
from ffnkit.calibration.padding import TokenMasks
from ffnkit.edits import Edit, ReplaceLinear
from ffnkit.errors import FfnkitError
from ffnkit.methods.common import Batch, activity
from ffnkit.model.attention import Attention
from ffnkit.model.ffn import FFN
from ffnkit.model.linear import bare_weight
from ffnkit.ops.refit import Pairs
from ffnkit.plans import Progress


def watch_outputs(
    model: nn.Module,
    data: Iterable[Batch],
    found: list[Attention],
    receive: Callable[[Attention, Tensor, Tensor, Tensor], None],
    beside: list[FFN] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """One pass of the model over the data, with every call of the attentions' output linears handed to ``receive``.

    Args:
        receive: called with the attention, what its output linear gets (n, in) and gives (n, out), and how much each
            token counts (n,), float32; tokens that do not count are left out.
        beside: FFNs whose hidden neurons' rms (:func:`~ffnkit.methods.common.activity`) comes back.

    Raises:
        FfnkitError: an attention never ran, or a token that counts got no finite numbers.
    """
    masks = TokenMasks(model, {each.name: (each.stack, [each.name]) for each in found})
    ran: set[str] = set()

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        masks.start(kwargs)

    def tap(attention: Attention) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(_: nn.Module, args: Any, output: Tensor) -> None:
            x = args[0].detach()
            mask = masks.of(attention.name, x)
            flat = x.reshape(-1, x.shape[-1])
            given = output.detach().reshape(len(flat), -1)
            weights = torch.ones(len(flat), device=x.device) if mask is None else mask.float()
            if not bool((counts := weights > 0).all()):
                flat, given, weights = flat[counts], given[counts], weights[counts]
            if not len(flat):
                return
            ran.add(attention.name)
            for values in (flat, given):
                check_finite(f"what {attention.name} gives", values)
            receive(attention, flat, given, weights)

        return note

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [attention.linear("o").register_forward_hook(tap(attention)) for attention in found]
    try:
        with masks.watching():
            neurons = activity(model, data, beside or [], progress)
    finally:
        for handle in handles:
            handle.remove()
    silent = [attention.name for attention in found if attention.name not in ran]
    if silent:
        do = "Give inputs of every stack (text, images, decoder inputs)"
        raise FfnkitError("watching the attention", f"{silent[0]} did not run on the data given", do)
    return neurons


def refitted_outputs(
    model: nn.Module,
    data: Iterable[Batch],
    found: list[Attention],
    stay: Mapping[str, Tensor],
    ridge: float | None,
    progress: Progress | None = None,
) -> Iterator[tuple[Edit, float]]:
    """Each attention's output linear refitted to what it gave, and the relative error on the data.

    Minimises ||Z_S D^T + b - Y||_F^2 + lambda ||D - W_S||_F^2 over tokens, with Z_S what the heads that stay hand to
    the output linear W, Y what it gave, lambda = ridge x the mean square of Z_S; b only where it has a bias. Without a
    ridge fits under several are mixed, by tokens held out (:class:`~ffnkit.ops.refit.Pairs`).

    Args:
        stay: by the attention's name, the units that stay.

    Source: GRAIL (arXiv 2602.23795). Differs: its ridge pulls towards zero.
    """
    columns = {a.name: a.columns()[a.members(stay[a.name])["q"]].flatten() for a in found}
    pairs: dict[str, Pairs] = {}

    def note(attention: Attention, x: Tensor, y: Tensor, _: Tensor) -> None:
        name = attention.name
        if name not in pairs:
            pairs[name] = Pairs(len(columns[name]), y.shape[1], x.device)
        pairs[name].add(x[:, columns[name].to(x.device)], y)

    watch_outputs(model, data, found, note, progress=progress)
    for attention in found:
        linear, path = attention.linear("o"), f"{attention.name}.{attention.layout.o}".strip(".")
        weight = bare_weight(linear).detach()
        start = weight[:, columns[attention.name].to(weight.device)]
        fitted, bias, error = pairs.pop(attention.name).fit(start, linear.bias, ridge)
        yield ReplaceLinear.of(path, fitted.to(weight.dtype), bias), error
