"""Where a named task's rows are: the given data folder, else the one of FFNKIT_DATA, else the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError

VARIABLE = "FFNKIT_DATA"


def data_folder(name: str, data_dir: Path | None, files: Sequence[str]) -> Path | None:
    """``<data_dir>/<name>``, or that of FFNKIT_DATA where it exists; None where the hub is to be asked.

    Args:
        files: the files that the task wants there, for the error message.

    Raises:
        FfnkitError: ``data_dir`` is given and has no such folder.
    """
    if data_dir is None:
        found = os.environ.get(VARIABLE)
        folder = Path(found).expanduser() / name if found else None
        return folder if folder is not None and os.path.isdir(folder) else None
    folder = data_dir.expanduser() / name
    if not os.path.isdir(folder):
        found = (
            f"there is no folder {name} in it" if os.path.isdir(data_dir.expanduser()) else "there is no such folder"
        )
        raise FfnkitError(f"data of task {name}: data folder {data_dir}", found, f"Give {_wanted(name, files)}")
    return folder


def from_hub(name: str, hub: Sequence[str], files: Sequence[str], **options: Any) -> Mapping[str, Any]:
    """The splits of a dataset on the hub, or of its copy in the cache, by name.

    Args:
        hub: name and configuration.
        files: the files of a data folder that would do instead, for the error message.
        options: for ``datasets.load_dataset``.

    Raises:
        FfnkitError: it is not in the cache and the hub cannot be reached.
    """
    from datasets import load_dataset

    from ffnkit.io.loading import hub_or_cache

    try:
        with hub_or_cache():
            loaded: Mapping[str, Any] = load_dataset(*hub, **options)
    except Exception as error:  # datasets, its file systems and its http client each raise their own
        tried = os.environ.get(VARIABLE)
        looked = f"{tried} has no folder {name}, and " if tried else ""
        found = f"{looked}{hub[0]} is not in the cache and the hub cannot be reached ({type(error).__name__})"
        do = f"Give {_wanted(name, files)} (--data-dir or {VARIABLE})"
        raise FfnkitError(f"data of task {name}", found, do) from error
    return loaded


def _wanted(name: str, files: Sequence[str]) -> str:
    listed = [f"{name}/{file}" for file in files]
    return f"the folder that holds {' and '.join(listed)}"
