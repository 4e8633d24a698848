"""``ffnkit.compress``: from one checkpoint to another, in memory or from the files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ffnkit.calibration.batches import kept
from ffnkit.calibration.fingerprints import batch_fingerprint
from ffnkit.calibration.going_on import going_on
from ffnkit.calibration.stored import StatisticsFile
from ffnkit.errors import FfnkitError
from ffnkit.io.architectures import load_any, load_companion
from ffnkit.io.files import SHARD
from ffnkit.io.folders import check_target
from ffnkit.io.sizes import checkpoint_files
from ffnkit.io.snapshots import name_of
from ffnkit.stream.opening import opened_from_files, too_large
from ffnkit.stream.record import is_by_ffn, leaving_what_was_planned, planned, ready, room_for, uses_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from ffnkit.plans import Method, Plan

logger = logging.getLogger(__name__)


def compress(
    source: str | Path,
    method: Method,
    out: str | Path,
    data: Iterable[dict[str, Tensor]] | StatisticsFile | None = None,
    *,
    form: Literal["compact", "standard"] = "compact",
    stream: bool | None = None,
    max_shard_size: str = SHARD,
) -> Plan:
    """Compress a checkpoint into another one: opened, planned, applied, saved, with everything that travels along.

    From its files (``stream=True``) the model is never whole in memory: weights are read as they are used, what is new
    goes into files, and the result is the same to the bit. Where it was interrupted, a method that decides of each FFN
    alone goes on behind the last FFN that it planned, and one that goes block by block over data behind the last block.

    Args:
        source: a folder, or a hub name.
        method: settings such as ``Fusion(width=0.25)``.
        out: the folder to write. form: "compact" (``fk.load``) or "standard" (plain ``from_pretrained``).
        data: batches, for methods that want them.
        stream: from its files, or in memory; None: from its files where memory does not hold it, and one line says so.
        max_shard_size: of the files that are written.

    Returns:
        The plan, as it was applied.

    Raises:
        FfnkitError: as of ``fk.plan``, ``fk.save`` and ``fk.export``; a source that has no safetensors files; no room.
    """
    import ffnkit

    source = str(source)
    if form not in ("compact", "standard"):
        raise FfnkitError(f"form {form!r}", "there is no such form", "Take compact or standard")
    check_target(out)
    _check_apart(source, out)
    if stream is None and (why := too_large(source)):
        logger.warning("%s", why)
        stream = True
    with opened_from_files(source, out, logger.info) if stream else nullcontext():
        model, parts = load_any(source, dtype="auto"), None
        plan, parts = make_plan(model, method, data, out) if stream else (ffnkit.plan(model, method, data=data), None)
        ffnkit.apply(model, plan)
        writer: Any = ffnkit.save if form == "compact" else ffnkit.export
        writer(model, out, tokenizer=load_companion(source), max_shard_size=max_shard_size)
    if parts is not None:
        shutil.rmtree(parts, ignore_errors=True)
    return plan


def make_plan(
    model: Any, method: Method, data: Iterable[dict[str, Tensor]] | StatisticsFile | None, out: str | Path
) -> tuple[Plan, Path | None]:
    """The plan, and the folder beside the output where its parts wait, should there be any."""
    import ffnkit

    if is_by_ffn(method):
        return planned(model, method, name_of(model), out, _say)
    if data is None:
        return ffnkit.plan(model, method), None
    if isinstance(data, StatisticsFile):
        fingerprints = [os.fspath(data.path.absolute()), str(data.path.stat().st_mtime_ns), *data.data]
    else:
        data = batches = cast("list[dict[str, Tensor]]", kept(data))
        fingerprints = [batch_fingerprint(batch) for batch in batches]
        if uses_blocks(method):
            logger.info("%s", room_for(model, batches, out))
    place = ready(name_of(model), method, out, fingerprints)
    with leaving_what_was_planned(place), going_on(place, _say):
        return ffnkit.plan(model, method, data=data), place.parent


def _say(done: int) -> None:
    logger.warning("%s FFNs were planned before: going on behind them", done)


def _check_apart(source: str, out: str | Path) -> None:
    """Raises FfnkitError where the output would take the place of the files that are read."""
    folder = Path(source).expanduser()
    if folder.is_dir() and checkpoint_files(folder) and folder.resolve() == Path(out).resolve():
        raise FfnkitError(f"writing '{out}'", "it is the model that is read", "Name another folder")
