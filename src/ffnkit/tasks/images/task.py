"""Image classification: the task, and tasks from folders, archives and image sets of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.tasks.classification.labels import decide
from ffnkit.tasks.classification.task import Task
from ffnkit.tasks.images.batches import ImageBatches, check_processor, load_processor, tokens_each
from ffnkit.tasks.images.files import listed
from ffnkit.tasks.rows.files import in_words, named
from ffnkit.tasks.rows.splitting import Source, Splits, Table, divide, once

if TYPE_CHECKING:
    from datasets import Dataset

KIND = "image-classification"
PREFIX = "images:"
"""Of a task's name that is a folder, an archive or a set of the hub."""
HUB = "hub:"
"""Of a set of the hub in place of a file."""
_SAME = ("digest",)  # the column by which repeated images are known
_FIVE = 5


@dataclass(frozen=True)
class ImageTask(Task):
    """Images with a class each; made by :func:`image_task` or known by name.

    Rows have "image" (where it is), "digest" (by which repeated ones are known) and "label". What takes the tokenizer's
    place is the image processor.
    """

    @property
    def pipeline_tag(self) -> str:
        """The hub's name of the kind of task."""
        return KIND

    def splits(self, data_dir: str | Path | None = None, **limits: Any) -> Splits[Dataset]:
        """As of :meth:`ffnkit.tasks.Task.splits`; no image of ``report`` is in ``train``, or twice in it."""
        asked = f"data of task {self.name}"
        read = self.load(Path(data_dir) if data_dir is not None else None)
        read = once(read, _SAME, "label", "images")
        return divide(read, same=_SAME, asked=asked, what="images", label="label", stratify=True, **limits).map(
            _dataset
        )

    def encode(self, dataset: Dataset, tokenizer: Any, max_length: int = 128, *, model: Any = None) -> Dataset:
        """``pixel_values``: where each image is, until a batch is made; and ``labels``.

        Args:
            dataset: rows of one of the splits.
            tokenizer, max_length, model: play no part here.
        """
        missing = [column for column in ("image", "label") if column not in dataset.column_names]
        if missing:
            found = f"no column {missing[0]!r} among {', '.join(dataset.column_names)}"
            raise FfnkitError("encode", found, "Give one of the splits of this task")
        return dataset.rename_columns({"image": "pixel_values", "label": "labels"})

    def collator(self, tokenizer: Any, model: Any = None) -> ImageBatches:
        """Reads the images of a batch. ``model`` tells how many tokens an image has, for calibration."""
        return ImageBatches(tokenizer, tokens_each(model.config) if model is not None else 1)

    def augmented(self, collate: ImageBatches, augment: str, seed: int) -> ImageBatches:
        """The same batches, augmented, to train on."""
        return ImageBatches(collate.processor, collate.each, augment, seed)

    def load_tokenizer(self, name_or_dir: str | Path, **kwargs: Any) -> Any:
        """The image processor; see :func:`ffnkit.tasks.images.batches.load_processor`."""
        return load_processor(name_or_dir, **kwargs)

    def load_model(
        self, name_or_dir: str | Path, *, tokenizer: Any = None, trained_head: bool = False, **kwargs: Any
    ) -> Any:
        """An image-classification model with this task's head; arguments as of :meth:`Task.load_model`.

        Args:
            tokenizer: the image processor, whose images must fit the model.
        """
        from ffnkit.tasks.models import load_classifier

        model = load_classifier(self, name_or_dir, trained_head=trained_head, **kwargs)
        if tokenizer is not None:
            check_processor(tokenizer, model.config, str(name_or_dir))
        return model

    def auto_class(self, config: Any) -> Any:
        """AutoModelForImageClassification; of DeiT the class without a teacher's head, which has no loss."""
        from transformers import AutoModelForImageClassification, DeiTForImageClassification

        return DeiTForImageClassification if config.model_type == "deit" else AutoModelForImageClassification

    def compute_metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Accuracy, and of more than five classes ``top5``: the share whose class is among the five likeliest.

        Args:
            predictions: logits (n, labels); class ids (n,) leave ``top5`` out.
        """
        from ffnkit.tasks.metrics.labelled import compute

        predictions = predictions[0] if isinstance(predictions, tuple) else predictions
        found = compute(("accuracy",), self.kind, predictions, labels)
        scores = np.asarray(predictions)
        if "top5" in self.metrics and scores.ndim > 1:
            likeliest = np.argpartition(-scores, _FIVE - 1, axis=1)[:, :_FIVE]
            found["top5"] = float((likeliest == np.asarray(labels)[:, None]).any(axis=1).mean())
        return found


def task_of(name: str, label_names: tuple[str, ...], source: str, load: Any, **more: Any) -> ImageTask:
    """A task of named classes; ``load`` gives tables of "image", "digest", "label" (ids)."""
    metrics = ("accuracy", "top5") if len(label_names) > _FIVE else ("accuracy",)
    return ImageTask(
        name, KIND, ("image",), "label", metrics, "accuracy", source, label_names=label_names, load=load, **more
    )


def image_task(
    train: str | Path | None,
    validation: str | Path | None = None,
    *,
    name: str = "images",
    test: str | Path | None = None,
    image: str | None = None,
    label: str | None = None,
    label_names: Sequence[str] = (),
) -> ImageTask:
    """A task from folders or archives with a folder of images for each class, or from an image set of the hub.

    Args:
        train: a folder, a .tar (not compressed) or a .zip to train on; "hub:NAME" or "hub:NAME/CONFIG" for a set of the
            hub (or a folder that ``datasets.load_dataset`` opens), which brings its other splits. None: there is
            nothing to train on, and ``validation`` is reported whole.
        validation: images for the reported figure; by default a tenth of train is carved out, the same for every seed.
        name: the task's name.
        test: further images to report on, in ``Splits.extra``.
        image, label: columns of a set of the hub, where it has several of images or of classes.
        label_names: the classes of a model that is evaluated; see :func:`ffnkit.tasks.classification.labels.decide`.

    Raises:
        FfnkitError: files that cannot be read, no images, a single class, classes that training never shows.
    """
    if str(train).startswith(HUB):
        from ffnkit.tasks.images.sets import hub_task

        if validation is not None or test is not None:
            raise FfnkitError(f"images {train}", "files are given too", "Leave them out: the set brings its splits")
        return hub_task(str(train).removeprefix(HUB), title=name, image=image, label=label)
    if image is not None or label is not None:
        found = f"column {image or label} is named, and images have the class of their folder"
        raise FfnkitError(f"images {train}", found, "Leave the column out")
    files = named(train, validation, test, name)
    tables, notes = {}, []
    for key, path in files.items():
        tables[key], passed = listed(path)
        notes += [f"{key}: {passed} files passed over that are no images"] if passed else []
    first = next(iter(files))  # the training images, where there are some
    labels = decide(tables[first]["label"], f"images {files[first]}", "the folders", "class", label_names)
    for key, table in tables.items():
        table["label"] = labels.read(table["label"], f"images {files[key]}")
    source = Source(
        train=tables.get("train"),
        report=tables.get("report"),
        extra={"test": tables["test"]} if "test" in tables else {},
        where=in_words(files),
        notes=(f"labels: {labels.told}", *notes),
    )
    return task_of(name, labels.names, source.where, lambda _: source, notes=labels.told)


def _dataset(table: Table) -> Dataset:
    import pyarrow
    from datasets import Dataset

    columns = {name: pyarrow.array(table[name], pyarrow.string()) for name in ("image", "digest")}
    return Dataset(pyarrow.table({**columns, "label": pyarrow.array(table["label"], pyarrow.int64())}))
