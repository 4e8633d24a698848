"""What a model costs: parameters, bytes on disk, seconds of a batch, peak memory; and on what it was measured."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ffnkit.calibration.latency import Latencies as Latencies
from ffnkit.calibration.latency import Spread as Spread
from ffnkit.calibration.latency import latencies as latencies
from ffnkit.calibration.latency import latency as latency
from ffnkit.errors import FfnkitError
from ffnkit.io.apart import ADAPTER, BASE, is_apart
from ffnkit.report.environment import machine as machine
from ffnkit.report.environment import versions as versions

if TYPE_CHECKING:
    import torch
    from torch import nn

# training_args.bin, optimizer.pt and the like lie beside the weights and are not weights
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "model*.h5", "*.msgpack")


# ---------------------------------------------------------------------------------------------------- size
def parameters(model: nn.Module) -> int:
    """Number of parameters, a shared one counted once; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def trainable(model: nn.Module) -> int:
    """Number of parameters that take a gradient, a shared one counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def ffn_parameters(model: nn.Module) -> int:
    """Number of parameters in the FFNs, a tied FFN counted once."""
    return figures(model)["ffn_parameters"]


def flops(model: nn.Module) -> int:
    """FLOPs a token of one forward pass, as ``ffnkit.inspect`` counts them."""
    return figures(model)["flops_per_token"]


def figures(model: nn.Module) -> dict[str, int]:
    """The counts of one row of results: parameters, ffn_parameters, trainable_parameters and FLOPs a token."""
    from ffnkit.model.inspect import inspect

    seen = inspect(model)
    return {
        "parameters": parameters(model),
        "ffn_parameters": int(seen.ffn_parameters),
        "trainable_parameters": trainable(model),
        "flops_per_token": int(seen.flops_per_token),
        "ffn_flops_per_token": int(seen.ffn_flops_per_token),
    }


@dataclass(frozen=True)
class DiskBytes:
    """Bytes of a checkpoint folder: its weight files, and all of its files."""

    weights: int
    total: int


def bytes_on_disk(folder: str | Path) -> DiskBytes:
    """Bytes of the weight files directly in ``folder`` (of the first format found) and of every file below it.

    Where a base and its updates lie apart in it, the weights are those of both.

    Raises:
        FfnkitError: ``folder`` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FfnkitError(f"the size of '{folder}'", "there is no such folder", "Give the folder of a checkpoint")
    weights = 0
    for part in (folder / BASE, folder / ADAPTER) if is_apart(folder) else (folder,):
        found = next((found for pattern in WEIGHT_FILES if (found := list(part.glob(pattern)))), [])
        weights += sum(file.stat().st_size for file in found)
    return DiskBytes(weights, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


# -------------------------------------------------------------------------------------------------- memory
@dataclass
class PeakMemory:
    """Peak memory inside ``with peak_memory()``; filled in when the block ends.

    Attributes:
        before_bytes: resident memory of the process when the block began.
        peak_bytes: the largest resident memory of the process, libraries and file pages included.
        exact: the peak counts from the start of the block; if False the system could not reset its high-water mark
            and ``peak_bytes`` is the peak since the process began.
        device_before_bytes, device_peak_bytes: bytes of tensors on the CUDA device; None without one.
    """

    before_bytes: int = 0
    peak_bytes: int = 0
    exact: bool = False
    device_before_bytes: int | None = None
    device_peak_bytes: int | None = None

    @property
    def increase_bytes(self) -> int:
        """How far the peak was above the resident memory before the block."""
        return max(0, self.peak_bytes - self.before_bytes)


@contextmanager
def peak_memory(device: torch.device | str | None = None) -> Iterator[PeakMemory]:
    """Measure the peak memory of a block: the process's resident memory and, for a CUDA ``device``, its tensors."""
    import torch

    gc.collect()
    on_cuda = device is not None and torch.device(device).type == "cuda"
    peak = PeakMemory(exact=_reset_high_water())
    peak.before_bytes = resident_bytes()
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.device_before_bytes = torch.cuda.memory_allocated(device)
    try:
        yield peak
    finally:
        if on_cuda:
            torch.cuda.synchronize(device)
            peak.device_peak_bytes = torch.cuda.max_memory_allocated(device)
        peak.peak_bytes = max(peak_resident_bytes(), peak.before_bytes)


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process: since its start, or since the last reset where the system allows one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark to the present resident memory; False where that is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
