"""How much of this host's memory a process may still take. Free of torch: a router's replica tells it, too."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(*, cgroup: Path = CGROUP) -> int:
    """What is available without swapping, within the limit of the container we run in, page cache counted as free."""
    return min(_available_on_host(), _left_in_cgroup(cgroup))


def _available_on_host() -> int:
    for line in _MEMINFO.read_text().splitlines():
        name, value = line.split(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{_MEMINFO} has no MemAvailable")


def _left_in_cgroup(cgroup: Path) -> int:
    """Of cgroup v2; a process outside one has no limit but the host's."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return _available_on_host()
    if limit == "max":
        return _available_on_host()
    reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return max(0, int(limit) - used + reclaimable)
