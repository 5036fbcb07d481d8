"""SIGTERM to a process that others still need."""

from __future__ import annotations

import signal
import subprocess
import sys

SCRIPT = """
import signal
from experts.leaving_signal import LeavingSignal
leaving = LeavingSignal()
print(leaving.has_come, flush=True)
while not leaving.has_come:
    signal.sigtimedwait([], 0.01)
print(leaving.has_come, flush=True)
signal.pause()
"""


def test_the_first_one_is_noted_and_the_second_one_ends_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "False\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "True\n"
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
