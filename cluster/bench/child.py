"""A process that answers JSON lines with JSON lines, and sleeps for certain while others are measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

CLOSE_S = 5.0


class ChildError(RuntimeError):
    """The process answered with an error, ended, or did not answer in time. The text names it."""


class Child:
    """Owns the process and its process group. stderr is ours.

    The group is in our session: should we be killed while it is stopped, the kernel wakes it with SIGHUP.
    """

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        """Raises OSError when the command cannot be run."""
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            process_group=0,
        )
        self._arrived = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends a line; ``hear`` gets the answer. Raises ChildError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ChildError(f"{self.name} has ended{self._how()}") from error

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next line. Raises ChildError, also for an answer with an "error"."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._arrived:
            self._arrived += self._read(deadline - time.monotonic(), timeout_s)
        line, _newline, self._arrived = self._arrived.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.name}: {answer['error']}")
        return answer

    def pause(self) -> None:
        """Not a cycle more until ``resume``, whatever its threads are up to."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the process with its stdin, or by force. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.resume()
        try:
            self._process.stdin.close()
            self._process.wait(CLOSE_S)
        except (OSError, subprocess.TimeoutExpired):
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    def _read(self, remaining_s: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if remaining_s <= 0 or not selector.select(remaining_s):
                raise ChildError(f"{self.name} did not answer within {timeout_s:g} s")
        arrived = os.read(self._process.stdout.fileno(), 1 << 16)
        if not arrived:
            raise ChildError(f"{self.name} has ended{self._how()}")
        return arrived

    def _how(self) -> str:
        try:
            return f", exit status {self._process.wait(CLOSE_S)}"
        except subprocess.TimeoutExpired:
            return ", its output closed"

    def _signal(self, number: signal.Signals) -> None:
        # Once waited for, the number may be another's.
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
