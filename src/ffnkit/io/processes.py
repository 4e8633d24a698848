"""Several processes that train one model (torchrun, accelerate launch): the first writes and tells, the others wait.

Light to import: launchers say in the environment which process this is.
"""

from __future__ import annotations

import os
from typing import Any


def count() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def number() -> int:
    """Which of them this is, from 0; 0 where it is alone."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and tells."""
    return number() == 0


def joined() -> bool:
    """Whether the processes can reach each other by now: training's settings see to it."""
    import torch

    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def wait() -> None:
    """Return when all processes have come here."""
    of_first(None)


def of_first(value: Any) -> Any:
    """The first process's value, in all of them; it waits for them, and they for it.

    Args:
        value: of any kind that pickles; those of the other processes are not looked at.
    """
    if not joined():
        return value
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def leave() -> None:
    """Part from the others: the work in common is over."""
    if joined():
        import torch

        torch.distributed.destroy_process_group()
