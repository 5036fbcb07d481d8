"""How much memory a process of this machine holds."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def resident_bytes(pid: int | None = None) -> int:
    """Of this process by default. 0 for one that has ended."""
    try:
        pages = (_PROC / ("self" if pid is None else str(pid)) / "statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
