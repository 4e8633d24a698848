"""Narrow FFNs in closed form from the second moments of their hidden activations: the published ways, by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from ffnkit.calibration.blockwise import Blockwise
from ffnkit.edits import ReplaceNeurons
from ffnkit.methods.common import COMPRESSED, Batch, Narrowing, Sequential, largest, lifted, need_data, norms
from ffnkit.methods.expecting import Work, fused
from ffnkit.methods.narrow.by_block import Fitted, block_by_block, drafted
from ffnkit.methods.narrow.observed import Part, observing
from ffnkit.model.ffn import FFN
from ffnkit.ops.neurons import Neurons, concatenate
from ffnkit.ops.refit import refit
from ffnkit.ops.subset import leverage, outputs
from ffnkit.ops.surgeon import surgeon
from ffnkit.plans import Draft, Progress, check_weights
from ffnkit.settings import Doc

logger = logging.getLogger(__name__)

ENOUGH = 2  # tokens a neuron that stays: with fewer, output layers pulled as weakly as these fit noise


@dataclass(frozen=True)
class ClosedForm(Narrowing):
    """Whole neurons stay, and an output layer fitted to what the FFN gave, from the Gram matrix G of its activations.

    Where the FFN has an output bias, G is centred and the bias takes over the means. Experts, each on its own tokens;
    those that none reached keep the neurons with the largest weights.
    """

    sequential: Sequential = False

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True

    @property
    def beyond(self) -> str | None:
        return COMPRESSED if self.sequential else None

    def work(self, ffn: FFN, width: int, tokens: int) -> Work:
        """About what one FFN takes."""
        return fused(ffn, width, tokens, greedy=False, refine=0, kept=0)

    def closed(self, gram: Tensor, down: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The neurons that stay (width,), ascending, and their output layer (d, width), of G (ff, ff) and W (d, ff)."""
        raise NotImplementedError

    def draft(self, model: nn.Module, data: Iterable[Batch] | None, progress: Progress | None) -> Draft:
        batches = need_data(data, self.name, beyond=self.beyond)
        widths = {ffn.name: (ffn, width) for ffn, width in self.chosen(model)}
        for name, (ffn, _) in widths.items():
            ffn.check_plain(f"narrowing {name}")
            check_weights(ffn.raw(), name)
        seen = observing([ffn for ffn, _ in widths.values()], 0)
        few: list[tuple[int, int, str]] = []  # tokens and neurons that stay, where tokens are few

        def show(blocks: Blockwise, group: list[FFN], last: bool) -> None:
            blocks.see(group, seen, last=last)

        def fit(ffn: FFN) -> Fitted:
            old, parts, errors = lifted(ffn.raw()), [], []
            width = widths[ffn.name][1]
            for number in range(max(ffn.experts, 1)):
                single = old.expert(number) if ffn.experts else old
                known = seen.parts.pop((ffn.name, number), None)
                if known is not None and known.held.offered < ENOUGH * width < ENOUGH * ffn.width:
                    name = f"expert {number} of {ffn.name}" if ffn.experts else ffn.name
                    few.append((known.held.offered, width, name))
                part, error = self._fit(single, known, width)
                parts.append(part)
                errors.append(error)
            made = (concatenate(parts) if ffn.experts else parts[0]).to(ffn.raw().up.dtype)
            told = {"output error on the data": sum(errors) / len(errors)}
            return Fitted([ReplaceNeurons.of(ffn.name, made)], told, made)

        found = [ffn for ffn, _ in widths.values()]
        done = block_by_block(model, batches, found, show, fit, progress, sequential=self.sequential)
        if few:
            tokens, width, name = min(few)
            more = f", and {len(few) - 1} more" if few[1:] else ""
            told = (
                "%s: fewer than %d tokens for each neuron that stays; output layers fit noise then: %d for %d of %s%s"
            )
            logger.warning(told, self.name, ENOUGH, tokens, width, name, more)
        return drafted(found, done)

    def _fit(self, old: Neurons, seen: Part | None, width: int) -> tuple[Neurons, float]:
        """One FFN or expert, and the relative error of its outputs on the data."""
        if width == old.ff:
            return old, 0.0
        if seen is None:
            return old.take(largest(norms(old), width).long().to(old.up.device)), 0.0
        moments, bias = seen.moments, old.down_bias
        gram = moments.second(last=True) if bias is None else moments.centred(last=True)
        kept, down = self.closed(gram, old.down, width)
        gone = old.down.to(gram.dtype).clone()
        gone[:, kept] -= down.to(gram.dtype)
        error = (outputs(gram, gone) / max(outputs(gram, old.down), 1e-300)) ** 0.5
        if bias is not None:
            bias = (bias.double() + gone.double() @ moments.mean()).to(bias.dtype)
        moments.forget()
        return dataclasses.replace(old.take(kept), down=down.to(old.down.dtype), down_bias=bias), error


