"""The engine process: `python -m router.process FD PARENT_PID`, started by router.engine_child and by nothing else.

FD is one end of a socket pair that carries framed messages (router/messages.py). The process ends when it is told
to (Shutdown), when a step fails (after Failed), and when its parent ends, however that comes about.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NoReturn

import msgspec

from experts.logs import LogSettings, configure_logging
from router.engine_loop import BuiltEngine, EngineLoop
from router.heartbeat import HeartbeatThread
from router.messages import Failed, FromEngine, Ready, Shutdown, Start, ToEngine, decode_to_engine, encode
from router.parent_death import end_with_parent
from router.token_links import TokenLinks

logger = logging.getLogger(__name__)


BuildEngine = Callable[[Start], BuiltEngine]


class ReplicaPipe:
    """This process's end of the pipe. Any thread may send; one thread reads. Without a replica the process ends:
    the main thread may be deep in a step that nobody waits for any more."""

    def __init__(self, fd: int) -> None:
        self.inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._connection = Connection(fd)
        self._send_lock = threading.Lock()
        threading.Thread(target=self._read, name="read pipe", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        data = encode(message)
        try:
            with self._send_lock:
                self._connection.send_bytes(data)
        except OSError as error:
            self._end(f"writing to the replica failed: {error}")

    def _read(self) -> NoReturn:
        try:
            while True:
                self.inbox.put(decode_to_engine(self._connection.recv_bytes()))
        except (EOFError, OSError) as error:
            self._end(f"the replica has hung up {error}")
        except msgspec.DecodeError as error:
            self._end(f"the replica sent no message of ours: {error}")

    def _end(self, reason: str) -> NoReturn:
        logger.warning("%s; this engine process ends", reason.strip())
        os._exit(1)


def serve(pipe: ReplicaPipe, build: BuildEngine) -> int:
    """Builds the engine that the replica asks for and runs it. Returns the exit status."""
    start = pipe.inbox.get()
    if isinstance(start, Shutdown):
        return 0
    assert isinstance(start, Start), f"the first message must be Start, not {type(start).__name__}"
    configure_logging(start.settings.log, process=f"{start.router_id}-engine")
    try:
        built = build(start)
    except Exception as error:
        # What our own checks say speaks for itself.
        logger.error("the engine cannot start: %s", describe(error), exc_info=not is_expected(error))
        pipe.send(Failed(error=describe(error)))
        return 1
    try:
        run(pipe, start, built)
    except Exception as error:
        logger.exception("the engine has failed")
        pipe.send(Failed(error=f"a step failed: {describe(error)}"))
        return 1
    return 0


def run(pipe: ReplicaPipe, start: Start, built: BuiltEngine) -> None:
    """From Ready to Shutdown. Raises what a step raises."""
    links = TokenLinks(router_id=start.router_id, secret=start.secret)
    heartbeat = HeartbeatThread(send=pipe.send, stats=built.engine.stats())
    loop = EngineLoop(
        engine=built.engine,
        inbox=pipe.inbox,
        send=pipe.send,
        links=links,
        heartbeat=heartbeat,
        epochs=built.epochs,
    )
    pipe.send(Ready(pid=os.getpid(), capacity=built.capacity))
    try:
        loop.run()
    finally:
        heartbeat.stop()
        built.close()


def describe(error: Exception) -> str:
    """A sentence for the operator. Our own errors speak for themselves; others need their type."""
    return str(error) if is_expected(error) else f"{type(error).__name__}: {error}"


def is_expected(error: Exception) -> bool:
    """Whether the error is of a kind that our own checks raise, with a sentence."""
    return isinstance(error, (ValueError, OSError)) and bool(str(error))


def enter(fd: int, parent_pid: int) -> ReplicaPipe:
    """What must be in place before anything slow begins."""
    # Ctrl-C reaches the whole foreground group; who started us decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent_pid)
    faulthandler.enable()
    # Until the replica says how.
    configure_logging(LogSettings(), process="engine")
    return ReplicaPipe(fd)


def build_real_engine(start: Start) -> BuiltEngine:
    # Importing torch takes seconds, in which a parent that dies must already be noticed.
    from router.engine_builder import build_engine

    return build_engine(start)


def main() -> int:
    return serve(enter(fd=int(sys.argv[1]), parent_pid=int(sys.argv[2])), build_real_engine)


if __name__ == "__main__":
    sys.exit(main())
