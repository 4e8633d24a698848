"""The one exception of ffnkit, its kind that is no fault of what was asked for, and its warnings."""

from __future__ import annotations

_SHOWN = 600  # of each part of a line, which may repeat what a file or the user said


def short(text: str) -> str:
    """``text``, its middle left out where it is long."""
    return text if len(text) <= _SHOWN else f"{text[: 2 * _SHOWN // 3]} ... {text[-_SHOWN // 4 :]}"


class FfnkitError(ValueError):
    """Bad input or an operation that cannot be done, said in one line of three parts.

    Args:
        asked: what was asked for, naming the value as the user wrote it.
        found: what was found instead.
        do: what the user can do about it.
    """

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(" ".join(f"{short(asked)}: {short(found)}. {short(do)}".split()))

    def __reduce__(self) -> tuple[type[FfnkitError], tuple[str, str, str]]:
        """Between processes it stays what it is."""
        return type(self), (self.asked, self.found, self.do)

    def within(self, context: str) -> FfnkitError:
        """The same error with ``context`` (model, method, shape) put before it."""
        return type(self)(f"{context}: {self.asked}", self.found, self.do)


class WritingError(FfnkitError):
    """A place cannot be written (no space, no permission): that says nothing of what was asked for, so that whoever
    notes what cannot be done and goes on with something else stops here."""


class FfnkitWarning(UserWarning):
    """Something that the user should know and that stops nothing, in one line."""


class RenamedWarning(FfnkitWarning, FutureWarning):
    """A setting was given under the name that it had before."""
