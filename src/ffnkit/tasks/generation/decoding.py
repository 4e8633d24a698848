"""Greedy and beam decoding of many prompts, batched by length."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ffnkit.io.progress import counted
from ffnkit.tasks.encoding.collate import Padded
from ffnkit.tasks.encoding.sequences import Prompt, Sequences
from ffnkit.tasks.running import evaluating, is_seq2seq
from ffnkit.tasks.settings import GenerationSettings

_KEPT = (
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)  # of a model's own generation settings: what its tokens mean; not how it searches


def decode(
    model: Any, sequences: Sequences, prompts: Sequence[Prompt], settings: GenerationSettings, max_new_tokens: int
) -> tuple[list[str], float]:
    """A text for each prompt, in their order, and the seconds that it took.

    Decoders get their prompts padded on the left. Cached keys and values are used. A text ends at the token that ends
    targets. How the model's own generation settings search (beams, penalties, least lengths, sampling) plays no part;
    which tokens begin a text and which are barred does.

    Args:
        max_new_tokens: tokens of a text at most; fewer where a decoder has no positions left.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    two = is_seq2seq(inner)
    most = max_new_tokens
    if not two:
        most = max(1, min(most, sequences.positions - max(len(prompt.ids) for prompt in prompts)))
    device = next(inner.parameters()).device
    collate = Padded(int(sequences.tokenizer.pad_token_id), left=not two)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    found: dict[int, str] = {}
    start = time.perf_counter()
    with evaluating(model), _generation_config(inner, sequences, settings, most), torch.no_grad():
        for place in counted(range(0, len(order), settings.batch_size), "writing answers"):
            rows = order[place : place + settings.batch_size]
            batch = collate([_row(prompts[i]) for i in rows])
            output = inner.generate(
                **{name: value.to(device) for name, value in batch.items()},
                logits_processor=_no_repeats(settings, 0 if two else batch["input_ids"].shape[1]),
            )
            new = output if two else output[:, batch["input_ids"].shape[1] :]
            found |= dict(zip(rows, _texts(new.tolist(), sequences, two), strict=True))
    return [found[i] for i in range(len(prompts))], time.perf_counter() - start


def _row(prompt: Prompt) -> dict[str, list[int]]:
    return {"input_ids": prompt.ids, **({} if prompt.types is None else {"token_type_ids": prompt.types})}


def _no_repeats(settings: GenerationSettings, prompt: int) -> Any:
    """Bars n-grams that the generated text has already; the library's own bars those of a decoder's prompt too."""
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    class NoRepeats(NoRepeatNGramLogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return super().__call__(input_ids[:, prompt:], scores)

    return LogitsProcessorList([NoRepeats(settings.no_repeat_ngram_size)] if settings.no_repeat_ngram_size else [])


def _texts(rows: list[list[int]], sequences: Sequences, two: bool) -> list[str]:
    first = 1 if two else 0  # the token that a decoder beside an encoder starts with may be the one that ends texts
    kept = []
    for ids in rows:
        ids = ids[first:]
        kept.append(ids[: ids.index(sequences.end)] if sequences.end in ids else ids)
    decoded = sequences.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [str(text).strip() for text in decoded]


@contextmanager
def _generation_config(model: Any, sequences: Sequences, settings: GenerationSettings, most: int) -> Iterator[None]:
    """The model's generation settings exchanged for ours; ``generate`` would fill gaps in ours from its own."""
    from transformers import GenerationConfig

    before = model.generation_config
    beams: dict[str, Any] = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    model.generation_config = GenerationConfig(
        **{name: getattr(before, name, None) for name in _KEPT},
        **beams,
        max_new_tokens=most,
        do_sample=False,
        num_beams=settings.num_beams,
        eos_token_id=sequences.end,
        pad_token_id=int(sequences.tokenizer.pad_token_id),
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = before
