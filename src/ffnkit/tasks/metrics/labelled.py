"""Metrics of labels and numbers by name, computed with scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffnkit.errors import FfnkitError


@dataclass(frozen=True)
class Metric:
    """One figure from predictions (n,) and labels (n,): class ids, or numbers in a regression."""

    kind: str
    score: Callable[[np.ndarray, np.ndarray], float]
    greater_is_better: bool = True
    greatest: float | None = 1.0  # that it can have


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predicted == labels))


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, pos_label=1, average="binary", zero_division=0))


def _macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0))


def _matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def _spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def _correlation(of: Callable[..., Any], predicted: np.ndarray, labels: np.ndarray) -> float:
    """A correlation; 0 where it is undefined, that is for constant predictions or fewer than two rows."""
    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant predictions, answered below
        value = float(of(predicted, labels).statistic)
    return value if np.isfinite(value) else 0.0


def _mse(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((predicted - labels) ** 2))


METRICS: dict[str, Metric] = {
    "accuracy": Metric("classification", _accuracy),
    "f1": Metric("classification", _f1),
    "macro_f1": Metric("classification", _macro_f1),
    "matthews": Metric("classification", _matthews),
    "pearson": Metric("regression", _pearson),
    "spearman": Metric("regression", _spearman),
    "mse": Metric("regression", _mse, greater_is_better=False, greatest=None),
}


def check(name: str, kind: str, num_labels: int) -> str:
    """``name`` if it measures a task of this kind with this many labels.

    Raises:
        FfnkitError: no such metric, one of the other kind, or f1 for other than two labels.
    """
    fitting = [key for key, metric in METRICS.items() if metric.kind == kind and (key != "f1" or num_labels == 2)]
    if name in fitting:
        return name
    found = "there is no such metric"
    if name in METRICS:
        found = f"this is a {kind} with {num_labels} labels" if kind == "classification" else "this is a regression"
    raise FfnkitError(f"metric {name!r}", found, f"Choose one of {', '.join(fitting)}")


def compute(names: Sequence[str], kind: str, predictions: Any, labels: Any) -> dict[str, float]:
    """Each metric of ``names``.

    Args:
        predictions: logits (n, labels), class ids (n,), or in a regression numbers (n,) or (n, 1); of a tuple the
            first member counts, since models give further outputs beside their logits.
        labels: (n,) class ids or numbers.

    Raises:
        FfnkitError: predictions that are NaN or infinite, or of another length than the labels.
    """
    if isinstance(predictions, tuple):
        predictions = predictions[0]
    scores, truth = np.asarray(predictions), np.asarray(labels)
    asked = f"metrics {', '.join(names)}"
    if len(scores) != len(truth) or not len(truth):
        found = f"{len(scores)} predictions for {len(truth)} labels"
        raise FfnkitError(asked, found, "Give one prediction for each label, and at least one")
    if not np.issubdtype(scores.dtype, np.integer):
        bad = int((~np.isfinite(scores.reshape(len(scores), -1))).any(axis=1).sum())
        if bad:
            found = f"{bad} of {len(scores)} predictions are NaN or infinite"
            raise FfnkitError(asked, found, "Training diverged: lower the learning rate, or use precision fp32")
    if kind == "regression":
        values, truth = scores.reshape(len(scores), -1)[:, 0].astype(np.float64), truth.astype(np.float64)
    else:
        values, truth = (scores.argmax(axis=-1) if scores.ndim > 1 else scores).astype(np.int64), truth.astype(np.int64)
    return {name: METRICS[name].score(values, truth) for name in names}
