"""Places where outputs are built, held by a lock of the file system, and the removal of what killed processes left.

A workspace is a hidden folder beside its target. As long as its process lives, it holds an flock on a file in it. The
system lets go of that lock however the process ends, and other containers and hosts see it as well, which a process
number does not give. On NFS it holds between hosts from version 4 on, or with a lock daemon; mounted with ``nolock`` or
``local_lock`` it holds on each host alone. Where a file system knows no locks, nothing is ever swept.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ffnkit.errors import FfnkitError

PREFIX = ".ffnkit-tmp-"
LOCK, NEW, OLD = "lock", "new", "old"
POLL = 0.2  # seconds between two tries at what another process holds


@contextmanager
def workspace(folder: Path, name: str = "") -> Iterator[Path]:
    """A private folder in ``folder`` for the time of the block; what the killed left there is swept first.

    Args:
        name: of the target in ``folder`` that its ``OLD`` stands for, should we be killed while that is put aside.
    """
    sweep(folder)
    place, lock = _made(folder)
    try:
        if lock is not None:
            os.write(lock, os.fsencode(name))
        yield place
    finally:
        remove(place)
        if lock is not None:
            os.close(lock)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder that is there in the block; where the block fails, it and those above it that were made for it go."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # it holds something by now
                each.rmdir()
        raise


def sweep(folder: Path) -> None:
    """Remove the workspaces in ``folder`` whose processes are gone; a target that one of them put aside comes back."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:
        return
    for place in (folder / name for name in names):
        if place.is_symlink() or not place.is_dir() or (lock := _lock(place / LOCK)) is None:
            continue
        try:
            name = os.fsdecode(os.read(lock, 4096))
            if name and (place / OLD).exists() and not os.path.lexists(folder / name):
                os.rename(place / OLD, folder / name)
            remove(place)
        except OSError:
            continue
        finally:
            os.close(lock)


def put_aside(target: Path) -> Path | None:
    """Where the content of a target is that a killed process put aside; None where there is none."""
    around = target.absolute().parent
    try:
        names = [name for name in os.listdir(around) if name.startswith(PREFIX)]
    except OSError:
        return None
    for place in (around / name for name in names):
        try:
            if (place / OLD).exists() and (place / LOCK).read_bytes() == os.fsencode(target.name):
                return place / OLD
        except OSError:
            continue
    return None


@contextmanager
def held(folder: str | Path, asked: str, found: str = "another run is at work there") -> Iterator[None]:
    """Hold a folder, which is there, for the time of the block: no other process of any host may.

    Raises:
        FfnkitError: another one does.
    """
    lock = _lock(Path(folder) / ".lock", refused=FfnkitError(asked, found, "Wait for it, or give another --out"))
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def claimed(folder: Path, asked: str, found: str, *, wait: float = 0.0) -> Iterator[None]:
    """Make a folder and hold it for the time of the block; whoever held it before may remove it in the same moment.

    Args:
        wait: seconds until it is given up where another process holds it.

    Raises:
        FfnkitError: another one does.
        FileExistsError: a file stands there.
    """
    until = time.monotonic() + wait
    with ExitStack() as stack:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(folder, asked, found))
                break
            except (FileNotFoundError, FileExistsError):  # the other one has just removed it
                if folder.is_file():
                    raise
            except FfnkitError:
                if time.monotonic() >= until:
                    raise
                time.sleep(POLL)
        yield


def remove(place: Path) -> None:
    """Remove a folder, also where folders in it may not be written."""
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():
        for inner, _, _ in os.walk(place):
            os.chmod(inner, 0o700)
        shutil.rmtree(place, ignore_errors=True)


def _made(folder: Path) -> tuple[Path, int | None]:
    """A new workspace and its lock, None where there are no locks."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            return place, _lock(place / LOCK, refused=BlockingIOError())
        except (BlockingIOError, FileNotFoundError):  # swept before we held it
            continue


def _lock(path: Path, refused: Exception | None = None) -> int | None:
    """A descriptor that holds ``path`` until it is closed; None where it cannot be had, or no locks are.

    Args:
        refused: raised where another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        if refused is not None:
            raise
        return None
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(lock).st_ino:
            return lock
        taken = True
    except OSError as error:
        taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT)
    os.close(lock)
    if taken and refused is not None:
        raise refused
    return None
