"""What acts on processes and connections, and proves that it did."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conditions import wait_until
from cuttable_proxy import CuttableProxy

FIRED_S = 10.0


def kill(pids: Sequence[int]) -> None:
    """Sends SIGKILL to all at once. Raises AssertionError unless all were there, and have ended."""
    for pid in pids:
        assert state_of(pid) not in (None, "Z"), f"process {pid} had ended before it was killed"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(state_of(pid) in (None, "Z") for pid in pids), f"{pids} have ended", FIRED_S)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile. Raises AssertionError where it does."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state_of(pid) == "T", f"process {pid} is stopped", FIRED_S, every_s=0.001)
        yield
        assert state_of(pid) == "T", f"process {pid} did not stay stopped: {state_of(pid)}"
    finally:
        os.kill(pid, signal.SIGCONT)


def cut(proxy: CuttableProxy) -> None:
    """Raises AssertionError where no connection was open."""
    before = proxy.num_cut
    proxy.cut()
    assert proxy.num_cut > before, "no connection was open that could be cut"


def state_of(pid: int) -> str | None:
    """As in proc(5); None when there is no such process (any more)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
    assert found is not None
    return found[1]