@dataclass(frozen=True)
class ModeGpt(ClosedForm):
    """Keep the neurons with the largest ridge leverage scores and refit the output layer: MoDeGPT's FFN part.

    Scores are diag(G (G + lambda I)^-1); the output layer is W G_:S (G_SS)^-1, by ``pull`` towards W_S.

    Source: MoDeGPT (arXiv 2408.09632), type I (Nystroem).
    Differs: ``pull`` is 0 there. Its types II and III narrow the heads of query and key, and of value and output; the
        configs of LLaMA, OPT and their like have one ``head_dim`` for these, from which rotary frequencies follow, too
        (DeepSeek's ``v_head_dim`` is of another attention). So attentions stay whole; ``heads`` removes whole heads.
    """

    ridge: Annotated[
        float, Doc("of the scores, relative to the mean square of the activations.", at_least=0, example=0.01)
    ] = 1e-2
    pull: Annotated[
        float,
        Doc("ridge of the refit, towards the old columns, relative to the same; 0 as published.", at_least=0),
    ] = 1e-2

    name: ClassVar[str] = "modegpt"
    summary: ClassVar[str] = "keep neurons by leverage scores and refit the output layer (MoDeGPT, FFN part)"
    paper: ClassVar[str] = "arXiv 2408.09632"

    def closed(self, gram: Tensor, down: Tensor, width: int) -> tuple[Tensor, Tensor]:
        kept = largest(leverage(gram, self.ridge), width).long().to(gram.device)
        return kept, refit(gram, down, kept, self.pull)[0]


@dataclass(frozen=True)
class Surgeon(ClosedForm):
    """Take neurons away one at a time, each time the one that the outputs miss least; the others take over its part.

    :func:`ffnkit.ops.surgeon.surgeon`.

    Source: ZipLM (arXiv 2302.04089), SlimGPT (arXiv 2412.18110); optimal brain surgeon (Hassibi and Stork 1992).
    Differs: SlimGPT takes more from later layers (a logarithm of their number); here widths are those asked for.
    """

    ridge: Annotated[
        float,
        Doc("damping, towards the old columns, relative to the mean square of the activations.", at_least=0),
    ] = 1e-2
    block: Annotated[int, Doc("neurons that go by the same scores; 1 scores anew after each.", at_least=1)] = 1

    name: ClassVar[str] = "obs"
    summary: ClassVar[str] = "neurons go one at a time, the others take over (optimal brain surgeon: SlimGPT, ZipLM)"
    paper: ClassVar[str] = "arXiv 2412.18110"

    def work(self, ffn: FFN, width: int, tokens: int) -> Work:
        """The inverse, and each neuron that goes taken off it and off the output layer; nothing is refitted behind."""
        plain = fused(ffn, width, tokens, greedy=False, refine=0, kept=0, ridges=0)
        gone = ffn.width - width
        steps = max(ffn.experts, 1) * gone * ffn.width * (gone / 2 + 2 * ffn.d)
        return dataclasses.replace(plain, double=plain.double + steps)

    def closed(self, gram: Tensor, down: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return surgeon(gram, down, width, self.ridge, self.block)
