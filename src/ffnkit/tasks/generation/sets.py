"""Data of generation tasks: E2E, WebNLG 2017, DART, CoQA, and files of the user's own.

Tables have the columns "prompt" (str: all that stands before the target, what separates the two included),
"references" (list[str], one or more) and "segments" (list of (text, type) pairs, ``" ".join`` of whose texts is the
prompt; type is the special token whose id GPT-2 takes as the token type of all tokens of the segment, "" where a task
has no types).

A table may have a further column by which rows are kept together when they are split (``Source.together``).

Source: Novikova et al., The E2E Dataset, SIGDIAL 2017; Gardent et al., The WebNLG Challenge, INLG 2017; Nan et al.,
DART: Open-Domain Structured Data Record to Text Generation, NAACL 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.rows.splitting import Source, Splits, Table, divide, size, take, texts

PROMPT = ("prompt",)


@dataclass(frozen=True)
class TextData:
    """Pairs of a prompt and right answers, and what a task needs to know of them.

    Attributes:
        name: "e2e", "webnlg", "dart", or the user's.
        metrics: names in ``metrics.texts.METRICS`` that the field reports, the main one first.
        special_tokens: tokens that the tokenizer must learn (:func:`add_special_tokens`); () for none.
        eos: the special token that ends a target; "" for the tokenizer's own end-of-text token.
        target_type: token type of the target's tokens (as the second of a segment); "" for none.
        source: where the rows come from, in words.
        notes: a line on what the task asks.
        hub: name and configuration on the hub; () for other data.
        max_new_tokens: how many tokens to generate at most.
        frames: how a prompt is put to a model, with {} for the prompt: by "t5" (models that know T5's prefixes),
            "seq2seq" (other encoder-decoders) and "decoder"; empty: as it is.
        load: reads the rows; takes the data folder or None.
    """

    name: str
    metrics: tuple[str, ...]
    special_tokens: tuple[str, ...] = ()
    eos: str = ""
    target_type: str = ""
    source: str = ""
    notes: str = ""
    hub: tuple[str, ...] = ()
    max_new_tokens: int = 64
    frames: Mapping[str, str] = field(default_factory=dict, repr=False)
    load: Callable[[Path | None], Source] = field(repr=False, compare=False, kw_only=True)

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Table]:
        """Reads the rows and splits them; arguments and errors as of :meth:`ffnkit.tasks.Task.splits`.

        One row a prompt with all its references (see :func:`pairs` to train on).
        """
        asked = f"data of task {self.name}"
        read = self.load(Path(data_dir) if data_dir is not None else None)
        if read.train is not None:
            train, joined = merged(read.train)
            note = (f"train: {joined} rows joined to earlier ones with the same prompt",) if joined else ()
            read = replace(read, train=train, notes=(*read.notes, *note))
        return divide(read, same=PROMPT, asked=asked, what="prompts", label="prompt", stratify=False, **limits)


def names() -> list[str]:
    """The data that :func:`get` knows, in the order of the documentation."""
    return list(_known())


def get(name: str) -> TextData:
    """The data called ``name``; nothing is read before :meth:`TextData.splits`.

    Raises:
        FfnkitError: there is no such data.
    """
    known = _known()
    if name not in known:
        do = f"Choose one of {', '.join(known)}, or use file_data for files of your own"
        raise FfnkitError(f"generation task {name!r}", "there is no such task", do)
    return known[name]


def _known() -> dict[str, TextData]:
    from ffnkit.tasks.generation import coqa, data2text, translation

    return {**data2text.DATA, **translation.DATA, **coqa.DATA}


def file_data(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    inputs: Sequence[str],
    target: str,
    template: str | None = None,
    metrics: Sequence[str] = ("rougeL", "rouge1", "rouge2"),
    name: str = "files",
    test: str | Path | None = None,
    max_new_tokens: int = 64,
) -> TextData:
    """Prompts and targets from CSV, JSON-lines, JSON or parquet files, which are read and checked at once.

    Args:
        train: rows to train on; ``dev`` is carved out of them. None: ``validation`` is reported whole.
        validation: rows for the reported figure; by default a tenth of train is carved out, the same for every seed.
        inputs: the input columns; "a.b" is key b of the objects in column a.
        target: the target's column: a string, or a list of strings for many right answers.
        template: the prompt with columns in braces, such as "question: {question} context: {context} answer:"; by
            default just this: each column with its name, then the target's name as a cue.
        metrics: names in ``metrics.texts.METRICS``, the main one first.
        name: the task's name.
        test: further rows to report on.
        max_new_tokens: how many tokens to generate at most.

    Raises:
        FfnkitError: files that cannot be read, columns that are not there, rows without input or target, a template
            that names other columns or leaves some out, an unknown metric.
    """
    from ffnkit.tasks.generation.own import read_own
    from ffnkit.tasks.metrics.texts import check

    source, template = read_own(train, validation, test, inputs=inputs, target=target, template=template, name=name)
    if not metrics or max_new_tokens < 1:
        found = "no metric" if not metrics else f"at most {max_new_tokens} tokens to generate"
        raise FfnkitError(f"task {name}", found, "Name a metric, and generate at least one token")
    return TextData(
        name=name,
        metrics=tuple(dict.fromkeys(check(metric) for metric in metrics)),
        source=source.where,
        notes=f"{template!r}, target {target}",
        max_new_tokens=max_new_tokens,
        load=lambda _: source,
    )


def pairs(table: Table) -> Table:
    """One row for each (prompt, reference): columns "prompt", "target", "segments". A reference that repeats counts
    once."""
    rows = [(row, one) for row, several in enumerate(table["references"]) for one in dict.fromkeys(several)]
    return {
        "prompt": [table["prompt"][row] for row, _ in rows],
        "target": [one for _, one in rows],
        "segments": [table["segments"][row] for row, _ in rows],
    }


def merged(table: Table) -> tuple[Table, int]:
    """Rows of one prompt (white space aside) as one row with the references of all; and the number of rows saved."""
    first: dict[tuple[str, ...], int] = {}
    joined: dict[int, dict[str, None]] = {}
    for row, key in enumerate(texts(table, PROMPT)):
        joined.setdefault(first.setdefault(key, row), {}).update(dict.fromkeys(table["references"][row]))
    if len(joined) == size(table):
        return table, 0
    return {**take(table, list(joined)), "references": [list(each) for each in joined.values()]}, size(table) - len(
        joined
    )


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> int:
    """Adds ``tokens`` to the tokenizer, each swallowing the white space to its left; returns how many were new.

    Resize the model's embeddings if this is not 0. With them, tokenizing a prompt as a whole or segment by segment
    gives the same ids.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [AddedToken(token, lstrip=True, special=True, normalized=False) for token in tokens if token not in known]
    return int(tokenizer.add_tokens(new, special_tokens=True)) if new else 0
