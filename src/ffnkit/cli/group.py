"""What the command line does with errors and with global options, in one place."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup

from ffnkit.cli import console
from ffnkit.errors import FfnkitError, RenamedWarning, short
from ffnkit.io.files import is_full
from ffnkit.settings.words import in_words

GLOBAL_FLAGS = ("--debug", "--quiet", "--verbose")
OLD_OPTIONS = {"--sites": "--targets"}  # work still, with one line
BARE = {"--ray": "auto"}  # options that may stand without their value, and what it is then
NO_SPACE = "writing the output: no space left on the disk. Free some space or choose another --out"
_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
BAD_INPUT, INTERNAL, INTERRUPTED = 2, 1, 130
ENDING = ("SIGTERM", "SIGHUP")  # of schedulers, containers and terminals that close


class Group(TyperGroup):
    """A command group that takes global flags in any place and turns every exception into one line and an exit code.

    Exit codes: 0 done, 2 bad input or an output that cannot be written, 130 interrupted, 143 ended by SIGTERM (129 by
    SIGHUP), 1 an error of ffnkit itself.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; ``args`` without the program's name, ``sys.argv[1:]`` by default."""
        words = hoist(list(sys.argv[1:] if args is None else args))
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        debug = words[: len(GLOBAL_FLAGS)].count("--debug") > 0
        with warnings.catch_warnings(), ending() as came:
            console.show_warnings()
            try:
                code = super().main(
                    filled(renamed(words)), prog_name, complete_var, False, windows_expand_args, **extra
                )
                if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
                    raise KeyboardInterrupt
            except BaseException as error:
                code = report(error, debug, came)
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def ending() -> Iterator[list[int]]:
    """In the block the signals of ``ENDING`` end us as Ctrl-C does: processes of ours are stopped, what is half written
    goes. Gives those that came; the second one ends us at once. One that is ignored (nohup) or handled stays so."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def end(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hoist(words: list[str]) -> list[str]:
    """``words`` with the global flags moved to the front, so that they work after the command too."""
    end = words.index("--") if "--" in words else len(words)
    flags = [word for word in GLOBAL_FLAGS if word in words[:end]]
    return flags + [word for i, word in enumerate(words) if i >= end or word not in GLOBAL_FLAGS]


def renamed(words: list[str]) -> list[str]:
    """``words`` with the options of today in the place of old ones, each of which is told."""
    end = words.index("--") if "--" in words else len(words)  # what follows is another program's
    words, rest = words[:end], words[end:]
    for old, new in OLD_OPTIONS.items():
        if any(word.partition("=")[0] == old for word in words):
            warnings.warn(f"option {old} is called {new} now; the old name will go", RenamedWarning, stacklevel=2)
            words = [word.replace(old, new, 1) if word.partition("=")[0] == old else word for word in words]
    return words + rest


def filled(words: list[str]) -> list[str]:
    """``words`` with the value of an option that stands without it."""
    end = words.index("--") if "--" in words else len(words)  # what follows is another program's
    words, rest = words[:end], words[end:]
    following = [*words, "--"][1:]
    bare = [after.startswith("-") or after.endswith((".yaml", ".yml")) for after in following]
    return [f"{w}={BARE[w]}" if w in BARE and alone else w for w, alone in zip(words, bare, strict=False)] + rest


def report(error: BaseException, debug: bool, came: Sequence[int] = ()) -> int:
    """Print the one line for ``error`` on stderr and return the exit code.

    The traceback stands before it with ``debug``, and where the fault is our own.

    Args:
        came: signals that ended us.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else INTERNAL
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone; nothing more can be written, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL
    interrupted = isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort"
    line = None if interrupted else expected(error)
    if debug or (line is None and not interrupted):
        import traceback

        console.write_error("".join(traceback.format_exception(error)).rstrip())
    if interrupted:
        how = f"ended by {signal.Signals(came[0]).name}" if came else "interrupted"
        console.error(f"{how}. Run the same command again: it goes on where it can")
        return 128 + came[0] if came else INTERRUPTED
    if line is not None:
        console.error(line)
        return BAD_INPUT
    told = short(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(".")
    console.error(f"{told}. This is a fault of ffnkit: please report it, with the lines above and the command")
    return INTERNAL


def expected(error: BaseException) -> str | None:
    """The line for an error that the user can do something about; None for any other."""
    if isinstance(error, FfnkitError):
        return str(error)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the parser's own usage errors
        return usage_line(error)
    if is_full(error):
        return NO_SPACE
    if isinstance(error, OSError) and error.errno in _PATHS:
        named = short(str(error.filename or "a file"))
        return f"open {named}: {error.strerror}. Check the permissions or choose another path"
    return None


def usage_line(error: Any) -> str:
    """One line for a usage error, naming the command whose help explains more."""
    start, colon, rest = " ".join(error.format_message().split()).partition(": ")
    message = short(f"{start}{colon}{in_words(rest)}").rstrip(".").replace("?.", "?")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ffnkit"
    return f"{message}. See '{path} --help'"
