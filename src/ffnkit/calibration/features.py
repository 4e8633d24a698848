"""What several FFNs do on the same tokens, held side by side: memory-mapped where it is large."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch, checked, kept, run
from ffnkit.calibration.hooks import Activations, hooked, watch
from ffnkit.calibration.padding import TokenMasks
from ffnkit.calibration.statistics import Rows
from ffnkit.errors import FfnkitError
from ffnkit.model.attention import attention_linears
from ffnkit.model.ffn import FFN
from ffnkit.model.finding import block_name
from ffnkit.model.linear import is_linear, output_width

KINDS = ("input", "up", "gate", "hidden", "output", "attention", "texts", "attention texts")
POOLED = {"texts": "output", "attention texts": "attention"}  # means over each text of a kind


class Features:
    """Features (tokens, columns), float32, of FFNs by name and kind; row i is the same token for all FFNs of a stack.

    Layers that share an FFN each have features of their own, under the names of its owners.

    Attributes:
        tokens: how many rows there are, by stack.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        found: list[FFN],
        kinds: dict[str, list[str]],
        most: int,
        *,
        aligned: bool = True,
    ) -> None:
        """Run the model over ``batches`` until each stack has ``most`` tokens; padding is left out.

        Args:
            found: FFNs that run once in a pass. kinds: for each FFN's name what to keep: "input" (n, d), "up" and
                "gate" (their linears' outputs, (n, ff)), "hidden" (what down receives), "output" (n, d), "attention"
                (what the self-attention of its layer adds, (n, d)); "texts" and "attention texts" are the means of
                output and attention over the tokens of each text, (texts, d), the same texts in every stack.
            aligned: FFNs of a stack that see other tokens than others are refused.

        Raises:
            FfnkitError: routed experts, FFNs that run several times in a pass, no batches.
        """
        self._held: dict[tuple[str, str], Rows] = defaultdict(partial(Rows, most))
        places = [place for ffn in found for place in layers_of(ffn)]
        self._count = {place.name: 0 for place in places}
        self._kinds, self._most = kinds, most
        for ffn in found:
            if ffn.experts or ffn.active < 1:
                what = "its experts see different tokens, so their neurons cannot be compared"
                raise FfnkitError(f"features of {ffn.name}", what, "Name layers without routed experts")
        self._attended: dict[str, Tensor] = {}
        self._texts = 0  # in the batch at hand
        attending = {ffn.name for ffn in found if {"attention", "attention texts"} & {*kinds[ffn.name]}}
        wanted = [place for ffn in found if ffn.name in attending for place in layers_of(ffn)]
        batches = kept(batches) if wanted else batches
        first = list(islice(batches, 1)) if wanted else []
        self._at = {ffn.name: ffn.name for ffn in found}  # the place at which each FFN runs
        with self._attention(model, first, wanted), self._placing(model, found):
            watch(model, self._until_full(batches), found, self._receive)
        self.tokens: dict[str, int] = {}
        given: dict[str, int] = {}
        for place in places:
            count = self._count[place.name]
            other = given.setdefault(place.stack, count)
            self.tokens.setdefault(place.stack, min(count, most))
            if count < 2:
                raise FfnkitError(f"features of {place.name}", f"{count} tokens, too few to compare", "Give more data")
            if aligned and count != other:
                what = f"{count} tokens where other layers of its stack have {other}"
                do = "Name layers that run once in a pass, on the same tokens"
                raise FfnkitError(f"features of {place.name}", what, do)

    def get(self, name: str, kind: str) -> Tensor:
        """(tokens, columns), float32, on the CPU."""
        return self._held[name, kind].get()

    def _until_full(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in checked(batches):
            if min(self._count.values()) >= self._most:
                return
            self._texts = next(len(value) for value in batch.values() if isinstance(value, Tensor))
            yield batch

    def _receive(self, ffn: FFN, acts: Activations) -> None:
        rows, name = acts.kept(), self._at[ffn.name]
        for kind in self._kinds[ffn.name]:
            if kind in POOLED:
                values = self._means(name, acts, self._whole(name, acts) if "attention" in kind else acts.output)
            else:
                values = self._attention_of(name, acts) if kind == "attention" else _values(ffn, rows, kind)
            self._held[name, kind].update(values)
        self._count[name] += len(rows.input)

    def _means(self, name: str, acts: Activations, values: Tensor) -> Tensor:
        """The means over the tokens of each text that count, (texts, d)."""
        if len(values) % self._texts:
            what = f"it gets {len(values)} tokens of {self._texts} texts"
            raise FfnkitError(f"features of {name}", what, "Compare layers of one stack only")
        counts = values.new_ones(len(values)) if acts.weights is None else (acts.weights > 0).to(values)
        counts = counts.view(self._texts, -1, 1)
        sums = values.view(self._texts, -1, values.shape[-1]).masked_fill(counts == 0, 0.0).sum(dim=1)
        return sums / counts.sum(dim=1).clamp_min(1)

    def _attention_of(self, name: str, acts: Activations) -> Tensor:
        values = self._whole(name, acts)
        return values if acts.weights is None else values[acts.weights > 0]

    def _whole(self, name: str, acts: Activations) -> Tensor:
        """What the attention of the FFN's layer gave, padding too."""
        values = self._attended[name]
        if len(values) != len(acts.input):
            what = f"it gives {len(values)} tokens where the FFN gets {len(acts.input)}"
            raise FfnkitError(f"the attention before {name}", what, "Compare the FFNs only")
        return values

    @contextmanager
    def _placing(self, model: nn.Module, found: list[FFN]) -> Iterator[None]:
        """While the block runs, of FFNs that layers share the place at which each runs."""
        handles = []

        def enter(name: str, place: str, *_: Any) -> None:
            self._at[name] = place

        try:
            for ffn in found:
                for place in layers_of(ffn) if ffn.tied else ():
                    module = model.get_submodule(block_name(place.name))
                    handles.append(module.register_forward_pre_hook(partial(enter, ffn.name, place.name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _attention(self, model: nn.Module, first: list[Batch], found: list[FFN]) -> Iterator[None]:
        """While the block runs, what the attention of each FFN's layer gave last."""
        handles = []

        def note(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
            self._attended[name] = output.reshape(-1, output.shape[-1])

        try:
            for name, module in (attention_outputs(model, first[0], found) if found and first else {}).items():
                handles.append(module.register_forward_hook(partial(note, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def layers_of(ffn: FFN) -> list[FFN]:
    """The layers that share an FFN, as FFNs of their own; the FFN alone where its layers are not told apart."""
    blocks = {block_name(name) for name in ffn.owners}
    return ffn.apart() if len(blocks) == len(ffn.owners) and "" not in blocks else [ffn]


def _values(ffn: FFN, acts: Activations, kind: str) -> Tensor:
    if kind in ("input", "hidden", "output"):
        return getattr(acts, kind)
    neurons = ffn.raw()
    weight, bias = (neurons.up, neurons.up_bias) if kind == "up" else (neurons.gate, neurons.gate_bias)
    assert weight is not None
    return nn.functional.linear(acts.input, weight, bias)


@torch.no_grad()
def attention_outputs(model: nn.Module, batch: Batch, found: list[FFN]) -> dict[str, nn.Module]:
    """The output projection of the self-attention in each FFN's layer, by the FFN's name.

    Found by running one batch: of the attention linears to d (those of cross-attention left out), the one that runs
    last.

    Raises:
        FfnkitError: a layer without one.
    """
    ran: dict[str, tuple[str, nn.Module]] = {}
    handles = []

    def note(layer: str, name: str, module: nn.Module, _: Any, output: Tensor) -> None:
        ran[layer] = (name, module)

    layers = {block_name(ffn.name): ffn for ffn in found}
    attending = set(attention_linears(model))
    own = {id(ffn.linear(site)) for ffn in found for site in ffn.sites}
    try:
        for name, module in model.named_modules():
            layer = next((each for each in layers if name.startswith(f"{each}.")), None)
            if layer is None or id(module) in own or not is_linear(module):
                continue
            path = name[len(layer) :].lower()
            cross = re.search(r"cross|encoder_attn|encdec", path)
            mixes = name in attending or ".mixer" in path  # mixers stand in attention's place
            if mixes and not cross and output_width(module) == layers[layer].d:
                handles.append(module.register_forward_hook(partial(note, layer, name)))
        run(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in layers if layer not in ran]
    if missing:
        raise FfnkitError(f"the attention of {missing[0]}", "no output projection ran", "Compare the FFNs only")
    return {ffn.name: ran[layer][1] for layer, ffn in layers.items()}


@dataclass(frozen=True)
class Passage:
    """What passes through one layer for one batch: (n, d) each, padding left out.

    Attributes:
        entering, leaving: the layer's input and output. added: its FFN's output.
    """

    entering: Tensor
    leaving: Tensor
    added: Tensor


@torch.no_grad()
def passages(
    model: nn.Module,
    batches: Iterable[Batch],
    found: dict[str, FFN],
    receive: Callable[[dict[str, Passage]], None],
) -> None:
    """Hand what passes through whole layers to ``receive``, batch by batch; nothing is held longer than its batch.

    Args:
        found: an FFN of each layer, by the layer's path.
        receive: called with each batch's passages, by the layer's path.

    Raises:
        FfnkitError: a layer that does not run once in a pass, or takes and gives other things than tokens (n, d).
    """
    held: dict[str, dict[str, Tensor]] = {}
    handles = []
    names = {ffn.name: layer for layer, ffn in found.items()}
    chunks: dict[str, list[Tensor]] = {}  # of the sequence, with which an FFN may be called
    places = [(name, ffn) for layer, ffn in found.items() for name in (layer, ffn.name)]
    masks = TokenMasks(model, {name: (ffn.stack, [name]) for name, ffn in places})

    def note(layer: str, what: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, Tensor) or what in held.setdefault(layer, {}):
            raise FfnkitError(f"watching {layer}", "it does not take and give tokens once in a pass", "Give the layers")
        held[layer][what] = value

    def entering(layer: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(layer, "entering", args[0] if args else kwargs.get("hidden_states"))

    def leaving(layer: str, _: nn.Module, __: Any, output: Any) -> None:
        note(layer, "leaving", output)

    def adding(ffn: FFN, acts: Activations) -> None:
        chunks.setdefault(names[ffn.name], []).append(acts.output)

    def before(batch: Batch) -> None:
        held.clear()
        chunks.clear()
        masks.start(batch)

    def after(_: Batch, __: Any) -> None:
        for layer, outputs in chunks.items():
            note(layer, "added", _joined(layer, outputs, held[layer]["entering"]))
        if missing := [layer for layer in found if len(held.get(layer, {})) < 3]:
            what = "no tokens pass through it and its FFN"
            raise FfnkitError(f"watching {missing[0]}", what, "Give the layers yourself, with layers=")
        receive({layer: _kept(parts, masks.of(layer, parts["entering"])) for layer, parts in held.items()})

    try:
        for layer in found:
            block = model.get_submodule(layer)
            handles.append(block.register_forward_pre_hook(partial(entering, layer), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leaving, layer)))
        with masks.watching(), hooked(list(found.values()), adding, masks):
            run(model, batches, before=before, after=after, logits=False)
    finally:
        for handle in handles:
            handle.remove()


def _joined(layer: str, outputs: list[Tensor], entering: Tensor) -> Tensor:
    """What an FFN gave for all tokens of its layer, (n, d), from its calls."""
    if len(outputs) == 1:
        return outputs[0]
    if sum(len(each) for each in outputs) != entering.shape[:-1].numel():
        raise FfnkitError(f"watching {layer}", "it does not take and give tokens once in a pass", "Give the layers")
    return torch.cat([each.reshape(len(entering), -1, each.shape[-1]) for each in outputs], dim=1)


def _kept(parts: dict[str, Tensor], weights: Tensor | None) -> Passage:
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in parts.items()}
    if weights is None:
        return Passage(**flat)
    return Passage(**{name: value[weights.to(value.device) > 0] for name, value in flat.items()})
