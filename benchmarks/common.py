"""What the benchmarks share: measuring in a process of its own, and writing results with the machine named."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


# ------------------------------------------------------------------------------------------ inside the process
def release() -> None:
    """Give freed memory back to the system, so that it is not found free by what is measured next."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def synchronizer(device: str) -> Callable[[], None]:
    """What waits for the device."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def loaded_bytes(device: str = "cpu") -> int:
    """What is held now: resident memory, or tensors on the CUDA device."""
    import torch

    from ffnkit.report import measure

    release()
    return torch.cuda.memory_allocated() if device == "cuda" else measure.resident_bytes()


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: seconds of the clock and of the processor, and its peak of bytes beyond a base.

    ``exact``: the peak counts from the start of the work.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int
    exact: bool


@dataclass(frozen=True)
class Call:
    """When a call of a function began, its seconds and its result."""

    start: float
    seconds: float
    result: Any


def cost(work: Callable[[], Any], base: int, device: str = "cpu") -> Cost:
    """Do ``work`` and say what it took, memory beyond ``base`` bytes."""
    from ffnkit.report import measure

    sync = synchronizer(device)
    with measure.peak_memory(device) as peak:
        start, busy = time.perf_counter(), time.process_time()
        work()
        sync()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    top = peak.peak_bytes if peak.device_peak_bytes is None else peak.device_peak_bytes
    return Cost(seconds, busy, max(0, top - base), peak.exact or device == "cuda")


def time_calls(
    module: Any,
    name: str,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    keep: bool = True,
) -> list[Call]:
    """Let every call of a function of ``module`` note what it took in the list that is returned.

    Args:
        keep: note its result too, which then stays in memory.
    """
    sync = synchronizer(device)
    calls: list[Call] = []
    original = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        sync()
        start = clock()
        result = original(*args, **kwargs)
        sync()
        calls.append(Call(start, clock() - start, result if keep else None))
        return result

    setattr(module, name, timed)
    return calls


def load_average() -> float | None:
    """Runnable processes on the machine, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# ----------------------------------------------------------------------------------------- outside the process
def in_process(file: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """The last line that ``file --worker arguments`` prints, as JSON, from a fresh process."""
    env = dict(os.environ)
    if threads is not None:
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    command = [sys.executable, file, "--worker", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def started() -> dict[str, Any]:
    """The head of every results file: the machine, the versions and the load; rows are to be added."""
    from ffnkit.report import measure

    return {"machine": measure.machine(), "versions": measure.versions(), "load": [load_average()], "rows": []}


def resumed(out: Path, name: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """The results that NAME.json holds, to go on from, if they were taken under these conditions; else a fresh head."""
    stored = out / f"{name}.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    return results if results.get("conditions") == conditions else started() | {"conditions": conditions}


def table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the second of which are the rules, as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def footer(results: dict[str, Any], threads: int | None = None) -> list[str]:
    """The machine and the versions, as lines of a list."""
    machine, versions = results["machine"], results["versions"]
    shown = ", ".join(f"{key} {versions[key]}" for key in ("python", "torch", "transformers", "ffnkit"))
    return [
        f"- {machine['cpu']}, {machine['cores']} cores, {threads or machine['torch_threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:.1f} GB; accelerator: {machine['accelerator']}; {machine['os']}.",
        f"- {shown}.",
    ]


def commit() -> str:
    """Of the source that measures: what its defaults were. "unknown" outside a repository."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def write(out: Path, name: str, results: dict[str, Any], page_of: Callable[[dict[str, Any]], str]) -> None:
    """Write NAME.json and NAME.md, and print the page, which is made once the load at the end is known.

    New rows name the commit; those of before keep theirs.
    """
    from ffnkit.io.files import write_text

    results["load"].append(load_average())
    file = out / f"{name}.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    for row in results["rows"]:
        if row not in before:
            row.setdefault("commit", commit())
    page = page_of(results)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
    write_text(out / f"{name}.md", page)
    print(page)
