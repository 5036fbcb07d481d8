"""What the processes of a service hold: file descriptors, sockets, memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """num_sockets are among num_fds. memory_bytes: resident, without files mapped into memory."""

    num_fds: int
    num_sockets: int
    memory_bytes: int


def holdings(pids: Mapping[str, int]) -> Mapping[str, Holdings]:
    """Of every process that is asked for, by the same names."""
    return {name: _holdings_of(pid) for name, pid in pids.items()}


def _holdings_of(pid: int) -> Holdings:
    targets = [target for fd in (PROC / str(pid) / "fd").iterdir() if (target := _target(fd)) is not None]
    return Holdings(
        num_fds=len(targets),
        num_sockets=sum(target.startswith("socket:") for target in targets),
        memory_bytes=_status(pid, "RssAnon") * 1024,
    )


def _target(fd: Path) -> str | None:
    """None for one that was closed meanwhile."""
    try:
        return os.readlink(fd)
    except FileNotFoundError:
        return None


def parent(pid: int) -> int:
    return _status(pid, "PPid")


def _status(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
