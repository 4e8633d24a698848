"""Forgetting: the loss on neutral text, before and after a model was tuned for something else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ffnkit.calibration.batches import evaluating
from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.model.trainable import body
from ffnkit.tasks.encoding.sequences import affixes, positions

Kind = Literal["causal", "masked"]
MASKED = 0.15  # share of the tokens whose loss a masked model is asked for
BLOCKS, LENGTH = 256, 128  # how many blocks are read, and how long they are, in tokens
LONGEST = 20  # characters that a token has at most, where texts are cut before they are tokenized


def kind_of(model: nn.Module) -> Kind | None:
    """How a model's language-model head reads text; None where it has none, or is an encoder-decoder."""
    name = type(model).__name__
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    return "causal" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


@torch.no_grad()
def neutral_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    max_length: int = LENGTH,
    limit: int = BLOCKS,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """The mean loss of a language model on the tokens of some texts, in nats; the model stays as it is.

    A causal model is asked for each token after the first of its block. A masked one for 15% of the tokens, drawn with
    ``seed`` and all replaced by the mask token: the same places for every model with this tokenizer.

    Args:
        texts: cut into blocks of ``max_length`` tokens at most, special tokens included; the first ``limit`` count.

    Raises:
        FfnkitError: the model has no language-model head that reads text from left to right or in the place of masks,
            the tokenizer has no mask token for such a one, or there is no token to be asked for.
    """
    kind = kind_of(model)
    if kind is None:
        what = "it has no language-model head of a decoder or a masked encoder"
        raise FfnkitError(
            f"the loss of {type(model).__name__} on neutral text", what, "Give the base model, or no text"
        )
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise FfnkitError("the loss on neutral text", "the tokenizer has no mask token", "Name another tokenizer")
    before, after = affixes(tokenizer)
    blocks = [[*before, *ids, *after] for ids in _blocks(model, tokenizer, texts, max_length, limit)]
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    with evaluating(model):
        for start in counted(range(0, len(blocks), batch_size), "neutral text"):
            inputs, labels = _batch(blocks[start : start + batch_size], tokenizer, kind, draw)
            logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
            if kind == "causal":
                logits, labels = logits[:, :-1], labels[:, 1:]
            asked = labels != -100
            losses = functional.cross_entropy(
                logits[asked.to(device)].float(), labels[asked].to(device), reduction="sum"
            )
            total, count = total + float(losses), count + int(asked.sum())
    if not count:
        raise FfnkitError("the loss on neutral text", "no token to be asked for", "Give longer texts")
    return total / count


def _blocks(model: nn.Module, tokenizer: Any, texts: Iterable[str], max_length: int, limit: int) -> list[list[int]]:
    """Token ids without special tokens, so many a block that these fit in."""
    room = min(max_length, int(tokenizer.model_max_length), positions(model))
    room -= sum(map(len, affixes(tokenizer)))
    if room < 1:
        raise FfnkitError(f"max_length {max_length}", "no room for the text", "Use more tokens")
    found: list[list[int]] = []
    for text in texts:
        left = limit - len(found)
        if left <= 0:
            break
        ids = tokenizer(text[: left * room * LONGEST], add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[start : start + room] for start in range(0, len(ids), room)][:left]
    return found


def _batch(
    rows: list[list[int]], tokenizer: Any, kind: Kind, draw: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and labels that are -100 where the model is not asked."""
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    here = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    if kind == "causal":
        return {"input_ids": ids, "attention_mask": here}, ids.masked_fill(here == 0, -100)
    special = torch.tensor(list(tokenizer.all_special_ids))
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = (~torch.isin(torch.tensor(row), special)).nonzero()[:, 0]
        some = torch.rand(len(places), generator=draw).argsort()[: max(1, round(MASKED * len(places)))]
        hidden[number, places[some]] = True
    inputs = {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id), "attention_mask": here}
    return inputs, ids.masked_fill(~hidden, -100)


def language_model(name: str, device: torch.device | str = "cpu") -> PreTrainedModel | str:
    """The checkpoint as the language model that it is; else, in words, why it is none."""
    from ffnkit.io.architectures import read_config
    from ffnkit.io.loading import load_with_info

    config = read_config(name)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not masked and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"there is no language model of type {config.model_type} that reads text"
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, info = load_with_info(auto, name)
    if info["missing_keys"]:
        return f"the base checkpoint has no language-model head ({sorted(info['missing_keys'])[0]} is not in it)"
    return cast(PreTrainedModel, model.to(device).eval())


def forgetting(base: str, tuned: PreTrainedModel, tokenizer: Any, texts: Iterable[str]) -> dict[str, Any]:
    """The loss on neutral text of the base checkpoint and of the tuned model.

    Where a task head took the place of the language-model head, the base checkpoint's own one reads what the tuned
    body writes. Where there is none, or the tuned body does not fit it, losses are None and a note says why.

    Returns:
        ``before``, ``after`` and, where they are None, ``note``.
    """
    texts = list(texts)
    whole = language_model(base, next(tuned.parameters()).device)
    if isinstance(whole, str):
        return {"before": None, "after": None, "note": whole}
    before = neutral_loss(whole, tokenizer, texts)
    if kind_of(tuned) is not None:
        return {"before": before, "after": neutral_loss(tuned, tokenizer, texts)}
    prefix, own = whole.base_model_prefix, body(tuned)
    if type(getattr(whole, prefix, None)) is not type(own):
        note = f"the tuned {type(own).__name__} does not fit the head of {type(whole).__name__}"
        return {"before": before, "after": None, "note": note}
    setattr(whole, prefix, own)
    return {"before": before, "after": neutral_loss(whole, tokenizer, texts)}
