"""Dialogues as token ids: chat templates, the assistant's turns as targets, prompts to answer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.encoding.sequences import Prompt, Sequences, affixes
from ffnkit.tasks.running import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
"""A dialogue: {"role": "system", "user" or "assistant", "content": text} in a row."""

_LONGEST = 1 << 20  # bytes of a template that are read
_PROBE = "ffnkit"  # an answer that no template holds

ALPACA = (
    "BEGIN{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + END }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""Headings as of Alpaca's prompt, without the sentence that Alpaca puts before them (that is a system message here).

Source: Taori et al., Stanford Alpaca, 2023, for the headings.
"""

ROLES = (
    "BEGIN{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + END + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The roles' names before the texts."""

TEMPLATES = {"alpaca": ALPACA, "roles": ROLES}
DEFAULT = "alpaca"


def check_template(template: str | None) -> str | None:
    """``template`` where it is a name of ours, Jinja text or None; the text of a file where it names one.

    Raises:
        FfnkitError: it is none of these.
    """
    if template is None or template in TEMPLATES or "{%" in template or "{{" in template:
        return template
    if (path := template_file(template)) is not None:
        text = path.read_bytes()[:_LONGEST].decode("utf-8", "replace")
        if "{%" in text or "{{" in text:
            return text
        raise FfnkitError(f"template {template!r}", "the file holds no chat template", "Name one with Jinja text")
    do = f"Use {' or '.join(TEMPLATES)}, a file with a chat template, or its Jinja text; or leave it out"
    raise FfnkitError(f"template {template!r}", "it is no chat template and no file", do)


def template_file(template: str | None) -> Path | None:
    """The file that a template names, or None."""
    path = Path(template or "").expanduser()
    return path if template and template not in TEMPLATES and os.path.isfile(path) else None


def template_of(template: str | None, tokenizer: Any) -> str:
    """The Jinja text of a template for this tokenizer; of None the tokenizer's own, else that of ``DEFAULT``.

    Raises:
        FfnkitError: the tokenizer has several and none of them is its default, or no token that ends a text.
    """
    own = getattr(tokenizer, "chat_template", None)
    if template is None and own:
        if isinstance(own, dict) and "default" not in own:
            found = f"the tokenizer has the chat templates {', '.join(own)}"
            raise FfnkitError("the chat template", found, "Name a file with one, as template")
        return str(own["default"] if isinstance(own, dict) else own)
    template = template or DEFAULT
    if template not in TEMPLATES:
        return template
    first = tokenizer.bos_token_id is not None and affixes(tokenizer)[0] == [tokenizer.bos_token_id]
    end = "eos_token" if tokenizer.eos_token else json.dumps(tokenizer.bos_token or "")
    return TEMPLATES[template].replace("BEGIN", "{{ bos_token }}" if first else "").replace("END", end)


def rendered(tokenizer: Any, template: str, dialogues: Sequence[Messages], cue: bool) -> list[str]:
    """The dialogues as text; with ``cue`` up to where the assistant is to go on.

    Raises:
        FfnkitError: the template refuses one of them, or is no template.
    """
    import jinja2

    try:
        made = tokenizer.apply_chat_template(
            list(dialogues), chat_template=template, tokenize=False, add_generation_prompt=cue
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        found = f"it refuses a dialogue ({' '.join(str(error).split())})"
        raise FfnkitError("the chat template", found, "Name another one, as template") from error
    return [str(text) for text in made]


@dataclass
class _Example:
    """Tokens and labels of a dialogue as far as it is read; the first ``opening`` tokens are the first prompt."""

    row: int
    ids: list[int]
    labels: list[int]
    opening: int


class Chat(Sequences):
    """How a decoder with its tokenizer reads dialogues and learns the assistant's turns.

    A turn is learned behind the very tokens that its prompt has when it is to be answered: those of the messages before
    it, with what the template puts where the assistant is to go on. Learned are the tokens of the text and the token
    that ends the turn. Turns of one dialogue share an example as long as each prompt begins with the tokens before it;
    a template that rewrites earlier turns gets an example for each of them.

    Args:
        max_target: tokens of an answer at most, when prompts are cut to leave room for one.
        template: see :func:`template_of`.

    Raises:
        FfnkitError: as of :class:`Sequences`, and a template that does not work.
    """

    def __init__(
        self, tokenizer: Any, model: Any, max_length: int, max_target: int, template: str | None = None
    ) -> None:
        super().__init__(tokenizer, model, max_length, max_target)
        self.template = template_of(template, tokenizer)
        self.end = self._turn_end()

    def rendered(self, dialogues: Sequence[Messages], cue: bool) -> list[str]:
        """The dialogues as text; as :func:`rendered`."""
        return rendered(self.tokenizer, self.template, dialogues, cue)

    def openings(self, dialogues: Sequence[Messages]) -> list[Prompt]:
        """Prompts to be answered, cut to their room."""
        coded = self._coded(self.rendered(dialogues, cue=True), special=False) if dialogues else []
        long = sum(len(ids) > self.prompt_room for ids in coded)
        if long:
            logger.info("%d of %d prompts are cut to %d tokens", long, len(coded), self.prompt_room)
        return [Prompt(self._cut(ids)) for ids in coded]

    def turns(self, dialogues: Sequence[Messages]) -> Dataset:
        """``input_ids`` and ``labels`` (-100 but over the assistant's turns) of examples of ``max_length`` at most.

        A first prompt that is too long loses tokens of its middle, as in generation; what is behind the last token is
        cut.
        """
        import pyarrow
        from datasets import Dataset

        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        cut = 0
        for example in self._examples(dialogues):
            ids = self._cut(example.ids[: example.opening]) + example.ids[example.opening :]
            labels = [IGNORED] * (len(ids) - len(example.labels) + example.opening) + example.labels[example.opening :]
            cut += len(ids) > self.limit or len(ids) < len(example.ids)
            columns["input_ids"].append(ids[: self.limit])
            columns["labels"].append(labels[: self.limit])
        if cut:
            logger.info("%d of %d examples are cut to %d tokens", cut, len(columns["labels"]), self.limit)
        kind = pyarrow.list_(pyarrow.int32())
        return Dataset(pyarrow.table({name: pyarrow.array(each, kind) for name, each in columns.items()}))

    def _examples(self, dialogues: Sequence[Messages]) -> list[_Example]:
        asked = [(row, place) for row, messages in enumerate(dialogues) for place in answered(messages)]
        if not asked:
            return []
        before = self.rendered([dialogues[row][:place] for row, place in asked], cue=True)
        after = self.rendered([dialogues[row][: place + 1] for row, place in asked], cue=False)
        coded = zip(self._coded(before, special=False), self._coded(after, special=False), strict=True)
        found: list[_Example] = []
        for (row, _), first, whole, (prompt, both) in zip(asked, before, after, coded, strict=True):
            last = found[-1] if found else None
            if last is not None and last.row == row and prompt[: len(last.ids)] == last.ids:
                last.labels += [IGNORED] * (len(prompt) - len(last.ids))
                last.ids = list(prompt)
            else:
                found.append(_Example(row, list(prompt), [IGNORED] * len(prompt), len(prompt)))
            answer = self._answer(first, whole, prompt, both)
            found[-1].ids += answer
            found[-1].labels += answer
        return found

    def _answer(self, before: str, after: str, prompt: list[int], both: list[int]) -> list[int]:
        """The tokens of an answer behind those of its prompt, up to the token that ends the turn."""
        if not after.startswith(before):
            found = "an answer does not begin where its prompt ends"
            raise FfnkitError("the chat template", found, "Name another one, as template")
        ids = both[len(prompt) :] if both[: len(prompt)] == prompt else self._behind(after[len(before) :])
        ends = [place for place, token in enumerate(ids) if token == self.end]
        return ids[: ends[-1] + 1] if ends else [*ids, self.end]

    def _behind(self, text: str) -> list[int]:
        """The tokens of a text that does not begin a line of input, whatever a tokenizer puts before such."""
        alone, line, both = self._coded([text, "\n", f"\n{text}"], special=False)
        return both[len(line) :] if both[: len(line)] == line else alone

    def _turn_end(self) -> int:
        """The first token behind an answer that is no piece of text; the tokenizer's end of text where none is."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        tail = self.rendered([probe], cue=False)[0].rpartition(_PROBE)[2]
        known = {*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids}
        return next((token for token in self._coded([tail], special=False)[0] if token in known), self.end)


def answered(messages: Messages) -> list[int]:
    """The places of the assistant's turns that have a user's before them."""
    first = next((place for place, each in enumerate(messages) if each["role"] == "user"), len(messages))
    return [place for place, each in enumerate(messages) if place > first and each["role"] == "assistant"]
