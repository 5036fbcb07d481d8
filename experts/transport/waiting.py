"""How both ends of lanes wait: first looking, then asleep.

    look      again and again, for at most spin_s, letting other processes run in between
    sleep     in the kernel, until a socket has something to say or the time is over

Looking saves the two context switches and the system calls of a wake-up, and costs a core that others may need: a
router that looks while its shards compute on the same cores only delays itself. So it is left out where it does not
pay: after two waits in a row that were longer than spin_s for 2 waits, after three for 6, and so on up to 62. That one
miss changes nothing matters: where each end sleeps because the other one did, neither would ever look again.

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
from dataclasses import dataclass

from experts.native.lane_kernels import LaneKernels, lane_kernels
from experts.transport.base import InMemory, Pollable
from experts.transport.watched import NEWS, NativeWatch, PlainWatch, Ready, Watch

__all__ = ["NEWS", "READ", "WRITE", "Poller", "WaitPolicy", "make_poller", "wait_policy"]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

# Chosen on two cores, see experts/README.md.
_SPIN_S = 300e-6
# After so many misses in a row one wait of 63 is begun by looking.
_MAX_MISSES = 6


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


@dataclass(slots=True, eq=False)
class _Watched:
    end: Pollable
    events: int
    on_ready: Ready


class Poller:
    """Waits for any of many ends; belongs to one thread."""

    def __init__(self, policy: WaitPolicy, kernels: LaneKernels | None = None) -> None:
        """kernels: None for the plain form; ``make_poller`` chooses."""
        self._spin_s = policy.spin_s
        self._kernels = kernels
        # Waits in a row for which looking was too short, and how many are left to go without.
        self._num_misses = 0
        self._num_to_skip = 0
        self._epoll = select.epoll()
        self._watched: dict[int, _Watched] = {}
        self._on_socket: dict[int, Ready] = {}
        self._watch = self._new_watch()

    def add(self, end: Pollable, events: int, on_ready: Ready) -> None:
        """on_ready is what ``wait`` returns for it. events: see ``change``."""
        self._watched[end.fileno()] = _Watched(end, 0, on_ready)
        self._on_socket[end.fileno()] = on_ready
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
        self.renew()

    def renew(self) -> None:
        """To be called also when an end has come to have its news in memory."""
        self._watch = self._new_watch()

    def remove(self, end: Pollable) -> None:
        """Call it before the end is closed. Does nothing for one that is not there."""
        if end.fileno() in self._watched:
            self.change(end, 0)
            del self._watched[end.fileno()], self._on_socket[end.fileno()]

    def wait(self, timeout_s: float) -> list[tuple[Ready, int]]:
        """Who has something, and of what kind; an end may come twice. Empty when the time was over before, or a
        signal came.

        Whoever acts on it must expect that an earlier one of the list has removed a later one.
        """
        skips = self._num_to_skip > 0
        ready, waited_s = self._watch.wait(0.0 if skips else self._spin_s, timeout_s)
        if waited_s:
            self._learn(waited_s)
        return ready

    def _learn(self, waited_s: float) -> None:
        if waited_s <= self._spin_s:
            self._num_misses = self._num_to_skip = 0
        elif self._num_to_skip:
            self._num_to_skip -= 1
        else:
            self._num_misses = min(self._num_misses + 1, _MAX_MISSES)
            self._num_to_skip = (1 << self._num_misses) - 2

    def close(self) -> None:
        self._watched.clear()
        self._on_socket.clear()
        self._watch = PlainWatch(self._epoll, {}, [])
        self._epoll.close()

    def _new_watch(self) -> Watch:
        in_memory = [
            (watched.end, watched.on_ready)
            for watched in self._watched.values()
            if watched.events & READ and isinstance(watched.end, InMemory)
        ]
        if self._kernels is None:
            return PlainWatch(self._epoll, self._on_socket, in_memory)
        return NativeWatch(self._kernels, self._epoll, self._on_socket, in_memory)


def make_poller(policy: WaitPolicy | None) -> Poller:
    """policy: None is what suits the host. Waits with compiled kernels where there are some."""
    return Poller(policy or wait_policy(), lane_kernels())
