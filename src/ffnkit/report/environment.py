"""On what it was measured: versions and machine, without names of hosts or folders."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("ffnkit", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Version of python and of each package of ``PACKAGES``; "not installed" where there is none."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # run from a source tree
        return str(getattr(importlib.import_module(name.replace("-", "_")), "__version__", "unknown"))
    except ImportError:
        return "not installed"


def machine() -> dict[str, Any]:
    """cpu, cores, torch_threads, memory_bytes, accelerator and os; no host name, no paths."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "accelerator": _accelerator(),
        "os": _system(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    """Bytes of memory, or of the container's limit where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name(0)
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind.type if kind is not None else "none"


def _system() -> str:
    system = platform.system()
    if system == "Linux":
        with suppress(OSError, KeyError):
            system = f"Linux ({platform.freedesktop_os_release()['PRETTY_NAME']})"
    elif system == "Darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    return f"{system}, {platform.machine()}"
