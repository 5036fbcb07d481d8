"""Looking, sleeping and being woken."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from experts.native.lane_kernels import LaneKernels, lane_kernels
from experts.transport.base import Lines
from experts.transport.shm_port import Announcing, Port
from experts.transport.waiting import NEWS, READ, WRITE, Poller, WaitPolicy, wait_policy


class End:
    """One end of a pair of sockets, with memory between them."""

    def __init__(self, sock: socket.socket, memory: memoryview, *, is_router: bool) -> None:
        self.sock = sock
        self.port = Port(memory, sock, Announcing.MEMORY, is_router=is_router)
        lines = self.port.lines()
        assert lines is not None
        self._asleep = ctypes.c_ubyte.from_address(lines.asleep)

    def fileno(self) -> int:
        return self.sock.fileno()

    def has_news(self) -> bool:
        return self.port.has_news()

    def fall_asleep(self) -> None:
        self.port.fall_asleep()

    def is_asleep(self) -> bool:
        """What the other end sees of it."""
        return bool(self._asleep.value)

    def lines(self) -> Lines | None:
        return self.port.lines()

    def wake_up(self) -> None:
        self.port.wake_up()


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    memory = memoryview(bytearray(4096))
    with left, right:
        yield End(left, memory, is_router=True), End(right, memory, is_router=False)


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> LaneKernels | None:
    if request.param == "plain":
        return None
    return lane_kernels() or pytest.skip("no compiled kernels here")


def poller_of(end: End, spin_s: float, kernels: LaneKernels | None = None) -> Poller:
    poller = Poller(WaitPolicy(spin_s=spin_s), kernels)
    poller.add(end, READ, lambda _events: None)
    return poller


def test_a_wait_ends_with_its_time(ends: tuple[End, End], kernels: LaneKernels | None) -> None:
    poller = poller_of(ends[0], 0.001, kernels)
    started_at = time.monotonic()
    assert poller.wait(0.02) == []
    assert time.monotonic() - started_at >= 0.02
    assert poller.wait(0.0) == []


def test_news_in_memory_are_seen_without_a_ring(ends: tuple[End, End], kernels: LaneKernels | None) -> None:
    mine, other = ends
    poller = poller_of(mine, 0.0, kernels)
    other.port.publish()
    [(_on_ready, events)] = poller.wait(10)
    assert events == NEWS
    with pytest.raises(BlockingIOError):
        mine.sock.recv(1)


@pytest.mark.parametrize("spin_s", [0.0, 0.0005])
def test_who_sleeps_is_rung_up_and_who_looks_is_not(
    ends: tuple[End, End], kernels: LaneKernels | None, spin_s: float
) -> None:
    mine, other = ends
    poller = poller_of(mine, spin_s, kernels)

    def publish() -> None:
        deadline = time.monotonic() + 10
        while not mine.is_asleep() and time.monotonic() < deadline:
            time.sleep(0.001)
        other.port.publish()

    thread = threading.Thread(target=publish)
    thread.start()
    ready = poller.wait(10)
    thread.join()
    assert READ in [events for _on_ready, events in ready]
    mine.port.hear()
    assert mine.port.num_news() == 1
    mine.port.take()
    # Awake again: the next one is not rung for.
    other.port.publish()
    with pytest.raises(BlockingIOError):
        mine.sock.recv(1)


def test_looking_is_left_out_after_waits_that_it_could_not_have_saved(ends: tuple[End, End]) -> None:
    mine, _other = ends
    poller = poller_of(mine, spin_s=0.02)
    looks = 0

    def has_news() -> bool:
        nonlocal looks
        looks += 1
        return False

    mine.has_news = has_news  # type: ignore[method-assign]

    def looked(wait_s: float) -> bool:
        """More than once before sleeping, and once with the flag up."""
        nonlocal looks
        before = looks
        poller.wait(wait_s)
        return looks - before > 2

    # One miss changes nothing; each further one in a row costs more waits without looking.
    assert [looked(0.03) for _ in range(12)] == [True, True, *[False] * 2, True, *[False] * 6, True]
    # A wait that looking would have saved ends that.
    assert not looked(0.001)
    assert looked(0.03)


@pytest.mark.parametrize("spin_s", [0.0, 0.5])
def test_a_signal_is_heard_while_waiting(ends: tuple[End, End], kernels: LaneKernels | None, spin_s: float) -> None:
    poller = poller_of(ends[0], spin_s, kernels)
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    try:
        sender = threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1))
        sender.start()
        deadline = time.monotonic() + 30
        while not heard and time.monotonic() < deadline:
            poller.wait(1.0)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard


def test_an_end_that_comes_to_have_its_news_in_memory_is_looked_at_once_the_poller_knows(
    ends: tuple[End, End], kernels: LaneKernels | None
) -> None:
    mine, other = ends
    lines, mine.lines = mine.lines, lambda: None  # type: ignore[method-assign]
    has_news, mine.has_news = mine.has_news, lambda: False  # type: ignore[method-assign]
    poller = poller_of(mine, 0.0, kernels)
    other.port.publish()
    assert poller.wait(0.0) == []
    mine.lines, mine.has_news = lines, has_news  # type: ignore[method-assign]
    poller.renew()
    [(_on_ready, events)] = poller.wait(0.0)
    assert events == NEWS


def test_the_end_of_the_other_end_wakes_up(ends: tuple[End, End], kernels: LaneKernels | None) -> None:
    mine, other = ends
    poller = poller_of(mine, 0.0, kernels)
    other.sock.close()
    [(_on_ready, events)] = poller.wait(10)
    assert events & READ
    mine.port.hear()
    assert mine.port.closed == "closed by the other end"


def test_events_change_and_an_end_that_is_removed_is_silent(ends: tuple[End, End], kernels: LaneKernels | None) -> None:
    mine, other = ends
    poller = poller_of(mine, 0.0, kernels)
    poller.change(mine, READ | WRITE)
    assert [events for _on_ready, events in poller.wait(0.01)] == [WRITE]
    poller.change(mine, 0)
    other.port.publish()
    other.sock.send(b"\1")
    assert poller.wait(0.01) == []
    poller.change(mine, READ)
    assert {events for _on_ready, events in poller.wait(0.01)} == {NEWS, READ}
    poller.remove(mine)
    poller.remove(mine)
    assert poller.wait(0.01) == []


def test_the_policy_follows_the_cores_and_can_be_said() -> None:
    cores = os.sched_getaffinity(0)
    assert (wait_policy().spin_s > 0) == (len(cores) > 1)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert wait_policy().spin_s == 0
    finally:
        os.sched_setaffinity(0, cores)
    assert wait_policy(250).spin_s == pytest.approx(250e-6)
    with pytest.raises(ValueError, match="spin_s must be between 0 and 1, got -1"):
        WaitPolicy(spin_s=-1)


def test_a_port_counts_past_the_end_of_its_byte(ends: tuple[End, End]) -> None:
    mine, other = ends
    for _ in range(600):
        entry = other.port.next_entry
        other.port.publish()
        assert mine.port.num_news() == 1
        assert mine.port.take() == entry
        assert not mine.has_news()
