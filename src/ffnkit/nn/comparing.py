"""A model without a head that compares texts: rows of two or three of them, by the cosine of their embeddings.

The model's class is exchanged for one of the same name whose forward takes ``labels`` and gives ``loss`` and ``logits``
beside what the family's own gives. Nothing is added to the model: it saves as what it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

SCALE = 20.0
"""What cosines are multiplied by before an exponential, as sentence-transformers does."""


@dataclass(frozen=True)
class Comparison:
    """How texts become embeddings, and how many of them are compared.

    Attributes:
        pooled: last hidden states (texts, tokens, d), token ids and mask (texts, tokens) -> embeddings (texts, e).
        each: texts of a row: 2, whose cosine is wanted; 3: an anchor, what is near it, what is far.
    """

    pooled: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    each: int


@dataclass
class Compared(ModelOutput):
    """What such a model gives.

    Attributes:
        loss: of :func:`ordered` or :func:`nearest`, where labels are given.
        logits: (rows, 1) the cosine of two texts; (rows, 2) of the anchor with the near and the far one, times SCALE.
        embeddings: (texts, e), each row's texts beside one another.
        last_hidden_state, hidden_states, attentions: as the family gives them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None


def compare(model: nn.Module, comparison: Comparison) -> None:
    """Have a model without a head compare texts, in place; whatever is built of its class does so too."""
    model.__class__ = _comparing(type(model), comparison)


def _comparing(base: Any, comparison: Comparison) -> type[nn.Module]:
    signature = inspect.signature(base.forward)
    labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        output = base.forward(self, *args, **{**kwargs, "return_dict": True})
        pooled = comparison.pooled(output.last_hidden_state, given.get("input_ids"), given.get("attention_mask"))
        logits = loss = None
        if len(pooled) % comparison.each == 0:  # else plain texts, which nobody asks to compare
            rows = F.normalize(pooled.float(), dim=-1).unflatten(0, (-1, comparison.each))
            logits = torch.einsum("rd,rkd->rk", rows[:, 0], rows[:, 1:])
            if comparison.each == 2:
                loss = ordered(logits[:, 0], labels) if labels is not None else None
            else:
                loss = nearest(rows, among=self.training) if labels is not None else None
                logits = logits * SCALE
        more = {name: getattr(output, name, None) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return Compared(loss=loss, logits=logits, embeddings=pooled, **more)

    forward.__signature__ = signature.replace(parameters=[*own, labels, *rest])  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def ordered(cosines: Tensor, labels: Tensor) -> Tensor:
    """How far cosines (rows,) are from the order of the labels (rows,): only which of two is larger counts, so that
    labels may have any range. A scalar.

    Source: CoSENT, as ``CoSENTLoss`` of sentence-transformers: log(1 + sum exp(SCALE (c_i - c_j)) over y_i < y_j).
    """
    apart = SCALE * (cosines[:, None] - cosines[None, :])
    wrong = apart[labels[:, None] < labels[None, :]]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)


def nearest(rows: Tensor, *, among: bool) -> Tensor:
    """How far each anchor is from being nearest to its own near text, a mean over rows.

    Source: Henderson et al., Efficient natural language response suggestion, arXiv:1705.00652, as
        ``MultipleNegativesRankingLoss`` of sentence-transformers.

    Args:
        rows: normalized embeddings (rows, 3, e). among: the texts of all rows are candidates; else a row's own two.
    """
    if among:
        near, far = rows[:, 1], rows[:, 2]
        scores = SCALE * rows[:, 0] @ torch.cat([near, far]).mT
        return F.cross_entropy(scores, torch.arange(len(rows), device=rows.device))
    scores = SCALE * torch.einsum("rd,rkd->rk", rows[:, 0], rows[:, 1:])
    return F.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
