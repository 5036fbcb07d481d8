"""Finding and ending every process below this one, so that none outlives its service.

A subreaper inherits every descendant whose own parent has died, so whoever ends last can see and end them all.
On other systems than Linux nothing is found and Ray's own reaping has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SWEEP_POLL_S = 0.02


def adopt_orphans() -> None:
    """Makes this process the new parent of descendants whose parent dies."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``; zombies, which only wait to be collected, are left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for parent, child in _living_processes():
        children[parent].append(child)
    found: list[int] = []
    pending = [pid]
    while pending:
        below = children.pop(pending.pop(), [])
        found += below
        pending += below
    return found


def _living_processes() -> list[tuple[int, int]]:
    """(parent pid, pid) of every process that is not a zombie."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue  # ended while we looked
        # The command's name stands in parentheses and may itself hold spaces and parentheses.
        state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
        if state not in "ZX":
            processes.append((int(parent), int(folder.name)))
    return processes


def end_descendants(timeout_s: float) -> list[int]:
    """Kills every descendant of this process and collects it; adopt_orphans() must have been called before them.

    Returns those that still live after timeout_s (in an uninterruptible system call, say).
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = descendants(os.getpid())
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _collect_children()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(SWEEP_POLL_S)


def _collect_children() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
