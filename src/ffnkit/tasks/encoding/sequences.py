"""Prompts and targets as token ids, for decoders and for encoder-decoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.tasks.running import IGNORED, is_seq2seq

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TYPED = frozenset({"gpt2", "openai-gpt", "ctrl"})
"""Kinds of models whose token types are token ids: the embedding of the type is added to that of the token."""
_CUE = 16  # tokens at the end of a prompt that stay when it is cut: templates put their cue there
_BATCH = 4096


@dataclass(frozen=True)
class Prompt:
    """Token ids, and token types where the model takes them."""

    ids: list[int]
    types: list[int] | None = None


def positions(model: Any) -> int:
    """The longest input that a model has positions for; very many where it sets no bound."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(inner, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return 1 << 30
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = [int(m.padding_idx) + 1 for m in tables if getattr(m, "padding_idx", None) is not None]
    return known - max(padding, default=0)  # RoBERTa counts from behind the padding token


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []


def end_of_text(tokenizer: Any, wanted: str = "") -> int:
    """The token that ends a target: ``wanted``, else the tokenizer's own.

    Raises:
        FfnkitError: it has none.
    """
    end = tokenizer.convert_tokens_to_ids(wanted) if wanted else tokenizer.eos_token_id
    end = tokenizer.bos_token_id if end is None else end
    if end is None:
        do = "Name another tokenizer with --tokenizer (tokenizer= in Python)"
        raise FfnkitError("the end of a generated text", "the tokenizer has no end-of-text token", do)
    return int(end)


