"""Image sets by name: cifar10, mnist, scikit-learn's digits, and sets of the hub.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; LeCun et al., Gradient-Based Learning
Applied to Document Recognition, Proc. IEEE 1998; Alpaydin and Kaynak, Cascading Classifiers, Kybernetika 1998.
"""

from __future__ import annotations

import functools
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ffnkit.errors import FfnkitError
from ffnkit.tasks.images.files import ARCHIVES, SEPARATOR, STORES, digest, listed
from ffnkit.tasks.images.task import ImageTask, task_of
from ffnkit.tasks.rows.locate import data_folder, from_hub
from ffnkit.tasks.rows.splitting import Source, Table, size

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUMBERS = tuple(str(number) for number in range(10))
_HUB, _IDX, _DIGITS = "hub=", "idx=", "digits="
_MNIST = ("train", "t10k")
_MNIST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_CIFAR_FILES = ("train.tar", "test.tar")
_CIFAR_HUB, _MNIST_HUB = "uoft-cs/cifar10", "ylecun/mnist"
_REPORTED = ("validation", "valid", "val", "test")


# --- pixels in files of arrays ------------------------------------------------------------------------------------


class _Pixels:
    """Grey images (n, height, width), uint8; a place is a row."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def read(self, place: str) -> np.ndarray:
        """The pixels of a row."""
        return self.images[int(place)]


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of bytes, gzipped or not.

    Raises:
        FfnkitError: it cannot be read, or is no such file.
    """
    asked, do = f"data file {path}", "Give the files of MNIST, gzipped or not"
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise FfnkitError(asked, f"it cannot be read ({error})", do) from error
    axes = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    shape = tuple(int.from_bytes(data[4 * axis : 4 * axis + 4], "big") for axis in range(1, axes + 1))
    if not axes or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise FfnkitError(asked, "it is no whole IDX file of bytes", do)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _digits(_: str = "") -> _Pixels:
    from sklearn.datasets import load_digits

    return _Pixels(np.minimum(load_digits().images * 16, 255).astype(np.uint8))  # 0 to 16 in the set


def _pixel_table(source: str, images: np.ndarray, labels: np.ndarray) -> Table:
    return {
        "image": [f"{source}{SEPARATOR}{row}" for row in range(len(images))],
        "digest": [digest(np.ascontiguousarray(image)) for image in images],
        "label": [int(label) for label in labels],
    }


def _load_digits(_: Path | None) -> Source:
    from sklearn.datasets import load_digits

    table = _pixel_table(_DIGITS, _digits().images, load_digits().target)
    return Source(train=table, report=None, where="scikit-learn's digits", report_share=0.2)


def _load_mnist(data_dir: Path | None) -> Source:
    folder = data_folder("mnist", data_dir, _MNIST_FILES)
    if folder is None:
        return _named_hub("mnist", _MNIST_HUB, NUMBERS, _MNIST_FILES)
    tables = {name: table for name in _MNIST if (table := _mnist_part(folder, name)) is not None}
    if "t10k" not in tables:
        do = f"Put {' and '.join(_MNIST_FILES)} there"
        raise FfnkitError("data of task mnist", f"{folder} has no t10k files", do)
    where = f"folder {folder}"
    if "train" in tables:
        return Source(tables["train"], tables["t10k"], where)
    note = "there is no train split: train, dev and report are carved out of t10k"
    return Source(tables["t10k"], None, where, notes=(note,), report_share=0.2)


def _mnist_part(folder: Path, name: str) -> Table | None:
    found = [_either(folder / f"{name}-{what}-ubyte") for what in ("images-idx3", "labels-idx1")]
    if found[0] is None or found[1] is None:
        return None
    images, labels = read_idx(found[0]), read_idx(found[1])
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        what = f"images {images.shape} and labels {labels.shape} do not go together"
        raise FfnkitError(f"data file {found[0]}", what, "Give the files of MNIST")
    return _pixel_table(f"{_IDX}{found[0].resolve()}", images, labels)


def _either(path: Path) -> Path | None:
    return next((each for each in (path.with_name(path.name + ".gz"), path) if each.is_file()), None)


# --- archives -----------------------------------------------------------------------------------------------------


def _load_cifar(data_dir: Path | None) -> Source:
    folder = data_folder("cifar10", data_dir, _CIFAR_FILES)
    if folder is None:
        return _named_hub("cifar10", _CIFAR_HUB, CIFAR, _CIFAR_FILES)
    tables = {}
    for split in ("train", "test"):
        options = [folder / split, *(folder / f"{split}{suffix}" for suffix in ARCHIVES)]
        path = next((each for each in options if each.exists()), None)
        if path is None:
            found = f"{folder} has no {split}.tar"
            raise FfnkitError("data of task cifar10", found, "Put a tar, a zip or a folder of class folders there")
        tables[split], _ = listed(path)
        unknown = sorted({*tables[split]["label"]} - {*CIFAR})
        if unknown:
            raise FfnkitError(f"images {path}", f"{unknown[0]} is no class of CIFAR-10", f"Use {', '.join(CIFAR)}")
        tables[split]["label"] = [CIFAR.index(label) for label in tables[split]["label"]]
    return Source(tables["train"], tables["test"], f"folder {folder}")


# --- the hub ------------------------------------------------------------------------------------------------------


class _HubStore:
    """One split of a set of the hub; a place is a row. Images stay in the hub's files until they are read."""

    def __init__(self, source: str) -> None:
        name, self.column, split = source.removeprefix(_HUB).rsplit("|", 2)
        self.rows = _opened(name)[split]

    def read(self, place: str) -> bytes:
        """The bytes of an image's file."""
        found = self.rows[int(place)][self.column]
        return bytes(found["bytes"]) if found.get("bytes") else Path(found["path"]).read_bytes()


