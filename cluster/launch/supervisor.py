"""Runs the process that owns Ray, so that the command line can always end it and everything below it.

The parent stays small and never imports Ray: it reacts to signals at once whatever Ray is doing, keeps its
stdout for itself, and adopts what the driver leaves behind. The driver runs in a session of its own, so a
Ctrl-C of the terminal reaches the parent alone. Reports go up a pipe, one JSON object per line.

    terminal --SIGINT--> supervisor --SIGINT--> driver --> raylet, workers, engines
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.launch.processes import adopt_orphans, end_descendants

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SWEEP_TIMEOUT_S = 10.0
INTERRUPTED = 128 + signal.SIGINT
REPORT_ENV = "ARRIERO_REPORT_FD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the driver tells its supervisor: it serves (ready is a line for stdout), or why it cannot."""

    ready: str | None = None
    failed: str | None = None


def send_report(report: Report) -> None:
    """Called in the driver. Does nothing once the supervisor is gone."""
    line = json.dumps({"ready": report.ready, "failed": report.failed}) + "\n"
    try:
        os.write(int(os.environ[REPORT_ENV]), line.encode())
    except BrokenPipeError:
        return


class Supervisor:
    """Starts one driver and stays until it and all its descendants have ended.

    A first SIGINT tells the driver to stop and allows it stop_timeout_s; a first SIGTERM or SIGHUP allows open
    requests drain_timeout_s besides. A second signal, or the end of that time, kills everything below this
    process.
    """

    def __init__(self, *, stop_timeout_s: float, drain_timeout_s: float, on_ready: Callable[[str], None]) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready
        self._ready = False
        self._failure: str | None = None
        self._kill_at: float | None = None
        self._killed = False
        self._unread_report = b""

    def run(self, command: Sequence[str], *, stdin: bytes) -> tuple[int, str | None]:
        """Returns (exit code, reason of failure). stdin must fit a pipe.

        Exit code 0: it served and ended when asked to; INTERRUPTED: it was asked before it served, or had to be
        killed; 1: it failed, with a reason.
        """
        adopt_orphans()
        selector = selectors.DefaultSelector()
        selector.register(_signal_pipe(), selectors.EVENT_READ, self._read_signals)
        report_fd, driver_report_fd = os.pipe()
        selector.register(report_fd, selectors.EVENT_READ, self._read_reports)
        self._driver = _start(command, stdin, driver_report_fd)
        os.close(driver_report_fd)
        try:
            self._wait_for_driver(selector)
            # What came after the last time we looked; the pipe is at its end once no process holds it.
            self._read_reports(report_fd)
        finally:
            self._sweep()
        return self._result()

    def _wait_for_driver(self, selector: selectors.BaseSelector) -> None:
        while self._driver.poll() is None:
            left_s = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())
            if left_s == 0.0:
                self._killed = True
                return
            for key, _ in selector.select(left_s):
                if not key.data(key.fd):
                    selector.unregister(key.fd)

    def _read_signals(self, fd: int) -> bool:
        for number in os.read(fd, 64):
            if number in STOP_SIGNALS:
                self._stop(drain=number != signal.SIGINT)
        return True

    def _stop(self, *, drain: bool) -> None:
        now = time.monotonic()
        if self._kill_at is not None:
            self._kill_at = now
            return
        print("arriero serve: stopping; once more to kill", file=sys.stderr, flush=True)
        self._driver.send_signal(signal.SIGTERM if drain else signal.SIGINT)
        self._kill_at = now + self._stop_timeout_s + (self._drain_timeout_s if drain else 0.0)

    def _read_reports(self, fd: int) -> bool:
        """False at the end of the pipe."""
        os.set_blocking(fd, False)
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        *lines, self._unread_report = (self._unread_report + data).split(b"\n")
        for line in lines:
            self._take(Report(**json.loads(line)))
        return bool(data)

    def _take(self, report: Report) -> None:
        if report.failed is not None:
            self._failure = report.failed
        if report.ready is not None:
            self._ready = True
            self._on_ready(report.ready)

    def _sweep(self) -> None:
        left = end_descendants(SWEEP_TIMEOUT_S)
        if left:
            print(f"arriero serve: processes that cannot be killed: {left}", file=sys.stderr, flush=True)

    def _result(self) -> tuple[int, str | None]:
        if self._failure is not None:
            return 1, self._failure
        if self._kill_at is not None:
            return (0, None) if self._ready and not self._killed else (INTERRUPTED, None)
        return 1, f"Ray's driver process ended unexpectedly ({_ending(self._driver.returncode)})"


def _ending(returncode: int | None) -> str:
    if returncode is None:
        return "killed"
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"


def _signal_pipe() -> int:
    """A file descriptor that brings the numbers of the signals this process gets."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd)
    for number in (*STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    return read_fd


def _start(command: Sequence[str], stdin: bytes, report_fd: int) -> subprocess.Popen[bytes]:
    driver = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        pass_fds=(report_fd,),
        start_new_session=True,
        env={**os.environ, REPORT_ENV: str(report_fd)},
    )
    assert driver.stdin is not None
    with driver.stdin as pipe:
        pipe.write(stdin)
    return driver
