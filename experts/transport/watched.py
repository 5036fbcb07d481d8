"""One pass of waiting over what a poller watches: a look, a spin, a sleep; see waiting.py. In two forms, alike."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from experts.native.lane_kernels import LaneKernels, WaitedEnds
from experts.transport.base import InMemory
from experts.transport.memory_order import FullBarrier

# News in memory; not one of epoll's bits.
NEWS = 1 << 40

Ready = Callable[[int], object]


class Waited(NamedTuple):
    """waited_s: 0.0 where the first look was enough."""

    ready: list[tuple[Ready, int]]
    waited_s: float


class Watch(Protocol):
    def wait(self, spin_s: float, timeout_s: float) -> Waited:
        """First looking, for spin_s at most, then asleep; timeout_s in all, and 0 for one look. May end before, with
        nothing, for a signal."""


class PlainWatch:
    """Any ends, on any machine."""

    def __init__(
        self, epoll: select.epoll, sockets: dict[int, Ready], in_memory: Sequence[tuple[InMemory, Ready]]
    ) -> None:
        """sockets: who is to be told, by file descriptor."""
        self._epoll = epoll
        self._sockets = sockets
        self._in_memory = in_memory
        self._barrier = FullBarrier()

    def wait(self, spin_s: float, timeout_s: float) -> Waited:
        ready = self._look(0)
        if ready or timeout_s <= 0:
            return Waited(ready, 0.0)
        started_at = time.monotonic()
        ready = self._spin(started_at + min(timeout_s, spin_s))
        if not ready:
            ready = self._sleep(started_at + timeout_s)
        return Waited(ready, time.monotonic() - started_at)

    def _look(self, timeout_s: float) -> list[tuple[Ready, int]]:
        ready = [(on_ready, NEWS) for end, on_ready in self._in_memory if end.has_news()]
        for fd, events in self._epoll.poll(0 if ready else timeout_s):
            ready.append((self._sockets[fd], events))
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


class NativeWatch:
    """The same in one call that runs without Python's lock. For ends whose lines are known."""

    def __init__(
        self,
        kernels: LaneKernels,
        epoll: select.epoll,
        sockets: dict[int, Ready],
        in_memory: Sequence[tuple[InMemory, Ready]],
    ) -> None:
        self._epoll = epoll.fileno()
        self._sockets = sockets
        known = [(lines, on_ready) for end, on_ready in in_memory if (lines := end.lines()) is not None]
        self._on_news = [on_ready for _lines, on_ready in known]
        self._ends = WaitedEnds(kernels, [lines for lines, _on_ready in known])

    def wait(self, spin_s: float, timeout_s: float) -> Waited:
        news, events, waited_s = self._ends.wait(self._epoll, spin_s=spin_s, timeout_s=timeout_s)
        ready = [(self._on_news[number], NEWS) for number in news]
        for fd, bits in events:
            ready.append((self._sockets[fd], bits))
        return Waited(ready, waited_s)
