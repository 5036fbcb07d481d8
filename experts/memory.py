"""How much memory this process may still take, where it will compute."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, *, cgroup: Path = _CGROUP) -> int:
    """Of a GPU, what its driver calls free; of the host, what is available without swapping within the limit of
    the container we run in, page cache counted as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
