"""How much of the mapped files is in memory: no more than a little, whoever reads them."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 160 << 20  # bytes of mapped files that may be in memory
EVERY = 0.01  # seconds between two looks
_DONTNEED = 4
_ANY = re.compile(rb"^(\w+)-(\w+) \S+ \S+ \S+ [1-9]", re.MULTILINE)
_WEIGHTS = rb"^(\w+)-(\w+) (\S+) [^\n]*(?:\.safetensors|/ffnkit-[^/\n]*?)(?: \(deleted\))?$"
_MAPPED = re.compile(_WEIGHTS, re.MULTILINE)
_DETAILED = re.compile(_WEIGHTS + rb"(?:\n[A-Z][^\n]*)*?\nAnonymous: +(\d+)", re.MULTILINE)


@contextmanager
def few_pages(limit: int = LIMIT) -> Iterator[Callable[[], None]]:
    """While the block runs, pages of safetensors files and of ``io.files.spooled`` leave memory once they are many.

    A thread looks for them; it gives a function that looks at once, for whoever is about to fill many.

    They stay in the files: who reads them again has them again, with the same bits. A mapping that was written to and
    is not shared is left alone. Elsewhere than on Linux nothing is done: the system takes them when it needs room.
    """
    if not Path("/proc/self/smaps").exists():
        yield lambda: None
        return
    over, start = threading.Event(), _in_files()

    def look() -> None:
        if _in_files() - start > limit:
            let_go(enough=lambda: _in_files() - start < limit // 2)

    def watch() -> None:
        while not over.wait(EVERY):
            look()

    thread = threading.Thread(target=watch, name="ffnkit-pages", daemon=True)
    thread.start()
    try:
        yield look
    finally:
        over.set()
        thread.join()


def let_go(enough: Callable[[], bool] = lambda: False) -> None:
    """Have the pages of mapped weights leave memory: first of those that are shared with their files.

    Of the others it takes time to tell whether they were written to; they stay where ``enough`` says so.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise

    def leave(begin: bytes, end: bytes) -> None:
        first = int(begin, 16)
        advise(ctypes.c_void_p(first), ctypes.c_size_t(int(end, 16) - first), _DONTNEED)

    for begin, end, rights in _MAPPED.findall(_read("maps")):
        if rights.endswith(b"s"):
            leave(begin, end)
    if not enough():
        for begin, end, rights, written in _DETAILED.findall(_read("smaps")):
            if rights.endswith(b"p") and written == b"0":
                leave(begin, end)


def is_mapped(address: int) -> bool:
    """Whether an address lies in a file that is mapped, so that its content takes no memory of its own."""
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in _ANY.findall(_read("maps")))


def _read(name: str) -> bytes:
    return Path(f"/proc/self/{name}").read_bytes()


def _in_files() -> int:
    """Bytes of mapped files in memory."""
    return int(_read("statm").split()[2]) * os.sysconf("SC_PAGESIZE")
