"""How much of the mapped files is in memory: no more than a little, whoever reads them."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 256 << 20  # bytes of mapped files that may be in memory
EVERY = 0.01  # seconds between two looks
_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")


@contextmanager
def few_pages(limit: int = LIMIT) -> Iterator[None]:
    """While the block runs, pages of safetensors files and of ``io.files.spooled`` leave memory once they are many.

    They stay in the files: who reads them again has them again, with the same bits. A mapping that was written to and
    is not shared is left alone. Elsewhere than on Linux nothing is done: the system takes them when it needs room.
    """
    if not Path("/proc/self/smaps").exists():
        yield
        return
    over, start = threading.Event(), _in_files()

    def watch() -> None:
        while not over.wait(EVERY):
            if _in_files() - start > limit:
                let_go(enough=lambda: _in_files() - start < limit // 2)

    thread = threading.Thread(target=watch, name="ffnkit-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def let_go(enough: Callable[[], bool] = lambda: False) -> None:
    """Have the pages of mapped weights leave memory: first of those that are shared with their files.

    Of the others it takes time to tell whether they were written to; they stay where ``enough`` says so.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise

    def leave(begin: int, end: int) -> None:
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)

    for begin, end in _shared():
        leave(begin, end)
    if enough():
        return
    for begin, end, written in _mapped():
        if not written:
            leave(begin, end)


def is_mapped(address: int) -> bool:
    """Whether an address lies in a file that is mapped, so that its content takes no memory of its own."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        rows = [found for line in file if (found := _MAPPING.match(line)) and found[4] != "0"]
    return any(int(row[1], 16) <= address < int(row[2], 16) for row in rows)


def _shared() -> list[tuple[int, int]]:
    """Begin and end of each mapping of weights that writes into its file."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        rows = [found for line in file if (found := _MAPPING.match(line)) and found[3].endswith("s")]
    return [(int(row[1], 16), int(row[2], 16)) for row in rows if _is_of_weights(row[5])]


def _is_of_weights(path: str) -> bool:
    name = path.removesuffix(" (deleted)")
    return name.endswith(".safetensors") or os.path.basename(name).startswith("ffnkit-")


def _mapped() -> list[tuple[int, int, bool]]:
    """Begin and end of each other mapping of weights, and whether pages of it were changed here alone."""
    found: list[tuple[int, int, bool]] = []
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if row := _MAPPING.match(line):
                inside = _is_of_weights(row[5]) and not row[3].endswith("s")
                if inside:
                    found.append((int(row[1], 16), int(row[2], 16), False))
            elif inside and line.startswith("Anonymous:") and line.split()[1] != "0":
                found[-1] = (*found[-1][:2], True)
    return found


def _in_files() -> int:
    """Bytes of mapped files in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGESIZE")
