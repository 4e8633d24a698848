"""Images in folders and in tar and zip archives: listed with their classes, read one at a time.

An image is referred to by a string ``source::place``: a file and where in it the image is. Only these strings are held
in memory; pixels are read when a batch is made.
"""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import os
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ffnkit.errors import FfnkitError
from ffnkit.io.progress import counted
from ffnkit.tasks.rows.splitting import Table

SEPARATOR = "::"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = (".tar", ".zip")
LARGEST = 1 << 28  # bytes of an image's file
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test"}
_END = 1 << 16  # bytes of either end of an image's file by which repeated images are known
_LAYOUT = "Give a folder, a .tar or a .zip with a folder of images for each class"


class Store(Protocol):
    """Where images are."""

    def read(self, place: str) -> Any:
        """The bytes of an image's file, or its pixels (height, width[, 3]), uint8."""


class Folder:
    """Files below a folder; a place is a relative path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, place: str) -> bytes:
        """The file; none that is a device or a pipe, which may never end."""
        path = self.path / place
        if os.path.exists(path) and not path.is_file():
            raise OSError(f"{place} is no regular file")
        _check_size(path.stat().st_size, place)
        return path.read_bytes()

    def places(self) -> Iterator[tuple[str, str]]:
        """(name, place) of every file; a folder that several links lead to is read once."""
        seen = set()
        for folder, folders, files in os.walk(self.path, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            inner = Path(folder).relative_to(self.path)
            for file in sorted(files):
                name = (inner / file).as_posix()
                yield name, name


class Tar:
    """Members of a tar that is not compressed; a place is "offset+size"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)

    def read(self, place: str) -> bytes:
        """The member."""
        offset, _, size = place.partition("+")
        _check_size(int(size), place)
        return os.pread(self._file, int(size), int(offset))

    def places(self) -> Iterator[tuple[str, str]]:
        """(name, place) of every file in it."""
        with tarfile.open(self.path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), f"{member.offset_data}+{member.size}"


class Zip:
    """Members of a zip; a place is a name."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)

    def read(self, place: str) -> bytes:
        """The member. Raises OSError where it cannot be unpacked, or would be too large."""
        _check_size(self._archive.getinfo(place).file_size, place)
        try:
            return self._archive.read(place)
        except (RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError, EOFError) as error:
            raise OSError(f"{place} cannot be unpacked ({error})") from error

    def places(self) -> Iterator[tuple[str, str]]:
        """(name, place) of every file in it."""
        return ((each.filename, each.filename) for each in self._archive.infolist() if not each.is_dir())


def _check_size(size: int, place: str) -> None:
    """Raises OSError for what is too large for an image."""
    if size > LARGEST:
        raise OSError(f"{place} has {size:,} bytes, more than the {LARGEST:,} of the largest image that is read")


STORES: dict[str, Callable[[str], Store]] = {}
"""Further kinds of stores, by what their sources begin with."""


@functools.lru_cache(maxsize=16)
def store(source: str) -> Any:
    """The store of a source; the last few stay open."""
    for prefix, opened in STORES.items():
        if source.startswith(prefix):
            return opened(source)
    path = Path(source)
    return Folder(path) if os.path.isdir(path) else {".tar": Tar, ".zip": Zip}[path.suffix.lower()](path)


def open_image(reference: str, mode: str) -> Any:
    """A PIL image in ``mode`` ("RGB", "L").

    Raises:
        FfnkitError: it is gone, or is no image.
    """
    import numpy as np
    from PIL import Image

    source, _, place = reference.rpartition(SEPARATOR)
    try:
        found = store(source).read(place)
        image = Image.fromarray(found) if isinstance(found, np.ndarray) else Image.open(io.BytesIO(found))
        return image.convert(mode)
    except (OSError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        reason = "it is no image" if "cannot identify" in reason else reason
        raise FfnkitError(
            f"image {place} of {source}", f"it cannot be read ({reason})", "Repair or remove it"
        ) from error


def digest(data: Any) -> str:
    """By which repeated images are known: of the length and both ends of a file, or of all pixels."""
    view = memoryview(data).cast("B")
    content = hashlib.blake2b(len(view).to_bytes(8, "little"), digest_size=16)
    content.update(view[:_END])
    content.update(view[max(_END, len(view) - _END) :])
    return content.hexdigest()


def listed(path: str | Path) -> tuple[Table, int]:
    """Columns "image" (references), "digest" and "label" (names of classes) of a folder or archive, in a fixed order.

    The class of an image is the name of the folder that it lies in, of the folders below those that all images share.
    Hidden files and files that are no images by their names are passed over; their number comes back.

    Raises:
        FfnkitError: no such file or folder, another format, no images, images outside of class folders.
    """
    path = Path(path).expanduser()
    asked = f"images {path}"
    if not os.path.exists(path):
        raise FfnkitError(asked, "there is no such file or folder", _LAYOUT)
    if not os.path.isdir(path) and not (os.path.isfile(path) and path.suffix.lower() in ARCHIVES):
        raise FfnkitError(asked, f"unknown kind of file {''.join(path.suffixes)!r}", _LAYOUT)
    store.cache_clear()  # what was read before may have been replaced
    try:
        held = store(str(path.resolve()))
        found = sorted(held.places())
        names = [name for name, _ in found if _is_image(name)]
        classes = _classes(names, path)
        places = [place for name, place in found if _is_image(name)]
        table: Table = {
            "image": [f"{path.resolve()}{SEPARATOR}{place}" for place in places],
            "digest": [digest(held.read(place)) for place in counted(places, "reading images")],
            "label": classes,
        }
    except FfnkitError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, ValueError, OverflowError) as error:
        do = "Unpack it, or pack it again as a .zip or as a .tar that is not compressed"
        raise FfnkitError(asked, f"it is no whole {path.suffix} that can be read at any place ({error})", do) from error
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.strerror else error
        raise FfnkitError(asked, f"it cannot be read ({reason})", "Check the files") from error
    return table, len(found) - len(names)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not hidden and not path.is_absolute() and path.suffix.lower() in SUFFIXES


def _classes(names: list[str], path: Path) -> list[str]:
    """The class of each image by its name, below the folders that all share."""
    asked = f"images {path}"
    if not names:
        raise FfnkitError(asked, f"there are no images ({', '.join(SUFFIXES)})", _LAYOUT)
    parts = [PurePosixPath(name).parts for name in names]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [each[1:] for each in parts]
    loose = next((name for name, each in zip(names, parts, strict=True) if len(each) < 2), None)
    if loose is not None:
        raise FfnkitError(asked, f"{loose} lies in no folder of a class", _LAYOUT)
    classes = [each[0] for each in parts]
    if len(set(classes)) > 1 and {each.lower() for each in classes} <= _SPLITS:
        found = f"its folders {', '.join(sorted(set(classes)))} are splits, not classes"
        raise FfnkitError(asked, found, "Name the one to train on, and the other as the validation file")
    return classes
