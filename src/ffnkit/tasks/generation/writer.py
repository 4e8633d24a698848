"""What the tasks of models that write have in common: the language-model head, batches, the loss of target tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.io import loading
from ffnkit.io.fitting import is_head
from ffnkit.tasks.encoding.collate import Padded
from ffnkit.tasks.models import load_tokenizer, set_padding
from ffnkit.tasks.protocol import Collate
from ffnkit.tasks.running import token_loss
from ffnkit.tasks.settings import GenerationSettings

if TYPE_CHECKING:
    from datasets import Dataset

    from ffnkit.tasks.encoding.sequences import Prompt, Sequences

logger = logging.getLogger(__name__)
_texts: ContextVar[dict[Any, str] | None] = ContextVar("texts", default=None)


class Writer:
    """A task whose models write text, as decoders or as encoder-decoders; for :class:`AnyTask`."""

    kind: Any

    @property
    def origin(self) -> Any:
        """What knows name, source, notes, hub and the rows: the data, or the task that stands behind this one."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """As :func:`ffnkit.tasks.get` knows it."""
        return str(self.origin.name)

    @property
    def source(self) -> str:
        """Where the data come from, in words."""
        return str(self.origin.source)

    @property
    def notes(self) -> str:
        """A line on what the task asks."""
        return str(self.origin.notes)

    @property
    def hub(self) -> tuple[str, ...]:
        """Name and configuration of the dataset on the hub; () for other data."""
        return tuple(self.origin.hub)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that the tokenizer must learn."""
        return ()

    @property
    def dev_metric(self) -> str:
        """What chooses checkpoints: the loss."""
        return "loss"

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of the kind of task."""
        return "text-generation"

    def collator(self, tokenizer: Any, model: Any = None) -> Collate:
        """Makes padded batches of encoded rows; labels are padded with -100."""
        return Padded(int(tokenizer.pad_token_id))

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The tokenizer of a model, with a padding token and the task's special tokens.

        Raises:
            FfnkitError: there are no tokenizer files.
        """
        from ffnkit.tasks.generation.sets import add_special_tokens

        tokenizer = load_tokenizer(name_or_dir, **kwargs)
        add_special_tokens(tokenizer, self.special_tokens)
        return tokenizer

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """A decoder or an encoder-decoder with its language-model head, in float32 unless ``dtype`` is given.

        Args:
            tokenizer: gives the padding token; where the task added tokens to it that the model has no embedding of,
                the embedding grows, by rows that are the same for every seed.
            trained_head: refuse a checkpoint without a language-model head.
            kwargs: for ``from_pretrained``.

        Raises:
            FfnkitError: the model cannot be opened, or cannot write.
        """
        import torch

        from ffnkit.io.architectures import read_config

        known = {key: kwargs[key] for key in loading.HUB if key in kwargs}
        auto = self.auto_class(read_config(str(name_or_dir), **known))
        model, info = loading.load_with_info(auto, name_or_dir, **{"dtype": torch.float32, **kwargs})
        absent = [key for key in info.get("missing_keys", ()) if is_head(model, key)]
        if trained_head and absent:
            found = f"it has no trained head: {absent[0]} is missing from its files"
            raise FfnkitError(f"model {name_or_dir} on task {self.name}", found, "Tune it on this task first")
        if tokenizer is not None:
            grow(model, tokenizer, self.special_tokens)
        set_padding(model, tokenizer, str(name_or_dir))
        return model

    def auto_class(self, config: Any) -> Any:
        """AutoModelForSeq2SeqLM or AutoModelForCausalLM; FfnkitError for a model that cannot write."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

        if getattr(config, "is_encoder_decoder", False):
            return AutoModelForSeq2SeqLM
        if config.model_type in MASKED and not getattr(config, "is_decoder", False):
            found = f"a {config.model_type} reads in both directions and cannot write"
            do = "Choose a decoder (GPT-2, LLaMA) or an encoder-decoder (T5, BART)"
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise FfnkitError(f"{article} {self.kind} task, {self.name}", found, do)
        return AutoModelForCausalLM

    def token_loss(self, model: Any, tokenizer: Any, data: Dataset, batch_size: int) -> float:
        """The mean over all target tokens of encoded rows, in nats."""
        total, count = token_loss(model, data, self.collator(tokenizer, model), batch_size)
        return total / max(count, 1)


@contextmanager
def once() -> Iterator[None]:
    """While the block runs, in which one model writes in one way, it writes once for each prompt."""
    token = _texts.set({})
    try:
        yield
    finally:
        _texts.reset(token)


def written(
    model: Any,
    sequences: Sequences,
    prompts: Sequence[Prompt],
    rows: Mapping[str, Any],
    metrics: Sequence[str],
    settings: GenerationSettings,
    most: int,
) -> tuple[dict[str, float], dict[str, float], tuple[dict[str, Any], ...]]:
    """Metrics, speed and predictions of the texts that a model writes for prompts, for equal ones once.

    Args:
        rows: "prompt" as it is shown, and "references".
        most: tokens of a text at most.
    """
    from ffnkit.tasks.generation.decoding import decode
    from ffnkit.tasks.metrics.texts import score

    known = _texts.get()
    known = {} if known is None else known
    keys = [(tuple(prompt.ids), tuple(prompt.types or ())) for prompt in prompts]
    new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    speed = {}
    if new:
        found, seconds = decode(model, sequences, list(new.values()), settings, most)
        known.update(zip(new, found, strict=True))
        speed = {"generation_seconds": seconds, "generated_per_second": len(new) / max(seconds, 1e-9)}
    texts = [known[key] for key in keys]
    predictions = tuple(
        {"prompt": prompt, "prediction": text, "references": references}
        for prompt, text, references in zip(rows["prompt"], texts, rows["references"], strict=True)
    )
    return score(texts, rows["references"], metrics, rows["prompt"]), speed, predictions


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def grow(model: Any, tokenizer: Any, added: tuple[str, ...]) -> None:
    """Embeddings for the tokens that the task added, drawn around the mean of the others."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    if not added or not rows < len(tokenizer) <= rows + len(added):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            layers = (model.get_input_embeddings(), model.get_output_embeddings())
            for weight in {id(each.weight): each.weight for each in layers if each is not None}.values():
                old = weight[:rows].float()
                noise = 0.1 * torch.randn(len(weight) - rows, weight.shape[1])
                weight[rows:] = (old.mean(0) + noise.to(old.device) * old.std(0)).to(weight.dtype)
    logger.info("%d tokens of the task got embeddings", len(tokenizer) - rows)
