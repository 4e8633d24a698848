"""How much memory there is, of the machine or of the container that we are in."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> tuple[int, int]:
    """Bytes of memory that are free, and of all; of the container's where it has a limit."""
    import psutil

    found = psutil.virtual_memory()
    free, total = int(found.available), int(found.total)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = int((CGROUP / limit).read_text()), int((CGROUP / used).read_text())
        except (OSError, ValueError):
            continue
        if most < total:
            free, total = min(free, max(0, most - now + _cached((CGROUP / limit).parent))), most
    return free, total


def _cached(group: Path) -> int:
    """Pages of files that a container's count holds, and that go where memory is wanted."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    return found.get("total_inactive_file", found.get("inactive_file", 0))
