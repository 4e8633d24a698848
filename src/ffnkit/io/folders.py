"""Folders as outputs: built whole beside their place and put there in one step, without what others keep there.

What an output of the same kind wrote before goes, as the folder's manifest says; everything else stays. A folder that
cannot be exchanged for another one (something is mounted there, it is the working folder, a layer below an overlay) is
filled where it is, the file that makes it open last, unless it holds such an output already.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffnkit.errors import FfnkitError
from ffnkit.io import manifest
from ffnkit.io.files import disk_errors, resolved, umask
from ffnkit.io.workspace import NEW, OLD, PREFIX, made, workspace

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OPENS = {  # the file without which an output does not open
    "model": ("config.json", "base/config.json"),
    "adapter": ("adapter.safetensors",),
    "lora": ("adapter_config.json",),
}


def check_target(target: str | Path, kind: str = "model") -> Path:
    """Whether an output can be put into a folder: the checks that are made before expensive work.

    Args:
        kind: "model", "adapter", "lora", or another name of what is written; each replaces what it wrote before.

    Raises:
        FfnkitError: it is a file, no folder can be made there, or what it holds can neither be replaced nor stay.
    """
    target, asked = Path(target), f"output folder '{target}'"
    real = resolved(target)
    with disk_errors(target):
        if _is_there(real):
            if not real.is_dir():
                raise FfnkitError(asked, "it is a file", "Name another folder or remove the file")
            manifest.check_unmixed(real, kind)
            if why := _bound(real):
                _check_filled(real, kind, asked, why)
            return target
        around = real.parent
        while not os.path.lexists(around):
            around = around.parent
        if not around.is_dir():
            raise FfnkitError(asked, f"'{around}' is a file", "Name a folder below a folder")
        _check_writable(around, asked)
    return target


@contextmanager
def staging(target: str | Path, kind: str = "model") -> Iterator[Path]:
    """A new folder to build an output in; its content takes its place in ``target`` when the block ends well.

    On an error the new folder goes and the target stays as it was. After a kill the target holds the old or the new
    output, and the leftover is swept by the next output into a folder beside it.

    Args:
        target: the output folder; may exist, may be a symlink to one.
        kind: as for :func:`check_target`.
    """
    target = check_target(target, kind)
    real = resolved(target)
    inside = real.is_dir() and bool(_bound(real))
    where = real if inside else real.parent
    with disk_errors(as_named(target)), made(where), workspace(where, "" if inside else real.name) as place:
        new = place / NEW
        new.mkdir()
        _targets[new] = target
        try:
            yield new
        finally:
            del _targets[new]
        _finish(new, real, kind)
        (_fill if inside else _replace)(new, real, kind)


_targets: dict[Path, Path] = {}  # where what is being built will be


def as_named(folder: str | Path) -> str:
    """A folder as its user named it, where what is built in it takes another one's place later."""
    path = Path(folder)
    new = next((each for each in (path, *path.parents) if each in _targets), None)
    return str(folder) if new is None else as_named(_targets[new] / path.relative_to(new))


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# --- whether it can be exchanged ------------------------------------------------------------------------------------


def _bound(real: Path) -> str:
    """Why a folder that is there cannot give its place to another one in one step; "" where it can."""
    here, owner = Path.cwd(), real.stat()
    if here.is_relative_to(real):
        return "it is the working folder, or above it"
    if any(mounted.is_relative_to(real) for mounted in _mounts()) or os.path.ismount(real):
        return "a file system is mounted there"
    if not _is_ours(owner):
        return "it belongs to another user or group"
    if not os.access(real.parent, os.W_OK | os.X_OK):
        return f"'{real.parent}' is not writable"
    for folder, names, others in os.walk(real):
        inner = [Path(folder) / name for name in (*names, *others)]
        foreign = [path for path in inner if not path.is_symlink() and not _is_readable(path)]
        if foreign:
            return f"'{foreign[0]}' in it belongs to another user or group"
    with workspace(real.parent) as place:
        (place / NEW / "full").mkdir(parents=True)
        try:  # onto a folder that is not empty: the last thing that is wrong with this, if the rest is right
            os.rename(real, place / NEW)
        except OSError as error:
            return "" if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else str(error.strerror)
        os.rename(place / NEW, real)
    return "its file system does not say what can be done"


def _is_ours(status: os.stat_result) -> bool:
    """Whether we can make another folder of the same owner and group."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return True
    return status.st_uid == os.geteuid() and status.st_gid in (os.getegid(), *os.getgroups())


def _is_readable(path: Path) -> bool:
    """Whether we can make another one of it."""
    if not path.is_dir():
        return os.access(path, os.R_OK)
    return _is_ours(path.stat()) and os.access(path, os.R_OK | os.X_OK)


def _mounts() -> list[Path]:
    """Where file systems are mounted, also parts of the same one, which the numbers of devices do not show."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    found = [re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split(b" ")[4]) for line in lines]
    return [Path(os.fsdecode(path)) for path in found]


