"""What the tasks of classifiers and regressions have in common: batches, metrics, loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ffnkit.io.progress import counted
from ffnkit.tasks.protocol import Collate, Evaluation
from ffnkit.tasks.running import by_length, encoded_rows, evaluating, forward_names, logits_of

if TYPE_CHECKING:
    from ffnkit.tasks.settings import GenerationSettings


class Classifier:
    """What tasks have in common whose models read a text and give one answer; for :class:`AnyTask`."""

    @property
    def dev_metric(self) -> str:
        """What chooses checkpoints: the main metric."""
        return str(self.main_metric)  # type: ignore[attr-defined]

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of the kind of task."""
        return "text-classification"

    def collator(self, tokenizer: Any, model: Any = None) -> Collate:
        """Makes padded batches of encoded rows."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def auto_class(self, config: Any) -> Any:
        """AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Any,
        *,
        batch_size: int = 64,
        max_length: int = 128,
        generation: GenerationSettings | None = None,
        encoded: Any = None,
        loss_only: bool = False,
    ) -> Evaluation:
        """Every metric, and the mean loss over the examples; ``generation`` and ``loss_only`` play no part.

        Examples are taken in order of length; predictions go back to the dataset's order before they are scored.
        """
        data = encoded if encoded is not None else encoded_rows(self, dataset, tokenizer, max_length, model)
        order = by_length(data)
        device = next(model.parameters()).device
        collate = self.collator(tokenizer, model)
        known = forward_names(model) | {"label", "labels"}
        data = data.select_columns([name for name in data.column_names if name in known])
        predictions: list[np.ndarray] = []
        losses: list[float] = []
        with evaluating(model):
            for start in counted(range(0, len(order), batch_size), "evaluating"):
                rows = [data[int(i)] for i in order[start : start + batch_size]]
                batch = {name: value.to(device) for name, value in collate(rows).items()}
                output = model(**batch)
                losses.append(float(output.loss) * len(rows))
                predictions.append(logits_of(output).float().cpu().numpy())
        scores = np.concatenate(predictions)
        restored = np.empty_like(scores)
        restored[order] = scores
        labels = data["labels" if "labels" in data.column_names else "label"]
        metrics = self.compute_metrics(restored, np.asarray(labels))  # type: ignore[attr-defined]
        figures = {key: float(value) for key, value in metrics.items()}
        return Evaluation(figures, float(np.sum(losses) / len(order)), outputs=restored)
