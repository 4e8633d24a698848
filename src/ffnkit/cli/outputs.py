"""Checks of the output folder, made before the expensive work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ffnkit.cli.history import FILE as HISTORY
from ffnkit.errors import FfnkitError
from ffnkit.io import formats, manifest
from ffnkit.io.files import check_file, read_json
from ffnkit.io.folders import check_target


def check_output(out: Path, *, overwrite: bool = False, source: str | None = None, kind: str = "model") -> Path:
    """Return ``out`` when a result may be put there.

    Args:
        kind: of the result, as for ``io.folders.check_target``.

    Raises:
        FfnkitError: ``out`` is a file, a folder of something else (without ``overwrite``), the model that is being
            read, in a place that cannot be written, or what it holds can neither be replaced nor stay.
    """
    asked = f"--out {out}"
    if out.exists() and not out.is_dir():
        raise FfnkitError(asked, "this is a file", "Name a folder that does not exist yet")
    target = out.resolve()
    if source is not None and Path(source).is_dir():
        read = Path(source).resolve()
        if target == read or read.is_relative_to(target):
            raise FfnkitError(asked, f"the model that is read, {source}, is in that folder", "Choose another --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not is_ffnkit_output(out):
        found = "the folder is not empty and was not written by ffnkit"
        raise FfnkitError(asked, found, "Choose another folder, or add --overwrite to replace it")
    return check_target(out, kind)


def check_output_file(
    asked: str, out: Path, what: str, is_one: Callable[[Path], bool], read: Iterable[str | Path | None] = ()
) -> None:
    """See whether a file may be written to ``out``.

    Args:
        asked: the option. what: is written. is_one: whether a file is such a one, by what it says.
        read: files that the command reads; None stands for none.

    Raises:
        FfnkitError: it cannot be written, or there is a file that is read, or one of another kind that is not empty.
    """
    check_file(out)
    if not out.exists():
        return
    inputs = [Path(each).expanduser() for each in read if each is not None]
    if any(each.exists() and out.samefile(each) for each in inputs):
        raise FfnkitError(f"{asked} {out}", "this file is read", "Name another file")
    if out.stat().st_size and not is_one(out):
        raise FfnkitError(f"{asked} {out}", f"there is a file that is no {what}", "Name another file, or move it away")


def is_ffnkit_output(folder: Path) -> bool:
    """Whether ffnkit wrote ``folder``, by what its files say: anyone may have a file of the name of one of ours."""
    if manifest.read(folder) or "base_model" in (read_json(folder / HISTORY) or {}):
        return True
    return is_compact(folder) or manifest.has_card(folder)


def is_compact(folder: Path) -> bool:
    """Whether ``folder`` holds a compact checkpoint of ffnkit."""
    return formats.is_compact((read_json(folder / "config.json") or {}).get("quantization_config"))
