"""How both ends of lanes wait: first looking, then asleep.

    look      again and again, for at most spin_s, letting other processes run in between
    sleep     in the kernel, until a socket has something to say or the time is over

Looking saves the two context switches and the system calls of a wake-up, and costs a core that others may need: a
router that looks while its shards compute on the same cores only delays itself. So it is done only when it is likely
to pay: when the wait before this one was shorter than spin_s.

Ends whose news lie in memory (shm) are asked directly. Before sleeping they must be told to ring at their socket,
and the other end must not miss that:

    waiter                                 publisher
    asleep := 1                            rows, then entry, then count := count + 1
    barrier                                barrier
    count unchanged? then sleep            asleep = 1? then ring

Both barriers order a store before a load (memory_order.py), so at least one of the two sees what the other has
written: either the waiter sees the new count and does not sleep, or the publisher sees that it sleeps and rings. A
ring that comes too late is a byte that is read and means nothing.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from experts.transport.base import InMemory, Pollable
from experts.transport.memory_order import FullBarrier

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
# News in memory; not one of epoll's bits.
NEWS = 1 << 40

# Chosen on two cores, see experts/README.md.
_SPIN_S = 100e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy:
    """spin_s: how long to look before sleeping, 0 for not at all."""

    spin_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.spin_s <= 1:
            raise ValueError(f"spin_s must be between 0 and 1, got {self.spin_s}")


def wait_policy(spin_us: int | None = None) -> WaitPolicy:
    """None: by the cores that this process may use; with one alone, who looks keeps the other end from working."""
    if spin_us is not None:
        return WaitPolicy(spin_s=spin_us / 1e6)
    return WaitPolicy(spin_s=_SPIN_S if len(os.sched_getaffinity(0)) > 1 else 0.0)


Ready = Callable[[int], object]


@dataclass(slots=True, eq=False)
class _Watched:
    end: Pollable
    events: int
    on_ready: Ready


class Poller:
    """Waits for any of many ends; belongs to one thread."""

    def __init__(self, policy: WaitPolicy) -> None:
        self._spin_s = policy.spin_s
        self._last_wait_s = 0.0
        self._epoll = select.epoll()
        self._watched: dict[int, _Watched] = {}
        self._in_memory: list[tuple[InMemory, Ready]] = []
        self._barrier = FullBarrier()

    def add(self, end: Pollable, events: int, on_ready: Ready) -> None:
        """on_ready is what ``wait`` returns for it. events: see ``change``."""
        self._watched[end.fileno()] = _Watched(end, 0, on_ready)
        self.change(end, events)

    def change(self, end: Pollable, events: int) -> None:
        """events: READ, WRITE, both or 0; READ includes NEWS."""
        watched = self._watched[end.fileno()]
        if watched.events == events:
            return
        if not watched.events:
            self._epoll.register(end, events)
        elif not events:
            self._epoll.unregister(end)
        else:
            self._epoll.modify(end, events)
        watched.events = events
        self._in_memory = [
            (watched.end, watched.on_ready)
            for watched in self._watched.values()
            if watched.events & READ and isinstance(watched.end, InMemory)
        ]

    def remove(self, end: Pollable) -> None:
        """Call it before the end is closed. Does nothing for one that is not there."""
        if end.fileno() in self._watched:
            self.change(end, 0)
            del self._watched[end.fileno()]

    def wait(self, timeout_s: float) -> list[tuple[Ready, int]]:
        """Who has something, and of what kind; an end may come twice. Empty when the time was over before.

        Whoever acts on it must expect that an earlier one of the list has removed a later one.
        """
        ready = self._look(0)
        if ready or timeout_s <= 0:
            return ready
        started_at = time.monotonic()
        if self._last_wait_s <= self._spin_s:
            ready = self._spin(started_at + min(timeout_s, self._spin_s))
        if not ready:
            ready = self._sleep(started_at + timeout_s)
        self._last_wait_s = time.monotonic() - started_at
        return ready

    def close(self) -> None:
        self._watched.clear()
        self._in_memory.clear()
        self._epoll.close()

    def _look(self, timeout_s: float) -> list[tuple[Ready, int]]:
        ready = [(on_ready, NEWS) for end, on_ready in self._in_memory if end.has_news()]
        for fd, events in self._epoll.poll(0 if ready else timeout_s):
            ready.append((self._watched[fd].on_ready, events))
        return ready

    def _spin(self, until: float) -> list[tuple[Ready, int]]:
        while time.monotonic() < until:
            os.sched_yield()
            ready = self._look(0)
            if ready:
                return ready
        return []

    def _sleep(self, until: float) -> list[tuple[Ready, int]]:
        for end, _on_ready in self._in_memory:
            end.fall_asleep()
        self._barrier()
        ready = self._look(max(0.0, until - time.monotonic()))
        for end, _on_ready in self._in_memory:
            end.wake_up()
        return ready
