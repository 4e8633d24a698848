"""What tells models and batches apart that statistics are of."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ffnkit.calibration.batches import Batch

SAMPLES = 4096  # numbers of each tensor that tell models apart


def model_fingerprint(model: nn.Module) -> str:
    """Tells models apart by names, shapes and some numbers of each tensor; it is no proof against a forger.

    Of dtypes that of most numbers counts: routers turn to float32 when they first run (Switch Transformers).
    """
    digest = hashlib.sha256()
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    digest.update(str(max(sizes, key=sizes.__getitem__, default=None)).encode())
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            flat = value.detach().flatten()
            some = flat if flat.is_meta else flat[:: max(1, len(flat) // SAMPLES)][: 2 * SAMPLES]
            _digest(digest, name, tuple(value.shape), some.float() if some.is_floating_point() else some)
    return digest.hexdigest()


def batch_fingerprint(batch: Batch) -> str:
    """Equal for batches of equal tensors."""
    digest = hashlib.sha256()
    for name, value in batch.items():
        if isinstance(value, Tensor):
            _digest(digest, name, tuple(value.shape), value)
    return digest.hexdigest()


def _digest(digest: Any, name: str, shape: tuple[int, ...], value: Tensor) -> None:
    digest.update(f"{name} {shape} {value.dtype}".encode())
    if not value.is_meta:
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
