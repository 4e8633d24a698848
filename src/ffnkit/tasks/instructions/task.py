"""Tasks to follow instructions: Alpaca, OpenAssistant, and dialogues of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError
from ffnkit.tasks.generation.writer import Writer, perplexity, written
from ffnkit.tasks.instructions import chat, sets
from ffnkit.tasks.protocol import Evaluation
from ffnkit.tasks.rows.splitting import Splits, Table
from ffnkit.tasks.running import encoded_rows
from ffnkit.tasks.settings import GenerationSettings

if TYPE_CHECKING:
    from datasets import Dataset

KIND = "instruction"


@dataclass(frozen=True)
class InstructionTask(Writer):
    """Dialogues of which a decoder learns the assistant's turns, each with the token that ends it.

    Attributes:
        data: the dialogues.
        template: the chat template: "alpaca", "roles", or Jinja text; None: the tokenizer's own, else "alpaca".
        reported: the metrics, the main one first: "perplexity", and of the generated answers names in
            ``metrics.texts.METRICS``. With the perplexity alone nothing is generated.
    """

    data: sets.InstructionData
    template: str | None = None
    reported: tuple[str, ...] = ("perplexity", "rougeL", "chrf")

    kind = KIND
    text = ("messages",)
    label = "references"

    @property
    def origin(self) -> sets.InstructionData:
        """The data."""
        return self.data

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported; the perplexity of the right answers always is."""
        return self.reported if "perplexity" in self.reported else (*self.reported, "perplexity")

    @property
    def main_metric(self) -> str:
        """The first of the metrics in tables."""
        return self.reported[0]

    def with_metrics(self, metrics: Sequence[str]) -> InstructionTask:
        """The task with other metrics, the main one first; FfnkitError for an unknown one."""
        from ffnkit.tasks.metrics.texts import check

        names = tuple(dict.fromkeys(name if name == "perplexity" else check(name) for name in metrics))
        return replace(self, reported=names or self.reported)

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Dataset]:
        """One row a dialogue: "messages", "prompt", "references"; arguments as of :meth:`Task.splits`."""
        return self.data.splits(data_dir, **limits).map(_dataset)

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The tokenizer of a model, with a padding token and the chat template, which is saved with it.

        Raises:
            FfnkitError: there are no tokenizer files.
        """
        tokenizer = super().load_tokenizer(name_or_dir, **kwargs)
        tokenizer.chat_template = chat.template_of(self.template, tokenizer)
        return tokenizer

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """As of every task that writes; the token that ends turns joins those at which the model stops to write."""
        model = super().load_model(name_or_dir, tokenizer=tokenizer, trained_head=trained_head, **kwargs)
        if tokenizer is not None and model.generation_config is not None:
            end, stops = self._chat(tokenizer, model, 1 << 20).end, model.generation_config.eos_token_id
            stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
            if end not in stops:
                model.generation_config.eos_token_id = [*stops, end]
        return model

    def auto_class(self, config: Any) -> Any:
        """AutoModelForCausalLM; FfnkitError for a model that is no decoder."""
        if getattr(config, "is_encoder_decoder", False):
            do = "Choose a decoder, or name an input and a target column, which make a generation task"
            raise FfnkitError(f"an {KIND} task, {self.name}", f"a {config.model_type} is an encoder-decoder", do)
        return super().auto_class(config)

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """An example a dialogue: ``input_ids``, ``labels`` (-100 but over the assistant's turns and their ends).

        Args:
            dataset: rows of one of the splits.
            max_length: tokens of an example.
            model: needed.

        Raises:
            FfnkitError: no room for a prompt and an answer, or a template that does not work.
        """
        return self._chat(tokenizer, model, max_length).turns(dataset[:]["messages"])

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        max_length: int = 128,
        generation: GenerationSettings | None = None,
        encoded: Dataset | None = None,
        loss_only: bool = False,
    ) -> Evaluation:
        """Loss and perplexity of all the assistant's turns; unless ``loss_only``, the last ones are generated too."""
        data = encoded if encoded is not None else encoded_rows(self, dataset, tokenizer, max_length, model)
        loss = self.token_loss(model, tokenizer, data, batch_size)
        likelihood = {"perplexity": perplexity(loss)}
        scored = tuple(name for name in self.metrics if name != "perplexity")
        if loss_only or not scored or "messages" not in dataset.column_names:
            return Evaluation(likelihood, loss)
        settings = generation or GenerationSettings()
        most = settings.max_new_tokens or self.data.max_new_tokens
        sequences, rows = self._chat(tokenizer, model, max_length, most), dataset[:]
        prompts = sequences.openings([messages[:-1] for messages in rows["messages"]])
        scores, speed, predictions = written(model, sequences, prompts, rows, scored, settings, most)
        return Evaluation({**likelihood, **scores}, loss, speed, predictions)

    def _chat(self, tokenizer: Any, model: Any, max_length: int, most: int | None = None) -> chat.Chat:
        return chat.Chat(tokenizer, model, max_length, most or self.data.max_new_tokens, self.template)


def instruction_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    template: str | None = None,
    metrics: Sequence[str] = (),
    name: str = "files",
    test: str | Path | None = None,
    max_new_tokens: int = 128,
) -> InstructionTask:
    """Dialogues from files of one's own; arguments as of :func:`.sets.file_data`.

    Args:
        template: a chat template, its name ("alpaca", "roles") or a file with one; see :class:`InstructionTask`.
        metrics: the main one first; () for perplexity, rougeL and chrf.
    """
    checked = chat.check_template(template)
    data = sets.file_data(train, validation, name=name, test=test, max_new_tokens=max_new_tokens)
    return InstructionTask(data, checked).with_metrics(metrics)


def _dataset(table: Table) -> Dataset:
    import pyarrow
    from datasets import Dataset

    text = pyarrow.string()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    kinds = {"messages": messages, "prompt": text, "references": pyarrow.list_(text)}
    return Dataset(pyarrow.table({name: pyarrow.array(table[name], kind) for name, kind in kinds.items()}))
