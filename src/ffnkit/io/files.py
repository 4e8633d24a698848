"""Outputs that are either whole or not there: built beside their target, put in place in one step."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.errors import FfnkitError

if TYPE_CHECKING:
    from torch import Tensor, dtype

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def check_target(target: str | Path) -> Path:
    """The output folder as a path, after the checks that can be made before expensive work.

    Raises FfnkitError where it is a file, or where no folder can be made there.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise FfnkitError(f"output folder '{target}'", "it is a file", "Name another folder or remove the file")
    ancestor = target.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise FfnkitError(f"output folder '{target}'", f"'{ancestor}' is a file", "Name a folder below a folder")
    if not os.access(ancestor, os.W_OK):
        raise FfnkitError(f"output folder '{target}'", f"'{ancestor}' is not writable", "Name a folder that is")
    return target


@contextmanager
def disk_errors(target: str | Path) -> Iterator[None]:
    """Turn an operating-system error of writing (no space, no permission) into one line about ``target``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            do = "Free some space and run the same again; what was there before is unchanged"
            raise FfnkitError(f"writing '{target}'", "no space left on the disk", do) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise FfnkitError(f"writing '{target}'", str(error), "Name a folder that can be written") from error
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's words in it
        if type(error).__name__ == "SafetensorError" and ("No space left" in str(error) or "os error 28" in str(error)):
            do = "Free some space and run the same again; what was there before is unchanged"
            raise FfnkitError(f"writing '{target}'", "no space left on the disk", do) from error
        raise


@contextmanager
def staging(target: str | Path, *, keep_others: bool = False) -> Iterator[Path]:
    """A new folder beside ``target`` to build an output in; it takes the target's place when the block ends well.

    On an error the new folder goes and the target stays as it was. After a kill the target is the old or the new
    output, and the leftover is swept by the next ``staging`` of the same target.

    Args:
        target: the output folder; may exist.
        keep_others: carry over what the target holds besides weights and what the new output brings itself,
            as ``save_pretrained`` into an existing folder does.
    """
    target = check_target(target)
    with disk_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        _sweep(target)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.absolute().parent))
    try:
        with disk_errors(target):
            yield temporary
            if keep_others and target.is_dir():
                _carry_over(target, temporary)
            _umask_mode(temporary)
            replace_dir(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_dir(temporary: str | Path, target: str | Path) -> None:
    """Put the folder ``temporary`` in the place of ``target`` in one step; a former target is removed afterwards.

    Linux exchanges the two names atomically. Elsewhere the old folder is renamed aside first, and ``recover`` brings
    it back where a kill fell between the two renames.
    """
    temporary, target = Path(temporary), Path(target)
    _sync(temporary)
    if not target.exists():
        os.rename(temporary, target)
    elif _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        aside = _aside(target)
        os.rename(target, aside)
        os.rename(temporary, target)
        shutil.rmtree(aside, ignore_errors=True)


def recover(target: str | Path) -> None:
    """Bring back the old folder where a replacement without atomic exchange was killed half way."""
    target, aside = Path(target), _aside(Path(target))
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a part."""
    path = Path(path)
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.absolute().parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _umask_mode(Path(temporary), file=True)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _prefix(target: Path) -> str:
    return f".{target.absolute().name}.tmp-{os.getpid()}-"


def _aside(target: Path) -> Path:
    target = target.absolute()
    return target.with_name(f".{target.name}.old")


def _sweep(target: Path) -> None:
    """Remove the unfinished outputs of processes that are gone."""
    target = target.absolute()
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        owner = leftover.name.removeprefix(f".{target.name}.tmp-").split("-")[0]
        if owner.isdigit() and int(owner) != os.getpid() and not _alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _carry_over(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        if (new / entry.name).exists() or entry.name.endswith(_WEIGHTS):
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, copy_function=_link, symlinks=True)
        else:
            _link(str(entry), str(new / entry.name))


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _umask_mode(path: Path, file: bool = False) -> None:
    """tempfile makes private entries; an output gets the modes that any new file of the user has."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o666 if file else 0o777) & ~mask)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


SPOOL_FROM = 1 << 20  # bytes; smaller tensors stay in memory


def spooled(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; a large one memory-mapped from a temporary file, in memory only while it is read."""
    import torch

    own = tensor.detach().cpu().contiguous()
    if own.numel() * own.element_size() < SPOOL_FROM:
        return own.clone() if own.data_ptr() == tensor.data_ptr() else own
    with tempfile.NamedTemporaryFile(prefix="ffnkit-") as file, disk_errors(tempfile.gettempdir()):
        file.write(own.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        return _mapped(file.name, own.shape, own.dtype)


def spool(shape: Sequence[int], dtype: dtype) -> Tensor:
    """A tensor of zeros in a temporary file, which takes room on the disk as it is written to.

    The file has no name any more once it is mapped: it goes with the last tensor that uses it, however we end.
    """
    with tempfile.NamedTemporaryFile(prefix="ffnkit-") as file, disk_errors(tempfile.gettempdir()):
        file.truncate(math.prod(shape) * dtype.itemsize)
        return _mapped(file.name, shape, dtype)


def _mapped(name: str, shape: Sequence[int], dtype: dtype) -> Tensor:
    import torch

    storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))  # type: ignore[arg-type]
