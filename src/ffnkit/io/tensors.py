"""Safetensors files written one tensor after the other, so that no more than one is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

ENTRY = 160  # bytes that a tensor takes in a header at most, beside its name
NAMES = {  # of dtypes, in such a file
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing of files of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


class TensorWriter:
    """Writes tensors behind room for their header, which is filled in the end.

    Args:
        path: of the file. metadata: texts by name.
        count: of the tensors, at most. length: of their names together, in bytes, at most.
    """

    def __init__(self, path: Path, metadata: dict[str, str], *, count: int, length: int) -> None:
        self._file: BinaryIO = path.open("wb")
        self._header: dict[str, Any] = {"__metadata__": metadata}
        self._room = -(-(len(self._encoded()) + length + count * ENTRY) // 8) * 8
        self._file.write(self._room.to_bytes(8, "little") + b" " * self._room)
        self._at = 0

    def _encoded(self) -> bytes:
        return json.dumps(self._header, separators=(",", ":"), ensure_ascii=False).encode()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. It may go afterwards."""
        import torch

        own = tensor.detach().cpu().contiguous()
        size = own.numel() * own.element_size()
        if size:
            self._file.write(own.view(-1).view(torch.uint8).numpy().data)
        kind = NAMES[str(own.dtype).removeprefix("torch.")]
        self._header[name] = {"dtype": kind, "shape": list(own.shape), "data_offsets": [self._at, self._at + size]}
        self._at += size

    def close(self) -> None:
        """Write the header: the file is whole then."""
        with self._file as file:
            header = self._encoded()
            assert len(header) <= self._room, "the header has outgrown its room"
            file.seek(8)
            file.write(header)

    def drop(self) -> None:
        """Leave the file unfinished."""
        self._file.close()
