"""The engine process as its replica holds it: started, spoken to, heard, and ended without fail."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

import msgspec

from router.messages import Failed, FromEngine, Shutdown, ToEngine, decode_from_engine, encode

logger = logging.getLogger(__name__)

# From the end of the pipe to the end of the process: it has hung up, so nothing holds it but the kernel.
_EXIT_S = 5.0


class EngineChild:
    """A running engine process. Two threads serve it: one starts it, hears it and sees it end, one speaks to it.

    The kernel ends the process with the thread that started it (router/parent_death.py), which is why that thread
    is ours and stays until the process has ended.
    """

    def __init__(
        self,
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[str], None],
        module: str = "router.process",
    ) -> None:
        """Starts the process; returns once it runs. Raises OSError when it cannot be started.

        on_message and then, once, on_death with the reason are called from a thread of this object and must not
        wait. module is what `python -m` runs.
        """
        self._on_message = on_message
        self._on_death = on_death
        self._outbox: SimpleQueue[ToEngine | None] = SimpleQueue()
        self._ended = threading.Event()
        self._failure: str | None = None
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(target=self._attend, args=(module, started), name="engine", daemon=True).start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Never waits. What is sent to a process that has ended is lost; on_death tells."""
        self._outbox.put(message)

    def close(self, timeout_s: float) -> None:
        """Asks the process to end, then tells it to, then kills it, each after timeout_s. Idempotent."""
        self.send(Shutdown())
        for sent_signal in (signal.SIGTERM, signal.SIGKILL):
            if self._ended.wait(timeout_s):
                return
            logger.warning("engine process %d has not ended in %s s: %s", self.pid, timeout_s, sent_signal.name)
            self._process.send_signal(sent_signal)
        self._ended.wait(timeout_s)

    def _attend(self, module: str, started: Future[subprocess.Popen[bytes]]) -> None:
        ours, theirs = Pipe()
        try:
            process = _spawn(module, theirs)
        except OSError as error:
            ours.close()
            started.set_exception(error)
            return
        finally:
            theirs.close()
        started.set_result(process)
        writer = threading.Thread(target=self._write, args=(ours,), name="to engine", daemon=True)
        writer.start()
        self._read(ours)
        reason = self._collect(process)
        self._outbox.put(None)
        writer.join()
        ours.close()
        self._on_death(self._failure or reason)
        self._ended.set()

    def _read(self, pipe: Connection) -> None:
        try:
            while True:
                message = decode_from_engine(pipe.recv_bytes())
                if isinstance(message, Failed):
                    self._failure = message.error
                self._on_message(message)
        except (EOFError, OSError):
            return
        except msgspec.DecodeError as error:
            self._failure = f"the engine process sent no message of ours: {error}"

    def _write(self, pipe: Connection) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                pipe.send_bytes(encode(message))
            except OSError:
                return

    def _collect(self, process: subprocess.Popen[bytes]) -> str:
        """Waits for the process and returns how it ended."""
        try:
            status = process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"engine process {process.pid} ended with {how}"


def _spawn(module: str, pipe: Connection) -> subprocess.Popen[bytes]:
    """The child inherits this end of the pipe, stdout and stderr, and nothing else."""
    command = [sys.executable, "-m", module, str(pipe.fileno()), str(os.getpid())]
    return subprocess.Popen(command, pass_fds=[pipe.fileno()], stdin=subprocess.DEVNULL)
