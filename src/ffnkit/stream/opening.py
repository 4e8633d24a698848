"""A checkpoint as a model whose weights lie in its files, read as they are used."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ffnkit.errors import FfnkitError
from ffnkit.io import files
from ffnkit.io.architectures import read_config
from ffnkit.io.sizes import checkpoint_files, stored_shapes
from ffnkit.io.snapshots import folder_of
from ffnkit.io.workspace import workspace
from ffnkit.stream.pages import LIMIT, few_pages, is_mapped

ROOM = 1.3  # times the bytes of a checkpoint, that compressing it in memory takes at least


def too_large(source: str, dtype: str = "auto") -> str:
    """In words, that a checkpoint does not fit into the memory that is free; "" where it does, or none can tell."""
    import psutil

    size, free = stored_bytes(source) * _growth(source, dtype), int(psutil.virtual_memory().available)
    if size * ROOM <= free:
        return ""
    return f"{source} holds {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: it stays in its files"


def stored_bytes(source: str) -> int:
    """Bytes of the safetensors files of a folder or a hub name in the cache; 0 where there are none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in checkpoint_files(folder))


def _growth(source: str, dtype: str) -> float:
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    stored = str(getattr(read_config(source), "dtype", None)).removeprefix("torch.")
    return sizes[dtype] / sizes[stored] if dtype in sizes and stored in sizes else 1.0


def check_streams(source: str, dtype: str = "auto", device: str = "cpu") -> None:
    """Raises FfnkitError where a model cannot be compressed from its files."""
    asked = f"compressing {source} from its files"
    if device not in ("auto", "cpu"):
        raise FfnkitError(asked, f"--device {device} wants the whole model there", "Take --device cpu, or --no-stream")
    folder = folder_of(source) if not os.path.isdir(source) else Path(source)
    if folder is None or not checkpoint_files(folder):
        do = "Open it once, and save it with save_pretrained"
        raise FfnkitError(asked, "it has no safetensors files in a folder or in the cache", do)


@contextmanager
def from_files(place: Path) -> Iterator[None]:
    """While the block runs, models that are opened stay in their files, and what becomes of them goes into others.

    Weights that opening has to compute (experts that are put together, floats of 8 and 4 bits) go into files one by
    one. Results are the same to the bit: it is the same code on the same numbers.

    Args:
        place: a folder that is there, on a disk with room for what is new.
    """

    def into_file(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and _is_large(parameter.data) and not is_mapped(parameter.data_ptr()):
            parameter.data = files.held(parameter.data)

    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else transformers computes all weights ahead of their use
    hook = register_module_parameter_registration_hook(into_file)
    try:
        with files.in_files(place), few_pages():
            yield
    finally:
        hook.remove()
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if before is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


@contextmanager
def streaming(out: str | Path | None) -> Iterator[Path]:
    """:func:`from_files` with a folder beside an output, which goes at the end; without one in the system's own."""
    around = Path(out).absolute().parent if out is not None else Path(tempfile.gettempdir())
    while not around.is_dir():
        around = around.parent
    with workspace(around) as place, from_files(place):
        yield place


def check_room(source: str, out: str | Path) -> None:
    """Raises FfnkitError where the disk of the output has not room for a model and for what is new beside it."""
    around = Path(out).absolute()
    while not around.is_dir():
        around = around.parent
    need, free = stored_bytes(source), shutil.disk_usage(around).free
    if need > free:
        what = f"{need / 1e9:.1f} GB may be written, and {free / 1e9:.1f} GB are free on its disk"
        raise FfnkitError(f"writing '{out}'", what, "Free some space, or name another disk")


def expected(source: str, place: Path) -> str:
    """In words, about how long reading and writing take beside the method's arithmetic, how much memory and disk."""
    import torch

    size, trial = stored_bytes(source), torch.zeros(32 << 20, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        start = time.perf_counter()
        file.write(trial.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        each = (time.perf_counter() - start) / len(trial)
    shapes = stored_shapes(checkpoint_files(source)) if os.path.isdir(source) else {}
    largest = max(map(math.prod, shapes.values()), default=0)
    memory = (LIMIT + 4 * 4 * largest) / 1e9  # a few copies in float32
    time_, disk = 2 * size * each / 60, 2 * size / 1e9
    return (
        f"expected from the files: about {time_:.1f} min of reading and writing, {memory:.1f} GB of memory"
        f" and at most {disk:.1f} GB of disk, half of it while it runs"
    )


def _is_large(value: Any) -> bool:
    plain = type(value) is Tensor and value.device.type == "cpu" and value.is_contiguous()
    return plain and value.numel() * value.element_size() >= files.SPOOL_FROM
