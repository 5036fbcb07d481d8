"""Waiting for what comes about in other processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

# Ray's processes die slowly on a loaded machine; a condition that holds is seen at once.
WAIT_S = 60.0


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S, *, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(every_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
