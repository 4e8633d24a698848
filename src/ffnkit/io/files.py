"""Files that are either whole or not there, one-line errors of writing, and large tensors in files without a name."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnkit.errors import FfnkitError, WritingError
from ffnkit.io.workspace import NEW, made, workspace

if TYPE_CHECKING:
    from torch import Tensor, dtype

# of writers in other languages; torch's tells of no reason
_FULL = ("No space left", "PytorchStreamWriter failed writing", "basic_ios::clear: iostream error")
_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TOLD = re.compile(r"\(os error (\d+)\)")  # how writers in Rust end their texts
_WRITING = (errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO, errno.EROFS)  # what these tell of writing, beside space


@contextmanager
def space_errors(target: str | Path) -> Iterator[None]:
    """Turn a full disk into one line about ``target``."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            do = "Free some space and run the same again; what was there before is unchanged"
            raise WritingError(f"writing '{target}'", "no space left on the disk", do) from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: it, or one during whose handling it arose."""
    while error is not None:
        if _number(error) in _SPACE or any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_errors(target: str | Path) -> Iterator[None]:
    """Turn an error of writing (no space, no permission, a folder that went away) into one line about ``target``."""
    with space_errors(target):
        try:
            yield
        except FfnkitError:
            raise
        except Exception as error:
            number, asked = _number(error), f"writing '{target}'"
            system = error if isinstance(error, OSError) and error.errno is not None else OSError(number, "")
            if number in _SPACE or (system is not error and number not in _WRITING):
                raise
            told = (
                f"{system.strerror}: {system.filename}" if system.filename else system.strerror or os.strerror(number)
            )
            if number == errno.ENOENT:
                raise WritingError(asked, f"a part of it went away meanwhile ({told})", "Run the same again") from error
            raise WritingError(asked, told, "Name a place that can be written") from error


def _number(error: BaseException) -> int:
    """The system's number of an error, as it has it or as its text tells it; 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = _TOLD.search(str(error))
    return int(told[1]) if told else 0


def resolved(path: str | Path) -> Path:
    """Where a path leads: a symlink stays one, and what it names is written. Raises FfnkitError where none can lead."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise FfnkitError(f"writing {str(path)!r}", str(error), "Name a path that can be") from error


def check_file(path: str | Path) -> Path:
    """Whether a file can be written there: the checks that are made before expensive work.

    Raises:
        FfnkitError: no regular file is there, or its folder cannot be written.
    """
    real = resolved(path)
    if os.path.lexists(real) and not real.is_file():
        raise FfnkitError(f"writing '{path}'", "it is no regular file", "Name a file")
    around = real.parent
    while not os.path.lexists(around):
        around = around.parent
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
        raise FfnkitError(f"writing '{path}'", f"'{around}' is no folder that can be written", "Name another place")
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write a file to, which takes the place of ``path`` when the block ends well.

    Readers see the old or the new content, never a part. A symlink stays one, the mode of an old file stays.

    Raises:
        FfnkitError: it cannot be written, or no regular file is there.
    """
    real = resolved(check_file(path))
    with disk_errors(path), made(real.parent), workspace(real.parent) as place:
        new = place / NEW
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.chmod(stat.S_IMODE(real.stat().st_mode) if real.exists() else 0o666 & ~umask())
        os.replace(new, real)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none or it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def umask() -> int:
    """The bits that new files do not get."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


SPOOL_FROM = 1 << 20  # bytes; smaller tensors stay in memory
SHARD = "2GB"  # of the files of a checkpoint that is written without being whole in memory
_folder: list[tuple[Path, Callable[[], None]]] = []  # where large new tensors go meanwhile; empty: they stay in memory


@contextmanager
def in_files(folder: Path, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While the block runs, what :func:`held` gives back lies in files of ``folder``, which have no names.

    So do large intermediate results (``ops.room``). ``before`` is called before each file is made.
    """
    from ffnkit.ops import room

    def make(shape: Sequence[int], dtype: dtype) -> Tensor:
        import torch

        large = math.prod(shape) * dtype.itemsize >= SPOOL_FROM
        return spool(shape, dtype) if large else torch.empty(shape, dtype=dtype)

    _folder.append((folder, before))
    try:
        with room.elsewhere(make, before):
            yield
    finally:
        _folder.pop()


def are_in_files() -> bool:
    """Whether new tensors go into files (:func:`in_files`)."""
    return bool(_folder)


def held(tensor: Tensor) -> Tensor:
    """A new tensor of a model: as it is, or in a file inside of :func:`in_files`."""
    return spooled(tensor) if _folder and tensor.device.type == "cpu" else tensor


def spooled(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; a large one memory-mapped from a temporary file, in memory only while it is read."""
    own = tensor.detach().cpu().contiguous()
    if own.numel() * own.element_size() < SPOOL_FROM:
        return own.clone() if own.data_ptr() == tensor.data_ptr() else own
    with _nameless() as file:
        write_bytes(own, file)
        return mapped(file.name, own.shape, own.dtype)


def spool(shape: Sequence[int], dtype: dtype) -> Tensor:
    """A tensor of zeros in a temporary file, which takes room on the disk as it is written to.

    The file has no name any more once it is mapped: it goes with the last tensor that uses it, however we end.
    """
    with _nameless() as file:
        size = math.prod(shape) * dtype.itemsize
        file.truncate(size)
        if _folder and size and hasattr(os, "posix_fallocate"):  # else a full disk would kill us while it is written to
            os.posix_fallocate(file.fileno(), 0, size)
        return mapped(file.name, shape, dtype)


@contextmanager
def _nameless() -> Iterator[Any]:
    """A file to fill and to map, whose name goes when the block ends."""
    folder, before = _folder[-1] if _folder else (Path(tempfile.gettempdir()), lambda: None)
    before()
    with tempfile.NamedTemporaryFile(prefix="ffnkit-", dir=folder) as file, disk_errors(folder):
        yield file


def write_bytes(tensor: Tensor, file: Any) -> None:
    """The bytes of a tensor on the CPU, as :func:`mapped` reads them."""
    import torch

    if tensor.numel():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    file.flush()


def mapped(name: str | Path, shape: Sequence[int], dtype: dtype) -> Tensor:
    """The tensor whose bytes a file holds, in memory only while it is read; what is written to it is in the file."""
    import torch

    if not math.prod(shape):
        return torch.empty(tuple(shape), dtype=dtype)
    storage = torch.UntypedStorage.from_file(str(name), shared=True, nbytes=math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))  # type: ignore[arg-type]
