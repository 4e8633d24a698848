"""``--stream``: the model stays in its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnkit.cli import console
from ffnkit.errors import FfnkitError

Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream", help="From the files, never whole in memory. \\[default: where memory does not hold it]"
    ),
]
_outputs: list[Path] = []  # of the command that streams


@contextmanager
def around(
    stream: bool | None, source: str, out: Path | None, dtype: str, device: str, *, heal: str | None
) -> Iterator[str]:
    """A compression from the files where it is asked for or memory does not hold the model; gives the device.

    Plans that waited for the output, should the command be interrupted, go at the end.

    Raises:
        FfnkitError: it cannot be done so: no safetensors files, another device, a dtype, healing.
    """
    from ffnkit.stream.opening import opened_from_files, too_large
    from ffnkit.stream.record import parts_of

    why = "" if stream is not None or device not in ("auto", "cpu") else too_large(source, dtype)
    if why:
        console.say(why)
    if not (stream or why):
        yield device
        return
    asked = f"compressing {source} from its files"
    if heal is not None:
        do = "Leave --heal out, or heal the result: ffnkit tune"
        raise FfnkitError(asked, "--heal trains the whole model in memory", do)
    if dtype != "auto":
        do = "Leave --dtype out"
        raise FfnkitError(asked, f"--dtype {dtype} makes other weights of all of them", do)
    with opened_from_files(source, out, console.say, device):
        _outputs[:] = [] if out is None else [out]
        try:
            yield "cpu"
        finally:
            _outputs.clear()
    if out is not None:
        shutil.rmtree(parts_of(out), ignore_errors=True)


def plan(model: Any, method: Any, data: Any) -> Any:
    """``ffnkit.plan``; of a command that streams it goes on where an earlier one was interrupted."""
    import ffnkit

    if not _outputs:
        return ffnkit.plan(model, method, data=data)
    from ffnkit.stream.job import make_plan

    return make_plan(model, method, data, _outputs[0])[0]
