"""Looking, sleeping and being woken."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from experts.transport.shm_port import Announcing, Port
from experts.transport.waiting import NEWS, READ, WRITE, Poller, WaitPolicy, wait_policy


class End:
    """One end of a pair of sockets, with memory between them."""

    def __init__(self, sock: socket.socket, memory: memoryview, *, is_router: bool) -> None:
        self.sock = sock
        self.port = Port(memory, sock, Announcing.MEMORY, is_router=is_router)
        self.sleeps = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def has_news(self) -> bool:
        return self.port.has_news()

    def fall_asleep(self) -> None:
        self.sleeps += 1
        self.port.fall_asleep()

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


def poller_of(end: End, spin_s: float) -> Poller:
    poller = Poller(WaitPolicy(spin_s=spin_s))
    poller.add(end, READ, lambda _events: None)
    return poller


def test_a_wait_ends_with_its_time(ends: tuple[End, End]) -> None:
    poller = poller_of(ends[0], spin_s=0.001)
    started_at = time.monotonic()
    assert poller.wait(0.02) == []
    assert time.monotonic() - started_at >= 0.02
    assert poller.wait(0.0) == []


def test_news_in_memory_are_seen_without_a_ring(ends: tuple[End, End]) -> None:
    mine, other = ends
    poller = poller_of(mine, spin_s=0.0)
    other.port.publish()
    [(_on_ready, events)] = poller.wait(10)
    assert events == NEWS
    with pytest.raises(BlockingIOError):
        mine.sock.recv(1)


@pytest.mark.parametrize("spin_s", [0.0, 0.0005])
def test_who_sleeps_is_rung_up_and_who_looks_is_not(ends: tuple[End, End], spin_s: float) -> None:
    mine, other = ends
    poller = poller_of(mine, spin_s)

    def publish() -> None:
        deadline = time.monotonic() + 10
        while not mine.sleeps and time.monotonic() < deadline:
            time.sleep(0.001)
        other.port.publish()

    thread = threading.Thread(target=publish)
    thread.start()
    ready = poller.wait(10)
    thread.join()
    assert ready[0][1] & READ
    mine.port.hear()
    assert mine.port.num_news() == 1
    mine.port.take()
    # Awake again: the next one is not rung for.
    other.port.publish()
    with pytest.raises(BlockingIOError):
        mine.sock.recv(1)


def test_looking_is_left_out_after_a_wait_that_it_could_not_have_saved(ends: tuple[End, End]) -> None:
    mine, _other = ends
    poller = poller_of(mine, spin_s=0.1)
    looks = 0

    def count(wait_s: float) -> int:
        nonlocal looks
        before = looks
        poller.wait(wait_s)
        return looks - before

    def has_news() -> bool:
        nonlocal looks
        looks += 1
        return False

    mine.has_news = has_news  # type: ignore[method-assign]
    assert count(0.2) > 2
    # The last wait was longer than any look would have been: once before, once with the flag up.
    assert count(0.2) == 2
    assert count(0.001) == 2
    # That one was short.
    assert count(0.2) > 2


def test_the_end_of_the_other_end_wakes_up(ends: tuple[End, End]) -> None:
    mine, other = ends
    poller = poller_of(mine, spin_s=0.0)
    other.sock.close()
    [(_on_ready, events)] = poller.wait(10)
    assert events & READ
    mine.port.hear()
    assert mine.port.closed == "closed by the other end"


def test_events_change_and_an_end_that_is_removed_is_silent(ends: tuple[End, End]) -> None:
    mine, other = ends
    poller = poller_of(mine, spin_s=0.0)
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