def _check_filled(real: Path, kind: str, asked: str, why: str) -> None:
    """Raises FfnkitError where a folder that stays in its place cannot be filled, or holds such an output already."""
    _check_writable(real, asked)
    if any(os.path.lexists(real / name) for name in _OPENS.get(kind, ())):
        what = f"what it holds cannot be replaced in one step ({why})"
        raise FfnkitError(asked, what, "Name a folder below it, or move away what it holds")


def _check_writable(folder: Path, asked: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FfnkitError(asked, f"'{folder}' is not writable", "Name a folder that is")


# --- how it comes into its place ------------------------------------------------------------------------------------


def _finish(new: Path, real: Path, kind: str) -> None:
    """The new output as it is to lie there: without what the user has of his own, with modes, on the disk."""
    own = manifest.ours(real, kind)
    if "README.md" not in own and os.path.lexists(real / "README.md"):
        (new / "README.md").unlink(missing_ok=True)
    manifest.write(new, real, kind)
    for path in [*new.rglob("*"), new]:
        if path.is_symlink():
            continue
        name = path.relative_to(new)
        _dress(path, real / name if path.is_dir() or name.as_posix() in own else None)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _dress(path: Path, old: Path | None) -> None:
    """Mode and owner: those of the old one in its place, else what any new file of the user gets."""
    before = old.stat() if old is not None and old.exists() and old.is_dir() == path.is_dir() else None
    if old is not None and before is not None and path.is_dir():
        shutil.copystat(old, path)  # its access lists as well
        os.utime(path)
    if before is not None and (before.st_uid, before.st_gid) != (path.stat().st_uid, path.stat().st_gid):
        with contextlib.suppress(PermissionError):  # files of others in a folder of ours
            os.chown(path, before.st_uid, before.st_gid)
    fresh = (0o777 if path.is_dir() else 0o666) & ~umask() | path.stat().st_mode & stat.S_ISGID
    path.chmod(stat.S_IMODE(before.st_mode) if before is not None else fresh)


def _kept(old: Path, new: Path, kind: str) -> list[Path]:
    """What ``old`` holds, relative to it, that is not ours and that ``new`` does not bring itself."""
    own = manifest.ours(old, kind)

    def others(folder: Path) -> Iterator[Path]:
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(old)
            inner = f"{name.as_posix()}/"
            if entry.name.startswith(PREFIX) or name.as_posix() in own or manifest.is_replaced(str(name), kind):
                continue
            shared = (new / name).is_dir() or any(one.startswith(inner) for one in own)
            if shared and entry.is_dir() and not entry.is_symlink():
                yield from others(entry)
            elif not os.path.lexists(new / name):
                yield name

    return list(others(old))


def _carry_over(old: Path, new: Path, names: list[Path]) -> None:
    for name in names:
        for folder in reversed(name.parents[:-1]):
            if not (new / folder).is_dir():
                (new / folder).mkdir()
                _dress(new / folder, old / folder)
        if (old / name).is_dir() and not (old / name).is_symlink():
            shutil.copytree(old / name, new / name, copy_function=_link, symlinks=True)
            for made, _, _ in os.walk(new / name):
                _dress(Path(made), old / Path(made).relative_to(new))
        else:
            _link(str(old / name), str(new / name))


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _replace(new: Path, real: Path, kind: str) -> None:
    """Put the folder ``new`` in the place of ``real`` in one step, with what is there of others.

    Linux exchanges the two names atomically. Elsewhere, and on NFS, the old folder is put aside first; where a kill
    falls between the two renames, the next output into a folder beside it brings it back.
    """
    if not os.path.lexists(real):
        os.rename(new, real)
        return
    _carry_over(real, new, _kept(real, new, kind))
    old = new
    if not _exchange(new, real):
        old = new.with_name(OLD)
        os.rename(real, old)
        try:
            os.rename(new, real)
        except BaseException:
            os.rename(old, real)
            raise
    for name in _kept(old, real, kind):  # came in the meantime
        os.rename(old / name, real / name)


def _fill(new: Path, real: Path, kind: str) -> None:
    """Put what ``new`` holds into a folder that stays: the manifest first, what makes it open last."""
    last = _OPENS.get(kind, ())
    names = {path.relative_to(new) for path in new.rglob("*") if path.is_symlink() or not path.is_dir()}
    for gone in manifest.ours(real, kind) - {name.as_posix() for name in names}:
        (real / gone).unlink(missing_ok=True)
    for name in sorted(names, key=lambda each: (each.as_posix() in last, str(each) != manifest.FILE, each)):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, real / name)


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
