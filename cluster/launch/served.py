"""`arriero serve` in a process of its own, for as long as whoever started it needs it."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Self

STOP_S = 60.0


class NotServedError(RuntimeError):
    """The service did not come up; its log says why."""


class Served:
    """Starts the service and waits until it says that it is ready; use it as a context. Its log goes to our stderr, or
    to log. ready_line: what it said.

    Raises NotServedError when it does not come up within ready_timeout_s.
    """

    def __init__(self, arguments: Sequence[str], *, ready_timeout_s: float, log: IO[str] | None = None) -> None:
        grpc_port, http_port = _free_ports(2)
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        self.http_url = f"http://127.0.0.1:{http_port}"
        ports = ["--grpc-port", str(grpc_port), "--http-port", str(http_port)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.cli", "serve", *ports, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            process_group=0,
        )
        try:
            self.ready_line = self._wait_until_ready(ready_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it as Ctrl-C would, or by force."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _wait_until_ready(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        deadline, said = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in said:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise NotServedError(f"arriero serve was not ready within {timeout_s:g} s")
                arrived = os.read(self._process.stdout.fileno(), 4096)
                if not arrived:
                    raise NotServedError("arriero serve ended before it was ready; its log says why")
                said += arrived
        return said.decode().strip()


def _free_ports(count: int) -> list[int]:
    """Free at this moment, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