@functools.lru_cache(maxsize=4)
def _opened(name: str, task: str = "images", files: tuple[str, ...] = ()) -> dict[str, Any]:
    """The splits of a set ("owner/name", "owner/name/configuration" or a folder), its images not decoded."""
    from datasets import Image

    parts = name.split("/")
    whole = os.path.isdir(Path(name)) or len(parts) < 3
    loaded = from_hub(task, (name,) if whole else ("/".join(parts[:2]), "/".join(parts[2:])), files)
    found = {}
    for split, rows in loaded.items():
        for column in [column for column, feature in rows.features.items() if isinstance(feature, Image)]:
            rows = rows.cast_column(column, Image(decode=False))
        found[str(split)] = rows
    return found


def hub_task(name: str, *, title: str = "images", image: str | None = None, label: str | None = None) -> ImageTask:
    """A task from an image set of the hub; see :func:`ffnkit.tasks.images.task.image_task`.

    Raises:
        FfnkitError: it cannot be opened, has no train split, or no or several columns of images or of classes.
    """
    folder = Path(name).expanduser()
    name = str(folder.resolve()) if os.path.isdir(folder) else name
    asked = f"images hub:{name}"
    try:
        splits = _opened(name)
    except FfnkitError as error:
        raise FfnkitError(asked, error.found, "Check the name, or download it first and give its folder") from error
    if "train" not in splits:
        raise FfnkitError(asked, f"it has the splits {', '.join(splits)}", "Choose a set with a train split")
    features = splits["train"].features
    image = _column(asked, image, _of_kind(features, "Image"), "image")
    label = _column(asked, label, _of_kind(features, "ClassLabel"), "label", tuple(features))
    names = tuple(getattr(features[label], "names", None) or sorted({*splits["train"][label]}))
    source = _hub_source(name, splits, image, label, names)
    hub = () if os.path.isdir(folder) else (name,)
    told = tuple(str(each) for each in names)
    return task_of(title, told, source.where, lambda _: source, notes=f"{image} to {label}", hub=hub)


def _of_kind(features: Any, kind: str) -> list[str]:
    return [key for key, feature in features.items() if type(feature).__name__ == kind]


def _column(asked: str, given: str | None, found: list[str], what: str, others: tuple[str, ...] = ()) -> str:
    """The column that is given, the one of the usual name, or the only one there is."""
    known = [*found, *(other for other in others if other not in found)]
    for column in (given,) if given is not None else (what, found[0] if len(found) == 1 else None):
        if column in known:
            return str(column)
    said = f"no {what} column {given!r}" if given is not None else f"{len(found)} columns that may be the {what}"
    raise FfnkitError(asked, said, f"Name one of {', '.join(known) or 'none'} as the {what} column")


def _hub_source(name: str, splits: dict[str, Any], image: str, label: str, names: tuple[Any, ...]) -> Source:
    tables = {split: _hub_table(name, split, rows, image, label, names) for split, rows in splits.items()}
    reported = [split for split in _REPORTED if split in tables and size(tables[split])]
    extra = {split: tables[split] for split in reported[1:]}
    return Source(tables["train"], tables[reported[0]] if reported else None, f"hub {name}", extra)


def _hub_table(name: str, split: str, rows: Any, image: str, label: str, names: tuple[Any, ...]) -> Table:
    """Rows of the set with a known class; others (-1: the class is not told) are left out."""
    given = list(rows[label])
    classes = {each: number for number, each in enumerate(names)}
    ids = given if hasattr(rows.features[label], "names") else [classes.get(each, -1) for each in given]
    marks = [mark for chunk in rows.data.column(image).chunks for mark in _digests(chunk)]
    kept = [row for row, each in enumerate(ids) if each is not None and each >= 0]
    return {
        "image": [f"{_HUB}{name}|{image}|{split}{SEPARATOR}{row}" for row in kept],
        "digest": [marks[row] for row in kept],
        "label": [int(ids[row]) for row in kept],
    }


def _digests(chunk: Any) -> Iterator[str]:
    for data, path in zip(chunk.field("bytes"), chunk.field("path"), strict=True):
        yield digest(data.as_buffer() if data.is_valid else Path(path.as_py()).read_bytes())


def _named_hub(task: str, hub: str, names: tuple[str, ...], files: tuple[str, ...]) -> Source:
    """A set that has a task of its own: its train split, and its test split for the report."""
    splits = {split: rows for split, rows in _opened(hub, task, files).items() if split in ("train", "test")}
    features = splits["train"].features
    return _hub_source(hub, splits, _of_kind(features, "Image")[0], "label", names)


STORES[_HUB] = _HubStore
STORES[_IDX] = lambda source: _Pixels(read_idx(Path(source.removeprefix(_IDX))))
STORES[_DIGITS] = _digits

TASKS: tuple[ImageTask, ...] = (
    task_of(
        "cifar10",
        CIFAR,
        f"<data folder>/cifar10/<split>.tar, .zip or a folder, else {_CIFAR_HUB} on the hub",
        _load_cifar,
        notes="what is on a picture of 32 x 32 pixels? report: the official test split",
        hub=(_CIFAR_HUB,),
    ),
    task_of(
        "mnist",
        NUMBERS,
        f"<data folder>/mnist, its IDX files, else {_MNIST_HUB} on the hub",
        _load_mnist,
        notes="handwritten digits of 28 x 28 pixels; report: t10k where there is a train split",
        hub=(_MNIST_HUB,),
    ),
    task_of(
        "digits",
        NUMBERS,
        "scikit-learn's 1,797 digits, no data folder needed",
        _load_digits,
        notes="handwritten digits of 8 x 8 pixels; report: a fifth, the same for every seed",
    ),
)
