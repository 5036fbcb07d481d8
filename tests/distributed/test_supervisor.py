"""The supervisor against real processes: a small script plays the driver that owns Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.launch.processes import descendants

WAIT_S = 20.0

SUPERVISOR = """
import sys
from cluster.launch.supervisor import Supervisor
def say(line): print(line, flush=True)
supervisor = Supervisor(stop_timeout_s=float(sys.argv[2]), drain_timeout_s=60.0, on_ready=say)
code, failure = supervisor.run([sys.executable, "-c", sys.argv[1]], stdin=b"the spec")
print("failure:", failure, flush=True)
sys.exit(code)
"""

DRIVER_PRELUDE = """
import os, signal, subprocess, sys, time
from cluster.launch.processes import adopt_orphans
from cluster.launch.supervisor import Report, send_report
from router.parent_death import end_with_parent
spec = sys.stdin.read()

def orphan():
    "A process in its own session whose parent is gone, deaf to what can be ignored."
    code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
    code += "if os.fork(): os._exit(0)\\n"
    subprocess.run([sys.executable, "-c", code + "os.setsid(); time.sleep(60)"], check=True)
"""


@pytest.fixture
def supervise() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(driver: str, stop_timeout_s: float = 60.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SUPERVISOR, DRIVER_PRELUDE + textwrap.dedent(driver), str(stop_timeout_s)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def living(pids: list[int]) -> list[int]:
    """Those that run; a zombie of another parent counts as gone."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


SERVES_AND_STOPS = """
    orphan()
    print("noise on stdout")
    def stop(number, frame):
        print("driver got", signal.Signals(number).name, flush=True)
        sys.exit(0)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    send_report(Report(ready="ready " + spec))
    while True: time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "told"),
    [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_signal_stops_the_driver_and_ends_orphans(
    supervise: Callable[..., subprocess.Popen[str]], sent: signal.Signals, told: str
) -> None:
    process = supervise(SERVES_AND_STOPS)
    assert read_line(process) == "ready the spec"
    below = descendants(process.pid)
    assert len(below) == 2, "the driver and the orphan, which the supervisor has adopted"
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert f"driver got {told}" in stderr
    assert "noise on stdout" in stderr
    assert stdout == "failure: None\n", "stdout is the supervisor's alone"
    assert living(below) == []


DEAF = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphan()
    send_report(Report(ready="ready"))
    while True: time.sleep(60)
"""


def test_a_second_signal_kills_a_driver_that_does_not_stop(supervise: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervise(DEAF)
    assert read_line(process) == "ready"
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "once more" in process.stderr.readline()
    assert living(below) == below
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert living(below) == []


def test_a_driver_that_does_not_stop_in_time_is_killed(supervise: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervise(DEAF, stop_timeout_s=0.2)
    assert read_line(process) == "ready"
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert living(below) == []


def test_a_reported_failure_is_returned_and_its_orphans_end(supervise: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervise("orphan()\nsend_report(Report(failed='the KV cache does not fit'))\nsys.exit(1)")
    stdout, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert stdout == "failure: the KV cache does not fit\n"
    assert descendants(process.pid) == []


def test_a_driver_that_is_killed_counts_as_a_failure(supervise: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervise("orphan()\nsend_report(Report(ready='ready'))\nos.kill(os.getpid(), signal.SIGKILL)")
    stdout, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "SIGKILL" in stdout


def test_a_signal_before_it_is_ready_stops_it_without_a_failure(
    supervise: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    mark = tmp_path / "started"
    process = supervise(
        f"signal.signal(signal.SIGINT, lambda *_: sys.exit(0))\nopen({str(mark)!r}, 'w')\nwhile True: time.sleep(60)"
    )
    wait_until(mark.exists)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert stdout == "failure: None\n"


def test_a_killed_supervisor_takes_everything_with_it(supervise: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervise(
        """
        from cluster.launch.processes import end_descendants
        adopt_orphans()
        orphan()
        signal.signal(signal.SIGINT, lambda *_: (end_descendants(10.0), os._exit(0)))
        end_with_parent(os.getppid(), signal.SIGINT)
        send_report(Report(ready="ready"))
        while True: time.sleep(60)
        """
    )
    assert read_line(process) == "ready"
    below = descendants(process.pid)
    assert len(below) == 2
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: living(below) == [])