class Sequences:
    """How one model with its tokenizer reads prompts and learns targets.

    A decoder reads prompt and target in a row: both together have ``max_length`` tokens, of which ``max_target`` (at
    most half) are kept for the target. An encoder-decoder has ``max_length`` for each. A prompt that is too long loses
    tokens of its middle: its last 16 stay, where a cue to answer stands.

    Args:
        max_target: tokens of a target at most.
        end: the special token that ends a decoder's target; "" for the tokenizer's own.
        target_type: the special token whose id is the token type of a target; "" for none.

    Raises:
        FfnkitError: too few tokens for a prompt and a target, or no token that ends a text.
    """

    def __init__(
        self, tokenizer: Any, model: Any, max_length: int, max_target: int, end: str = "", target_type: str = ""
    ) -> None:
        self.tokenizer, self.seq2seq = tokenizer, is_seq2seq(model)
        self.prefix, self.suffix = affixes(tokenizer)
        self.positions = positions(model)
        limit = min(max_length, int(tokenizer.model_max_length), self.positions)
        least = len(self.prefix) + len(self.suffix) + (1 if self.seq2seq else 2)
        if limit < max(least, 4):
            raise FfnkitError(f"max_length {max_length}", "no room for a prompt and a target", "Use more tokens")
        self.limit = limit
        self.target_room = limit if self.seq2seq else min(max_target, limit // 2)
        self.prompt_room = limit if self.seq2seq else limit - self.target_room
        self.end = end_of_text(tokenizer, "" if self.seq2seq else end)
        typed = bool(target_type) and getattr(model.config, "model_type", "") in TYPED
        self.target_type = int(tokenizer.convert_tokens_to_ids(target_type)) if typed else None

    def prompts(self, texts: Sequence[str], segments: Sequence[Any] | None = None) -> list[Prompt]:
        """Prompts as the model reads them, cut to their room; ``segments`` give token types (``generation.sets``)."""
        prompts = self._whole(texts, segments)
        long = sum(len(prompt.ids) > self.prompt_room for prompt in prompts)
        if long:
            logger.info("%d of %d prompts are cut to %d tokens", long, len(prompts), self.prompt_room)
        return [Prompt(self._cut(each.ids), None if each.types is None else self._cut(each.types)) for each in prompts]

    def examples(self, texts: Sequence[str], targets: Sequence[str], segments: Sequence[Any] | None = None) -> Dataset:
        """``input_ids``, ``labels`` (-100 over the prompt) and, where the model takes them, ``token_type_ids``."""
        import pyarrow
        from datasets import Dataset

        whole = self._whole(texts, segments)
        answers = self._targets(texts, targets, whole)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        columns |= {"token_type_ids": []} if self.target_type is not None else {}
        cut = 0
        for prompt, answer in zip(whole, answers, strict=True):
            ids = self._cut(prompt.ids)
            kept = answer[: self.limit if self.seq2seq else self.limit - len(ids)]
            cut += len(kept) < len(answer) or len(ids) < len(prompt.ids)
            columns["input_ids"].append(ids if self.seq2seq else ids + kept)
            columns["labels"].append(kept if self.seq2seq else [IGNORED] * len(ids) + kept)
            if prompt.types is not None and self.target_type is not None:
                columns["token_type_ids"].append(self._cut(prompt.types) + [self.target_type] * len(kept))
        if cut:
            logger.info("%d of %d examples are cut to %d tokens", cut, len(whole), self.limit)
        kind = pyarrow.list_(pyarrow.int32())
        return Dataset(pyarrow.table({name: pyarrow.array(rows, kind) for name, rows in columns.items()}))

    def targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Targets of an encoder-decoder, with their end."""
        coded = self._coded(targets, text_target=True)
        return [ids if self.end in ids else [*ids, self.end] for ids in coded]

    def _targets(self, texts: Sequence[str], targets: Sequence[str], prompts: Sequence[Prompt]) -> list[list[int]]:
        if self.seq2seq:
            return self.targets(targets)
        after = [f" {target}" for target in targets]
        alone = self._coded(after, special=False)
        together = self._coded([text + target for text, target in zip(texts, after, strict=True)])
        rows = []
        for prompt, own, both in zip(prompts, alone, together, strict=True):
            # Pieces of words depend on what is before them; where those of the prompt change, the target stands alone.
            both = self._open(both)
            head = both[: len(prompt.ids)] == prompt.ids
            rows.append([*(both[len(prompt.ids) :] if head else own), self.end])
        return rows

    def _whole(self, texts: Sequence[str], segments: Sequence[Any] | None) -> list[Prompt]:
        if self.target_type is not None and segments is not None:
            return self._typed(segments)
        different = list(dict.fromkeys(texts))
        coded = self._coded(different)
        known = dict(zip(different, coded if self.seq2seq else map(self._open, coded), strict=True))
        least = [self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end]
        return [Prompt(known[text] or least) for text in texts]

    def _typed(self, segments: Sequence[Any]) -> list[Prompt]:
        pieces = list(dict.fromkeys(text for row in segments for text, _ in row))
        known = dict(zip(pieces, self._coded(pieces, special=False), strict=True))
        kinds = {kind for row in segments for _, kind in row}
        type_ids = {kind: int(self.tokenizer.convert_tokens_to_ids(kind)) for kind in kinds}
        prompts = []
        for row in segments:
            ids = self.prefix + [token for text, _ in row for token in known[text]]
            types = [type_ids[row[0][1]]] * len(self.prefix)
            prompts.append(Prompt(ids, types + [type_ids[kind] for text, kind in row for _ in known[text]]))
        return prompts

    def _open(self, ids: list[int]) -> list[int]:
        """Without the special tokens after a text, so that a decoder goes on."""
        end = len(self.suffix)
        return ids[:-end] if end and ids[-end:] == self.suffix else ids

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.prompt_room:
            return ids
        last = min(_CUE, self.prompt_room // 2)
        return ids[: self.prompt_room - last] + ids[-last:]

    def _coded(self, texts: Sequence[str], *, special: bool = True, text_target: bool = False) -> list[list[int]]:
        coded: list[list[int]] = []
        for start in counted(range(0, len(texts), _BATCH), "reading tokens"):
            part = list(texts[start : start + _BATCH])
            given: dict[str, Any] = {"text_target": part} if text_target else {"text": part}
            coded += self.tokenizer(**given, add_special_tokens=special, verbose=False)["input_ids"]
        return coded
