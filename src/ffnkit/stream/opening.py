"""A checkpoint as a model whose weights lie in its files, read as they are used."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ffnkit.errors import FfnkitError
from ffnkit.io import files
from ffnkit.io.apart import has_adapters
from ffnkit.io.architectures import empty_model, is_ffnkit_config, read_config
from ffnkit.io.conversions import few_bits
from ffnkit.io.loading import check_name, open_errors
from ffnkit.io.memory import free_memory
from ffnkit.io.sizes import checkpoint_files, opened_bytes, stored_shapes
from ffnkit.io.snapshots import folder_of
from ffnkit.io.workspace import workspace
from ffnkit.stream.pages import LIMIT, few_pages, is_mapped

ROOM = 1.3  # times the bytes of an opened model, that compressing it in memory takes at least
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def too_large(source: str, dtype: str = "auto") -> str:
    """In words, that a model does not fit into the memory that is free; "" where it does, or none can tell."""
    size, free = whole_bytes(source, dtype), free_memory()[0]
    if size * ROOM <= free:
        return ""
    return f"{source} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: it stays in its files"


def whole_bytes(source: str, dtype: str = "auto") -> int:
    """Bytes of a model once it is opened, of a hub name what is in the cache; 0 without safetensors files."""
    files = _files(source)
    if not files:
        return 0
    stored = str(getattr(read_config(source), "dtype", None)).removeprefix("torch.")
    with open_errors(f"opening {source}"):
        size = opened_bytes(files, _SIZES.get(stored, 2))
    return size * _SIZES[dtype] // _SIZES[stored] if dtype in _SIZES and stored in _SIZES else size


def _files(source: str) -> list[Path]:
    name = check_name(source)
    folder = Path(name) if os.path.isdir(name) else folder_of(name)
    return [] if folder is None else checkpoint_files(folder)


def check_streams(source: str, device: str = "cpu") -> None:
    """Raises FfnkitError where a model cannot be compressed from its files."""
    asked = f"compressing {source} from its files"
    if device not in ("auto", "cpu"):
        raise FfnkitError(asked, f"--device {device} wants the whole model there", "Take --device cpu, or --no-stream")
    if not _files(source):
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
        with few_pages() as look, files.in_files(place, look):
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


@contextmanager
def opened_from_files(
    source: str, out: str | Path | None, say: Callable[[str], None], device: str = "cpu"
) -> Iterator[Path]:
    """:func:`streaming` once it is known that it can be done; what it will take is said first.

    Args:
        say: called with one line.

    Raises:
        FfnkitError: as of :func:`check_streams`; the output's disk has no room.
    """
    check_streams(source, device)
    sizes = _sizes(source)
    if out is not None:
        _check_room(sizes, out)
    with streaming(out) as place:
        say(_expected(sizes, place))
        yield place


def _check_room(sizes: tuple[int, int, int], out: str | Path) -> None:
    """Raises FfnkitError where the disk of the output has not room for a model and for what opening puts together."""
    around = Path(out).absolute()
    while not around.is_dir():
        around = around.parent
    whole, _, made = sizes
    need, free = whole + made, shutil.disk_usage(around).free
    if need > free:
        what = f"{need / 1e9:.1f} GB may be written, and {free / 1e9:.1f} GB are free on its disk"
        raise FfnkitError(f"writing '{out}'", what, "Free some space, or name another disk")


def _expected(sizes: tuple[int, int, int], place: Path) -> str:
    """In words, about how long reading and writing take beside the method's arithmetic, how much memory and disk."""
    import torch

    (whole, largest, made), trial = sizes, torch.zeros(32 << 20, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        start = time.perf_counter()
        file.write(trial.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        each = (time.perf_counter() - start) / len(trial)
    disk, memory = 2 * (whole + made), LIMIT + 8 * largest  # a few copies, of 2 bytes in float32
    seconds = disk * each
    time_ = f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"expected from the files: about {time_} of reading and writing, {memory / 1e9:.1f} GB of memory beside the"
        f" libraries, and at most {disk / 1e9:.1f} GB of disk, half of it while it runs"
    )


def _sizes(source: str) -> tuple[int, int, int]:
    """Of a model once it is opened: all its bytes, those of its largest parameter, those that lie so in no file."""
    config, whole = read_config(source), whole_bytes(source)
    stored = stored_shapes(_files(source))
    size = _SIZES.get(str(getattr(config, "dtype", None)).removeprefix("torch."), 4)
    if is_ffnkit_config(config) or has_adapters(source):  # opening them is what is to be told about
        shapes = stored
    else:
        shapes = {name: tuple(p.shape) for name, p in empty_model(source).named_parameters()}
    largest = max(map(math.prod, shapes.values()), default=0) * size
    if few_bits(getattr(config, "quantization_config", None)):
        return whole, largest, whole
    return whole, largest, sum(size * math.prod(shape) for name, shape in shapes.items() if stored.get(name) != shape)


def _is_large(value: Any) -> bool:
    plain = type(value) is Tensor and value.device.type == "cpu" and value.is_contiguous()
    return plain and value.numel() * value.element_size() >= files.SPOOL_FROM
