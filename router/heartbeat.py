"""The engine process's sign of life: a thread of its own tells how the engine does, also while a step hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from router.messages import EngineStats, Heartbeat


class HeartbeatThread:
    """The engine loop reports to it; it reports to the replica every interval_s. Statistics are the loop's own,
    handed over between steps: nothing of the engine is touched from here."""

    def __init__(self, *, send: Callable[[Heartbeat], None], stats: EngineStats, interval_s: float = 0.5) -> None:
        self._send = send
        self._interval_s = interval_s
        self._stats = stats
        self._stats_time = time.monotonic()
        self._step_began: float | None = None
        self._step = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_due(self) -> bool:
        """Half an interval has gone since the last ``update``."""
        return time.monotonic() - self._stats_time >= self._interval_s / 2

    def update(self, stats: EngineStats) -> None:
        self._stats = stats
        self._stats_time = time.monotonic()

    def step_begins(self) -> None:
        self._step += 1
        self._step_began = time.monotonic()

    def step_ended(self) -> None:
        self._step_began = None

    def stop(self) -> None:
        """Idempotent. No heartbeat leaves afterwards."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            began = self._step_began
            step_s = 0.0 if began is None else time.monotonic() - began
            self._send(Heartbeat(stats=self._stats, step_s=step_s, step=self._step))
