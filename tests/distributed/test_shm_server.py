"""What a shard does with routers on its host that offer it bad memory, garble what lies there, or vanish."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from expert_fleet import HIDDEN, LAYERS, SECRET, Fleet, ThreadShard, wait_until
from lane_rows import random_rows, run
from raw_ends import identity, is_closed_by_peer, prove_as_router, read
from raw_shm import (
    ALL_SEALS,
    RawRouter,
    knock_unix,
    memfd,
    num_open_files,
    num_regions_mapped,
    open_shm_lane,
)

from experts import message, opening
from experts.lane import LaneDispatcher
from experts.message import Header, Kind, Refusal, request_header
from experts.placement import ShardId
from experts.server import ServerLimits, ShardServer
from experts.transport.shm_offer import READY, encode_offer, region_shape
from experts.transport.shm_port import Announcing
from experts.transport.shm_region import NUM_ENTRIES, RegionShape

LAYER = LAYERS[0]
ROWS = random_rows(40, top_k=2)
ROW_BYTES = HIDDEN * 4
MAX_ROWS = 4096
SHAPE = region_shape(max_rows=MAX_ROWS, row_bytes=ROW_BYTES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    limits = ServerLimits(opening_s=0.3, max_rows=MAX_ROWS)
    with Fleet(num_shards=1, limits=limits, transport="shm") as made:
        yield made


@pytest.fixture
def shard(fleet: Fleet) -> ThreadShard:
    shard = fleet.shards[ShardId("shard-0")]
    assert isinstance(shard, ThreadShard)
    return shard


@pytest.fixture
def server(shard: ThreadShard) -> ShardServer:
    return shard.server


@pytest.fixture
def unix_name(shard: ThreadShard) -> str:
    assert shard.address.unix_name is not None
    return shard.address.unix_name


@pytest.fixture
def lane(fleet: Fleet) -> LaneDispatcher:
    return fleet.dispatcher(timeout_s=10)


@pytest.fixture
def raw(unix_name: str) -> Iterator[RawRouter]:
    """A lane beside ``lane``."""
    router = open_shm_lane(unix_name, secret=SECRET, shard_id="shard-0", max_rows=MAX_ROWS, row_bytes=ROW_BYTES)
    yield router
    router.close()


def assert_serves(fleet: Fleet, lane: LaneDispatcher, step: int = 1) -> None:
    lane.begin_step(step)
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))


def request(lane_number: int, rows_per_expert: list[tuple[int, int]], **changed: int) -> Header:
    return request_header(identity(lane_number, **changed), rows_per_expert)


def test_a_lane_through_memory_is_counted_as_such(fleet: Fleet, server: ShardServer, lane: LaneDispatcher) -> None:
    assert_serves(fleet, lane)
    assert server.stats().lanes == {"shm": 1}
    assert lane.transports == {ShardId("shard-0"): "shm"}


@pytest.mark.parametrize("garbage", [b"\xa5" * 300, b"GET / HTTP/1.1\r\n" * 30], ids=["noise", "http"])
def test_garbage_instead_of_an_opening_is_refused_and_counted(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str, garbage: bytes
) -> None:
    with knock_unix(unix_name) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(garbage)
        assert is_closed_by_peer(sock)
    assert server.stats().refused == {"OpeningError": 1}
    assert_serves(fleet, lane)


def test_a_router_that_does_not_know_the_secret_is_refused(server: ShardServer, unix_name: str) -> None:
    with knock_unix(unix_name) as sock, pytest.raises(ConnectionResetError):
        prove_as_router(sock, secret=b"a guess", shard_id="shard-0")
    wait_until(lambda: server.stats().refused == {"OpeningError": 1})


@pytest.mark.parametrize("proves", [False, True], ids=["says nothing", "shares no memory"])
def test_who_does_not_come_to_the_end_of_the_opening_is_sent_away(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str, proves: bool
) -> None:
    with knock_unix(unix_name) as sock:
        if proves:
            prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        assert is_closed_by_peer(sock)
    assert server.stats().refused == {"opening timed out": 1}
    assert_serves(fleet, lane)


def _file(tmp_path: Path) -> int:
    path = tmp_path / "region"
    path.write_bytes(bytes(4096))
    os.truncate(path, SHAPE.num_bytes)
    return os.open(path, os.O_RDWR)


BAD_MEMORY: dict[str, Callable[[Path], int | None]] = {
    "none at all": lambda _path: None,
    "a pipe": lambda _path: os.pipe()[0],
    "an ordinary file": _file,
    "not sealed": lambda _path: memfd(SHAPE.num_bytes, seals=0),
    "may shrink": lambda _path: memfd(SHAPE.num_bytes, seals=ALL_SEALS & ~fcntl.F_SEAL_SHRINK),
    "may be sealed against writing": lambda _path: memfd(SHAPE.num_bytes, seals=ALL_SEALS & ~fcntl.F_SEAL_SEAL),
    "not writable": lambda _path: memfd(SHAPE.num_bytes, seals=ALL_SEALS | fcntl.F_SEAL_WRITE),
    "too small": lambda _path: memfd(SHAPE.num_bytes - 4096),
    "too large": lambda _path: memfd(SHAPE.num_bytes + 4096),
}


@pytest.mark.parametrize("make", BAD_MEMORY.values(), ids=BAD_MEMORY.keys())
def test_memory_that_is_not_as_it_should_be_is_refused(
    fleet: Fleet,
    server: ShardServer,
    lane: LaneDispatcher,
    unix_name: str,
    tmp_path: Path,
    make: Callable[[Path], int | None],
) -> None:
    before = num_open_files(), num_regions_mapped()
    with knock_unix(unix_name) as sock:
        prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        fd = make(tmp_path)
        socket.send_fds(sock, [encode_offer(SHAPE, Announcing.MEMORY)], [] if fd is None else [fd])
        assert is_closed_by_peer(sock)
    wait_until(lambda: sum(server.stats().refused.values()) == 1)
    if fd is not None:
        os.close(fd)
    assert num_regions_mapped() == before[1]
    assert_serves(fleet, lane)


def test_seals_that_miss_one_of_three_are_named(
    server: ShardServer, unix_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with knock_unix(unix_name) as sock:
        prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        fd = memfd(SHAPE.num_bytes, seals=fcntl.F_SEAL_GROW)
        socket.send_fds(sock, [encode_offer(SHAPE, Announcing.MEMORY)], [fd])
        os.close(fd)
        assert is_closed_by_peer(sock)
    wait_until(lambda: sum(server.stats().refused.values()) == 1)
    assert f"the region has {SHAPE.num_bytes} bytes and seals 0x4" in caplog.text


OFFERS: dict[str, bytes] = {
    "no offer": b"\xff" * len(encode_offer(SHAPE, Announcing.MEMORY)),
    "no rows": encode_offer(RegionShape(row_bytes=ROW_BYTES, num_rows=0), Announcing.MEMORY),
    "more rows than any request has": encode_offer(
        RegionShape(row_bytes=ROW_BYTES, num_rows=SHAPE.num_rows + 1), Announcing.MEMORY
    ),
    "as many rows as can be said": encode_offer(
        RegionShape(row_bytes=ROW_BYTES, num_rows=2**64 - 1), Announcing.MEMORY
    ),
    "other rows": encode_offer(RegionShape(row_bytes=ROW_BYTES + 4, num_rows=9), Announcing.MEMORY),
    "an unknown way to announce": encode_offer(SHAPE, 7),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
def test_an_offer_that_does_not_fit_is_refused(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str, offer: bytes
) -> None:
    with knock_unix(unix_name) as sock:
        prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        fd = memfd(SHAPE.num_bytes)
        socket.send_fds(sock, [offer], [fd])
        os.close(fd)
        assert is_closed_by_peer(sock)
    wait_until(lambda: server.stats().refused == {"OpeningError": 1})
    assert_serves(fleet, lane)


def test_memory_that_comes_with_the_answer_is_refused_and_closed(server: ShardServer, unix_name: str) -> None:
    with knock_unix(unix_name) as sock:
        challenge = read(sock, opening.CHALLENGE_BYTES)
        before = num_open_files()
        answer = opening.make_answer(challenge, secret=SECRET, nonce=bytes(32), shard_id="shard-0", lane_id="x")
        fd = memfd(SHAPE.num_bytes)
        socket.send_fds(sock, [answer], [fd])
        os.close(fd)
        assert is_closed_by_peer(sock)
        wait_until(lambda: server.stats().refused == {"OpeningError": 1})
        # The shard's end of this socket is gone as well.
        wait_until(lambda: num_open_files() == before - 1)


def _with(**changed: object) -> Callable[[int], bytes]:
    return lambda lane: message.encode_header(request(lane, [(0, 2), (3, 1)])._replace(**changed))


def _request(*rows_per_expert: tuple[int, int]) -> Callable[[int], bytes]:
    return lambda lane: message.encode_header(request(lane, list(rows_per_expert)))


BROKEN: dict[str, tuple[Callable[[int], bytes], list[tuple[int, int]], int]] = {
    "no header": (lambda _lane: b"\xff" * 48, [], 0),
    "nothing at all": (lambda _lane: bytes(48), [], 0),
    "more rows than allowed": (_request((0, MAX_ROWS + 1)), [(0, MAX_ROWS + 1)], 0),
    "the most rows a header can name": (_with(num_rows=2**32 - 1), [(0, 2**32 - 1)], 0),
    "no rows": (_with(num_rows=0), [(0, 2), (3, 1)], 0),
    "more slots than rows": (_with(num_slots=4), [(0, 2), (3, 1)], 0),
    "a reply": (_with(kind=Kind.REPLY), [(0, 2), (3, 1)], 0),
    "another lane's number": (lambda lane: _request((0, 2))(lane + 1), [(0, 2)], 0),
    "counts that add up to more": (_with(), [(0, 2), (3, 2)], 0),
    "a count of four billion": (_with(), [(0, 2**32 - 1), (3, 4)], 0),
    "an expert without rows": (_with(), [(0, 3), (3, 0)], 0),
    "an expert twice": (_with(), [(3, 2), (3, 1)], 0),
    "rows that end outside": (_request((0, 2)), [(0, 2)], SHAPE.num_rows - 2),
    "rows that begin outside": (_request((0, 2)), [(0, 2)], SHAPE.num_rows),
    "rows as far away as can be said": (_request((0, 2)), [(0, 2)], 2**32 - 1),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_message_closes_its_lane_and_no_other(
    fleet: Fleet,
    server: ShardServer,
    lane: LaneDispatcher,
    raw: RawRouter,
    broken: tuple[Callable[[int], bytes], list[tuple[int, int]], int],
) -> None:
    make_header, rows_per_expert, first_row = broken
    raw.write_entry(make_header(raw.lane), first_row=first_row)
    if first_row + 1 < SHAPE.num_rows:
        raw.write_rows(message.encode_rows_per_expert(rows_per_expert), first_row=first_row)
    raw.publish()
    assert is_closed_by_peer(raw.sock)
    wait_until(lambda: server.stats().refused == {"MessageError": 1})
    assert_serves(fleet, lane)
    assert server.stats().lanes == {"shm": 1}


@pytest.mark.parametrize("count", [NUM_ENTRIES + 1, 255])
def test_more_messages_than_there_are_entries_close_the_lane(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, raw: RawRouter, count: int
) -> None:
    raw.publish(count)
    assert is_closed_by_peer(raw.sock)
    wait_until(lambda: server.stats().refused == {"MessageError": 1})
    assert_serves(fleet, lane)


def test_noise_on_the_socket_of_an_open_lane_is_read_past(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, raw: RawRouter
) -> None:
    raw.sock.sendall(os.urandom(100_000))
    assert_serves(fleet, lane)
    raw.write_entry(message.encode_header(request(raw.lane, [(0, 2)])))
    raw.write_rows(message.encode_rows_per_expert([(0, 2)]))
    raw.publish()
    assert raw.read_answer() == message.encode_header(request(raw.lane, [(0, 2)]).reply())
    assert server.stats().refused == {}


def test_a_header_that_changes_while_it_is_read_harms_nobody(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str
) -> None:
    """Time of check, time of use: the shard must have looked at one and the same copy."""
    stop = threading.Event()

    def torment() -> None:
        while not stop.is_set():
            router = open_shm_lane(unix_name, secret=SECRET, shard_id="shard-0", max_rows=MAX_ROWS, row_bytes=ROW_BYTES)
            good = message.encode_header(request(router.lane, [(0, 2)]))
            bad = message.encode_header(request(router.lane, [(0, 2)])._replace(num_rows=2**31))
            router.write_rows(message.encode_rows_per_expert([(0, 2)]))
            for number in range(400):
                router.write_entry(good if number % 2 else bad)
                if number == 200:
                    with contextlib.suppress(OSError):
                        router.publish()
            router.close()

    thread = threading.Thread(target=torment)
    thread.start()
    for step in range(1, 60):
        assert_serves(fleet, lane, step)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert server.error is None


def test_a_refused_request_is_answered_and_the_lane_goes_on(server: ShardServer, raw: RawRouter) -> None:
    stale, good = request(raw.lane, [(0, 2)], epoch=3), request(raw.lane, [(0, 2)], attempt=1)
    raw.write_rows(message.encode_rows_per_expert([(0, 2)]))
    for header in (stale, good):
        raw.write_entry(message.encode_header(header))
        raw.publish()
    assert raw.read_answer() == message.encode_header(stale.refusal(Refusal.STALE_EPOCH))
    assert raw.read_answer() == message.encode_header(good.reply())
    stats = server.stats()
    assert (stats.refused, stats.num_refused_requests) == ({}, 1)


def test_a_router_that_never_takes_an_answer_holds_up_nobody(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, raw: RawRouter
) -> None:
    raw.write_rows(message.encode_rows_per_expert([(0, 2)]))
    for attempt in range(3 * NUM_ENTRIES):
        progress = server.stats().progress
        raw.write_entry(message.encode_header(request(raw.lane, [(0, 2)], attempt=attempt)))
        raw.publish()
        wait_until(lambda progress=progress: server.stats().progress > progress)
    assert_serves(fleet, lane)


def test_two_hundred_routers_that_come_and_die_give_everything_back(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str
) -> None:
    assert_serves(fleet, lane, 1)
    before = num_open_files(), num_regions_mapped()
    for cycle in range(200):
        _live_and_die(unix_name, how=cycle % 4)
    wait_until(lambda: server.stats().num_lanes == 1)
    assert (num_open_files(), num_regions_mapped()) == before
    assert_serves(fleet, lane, 2)


def _live_and_die(unix_name: str, how: int) -> None:
    """Dies before the opening, after it, with a request on the way, or with an answer on the way."""
    if how == 0:
        knock_unix(unix_name).close()
        return
    router = open_shm_lane(unix_name, secret=SECRET, shard_id="shard-0", max_rows=MAX_ROWS, row_bytes=ROW_BYTES)
    if how > 1:
        router.write_rows(message.encode_rows_per_expert([(0, 50), (2, 50)]))
        router.write_entry(message.encode_header(request(router.lane, [(0, 50), (2, 50)])))
        router.publish()
    if how == 3:
        router.wait_for_message()
    router.close()


def test_a_shard_out_of_descriptors_takes_no_region_and_serves_on(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, unix_name: str
) -> None:
    with knock_unix(unix_name) as sock:
        prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        fd = memfd(SHAPE.num_bytes)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            socket.send_fds(sock, [encode_offer(SHAPE, Announcing.MEMORY)], [fd])
            assert is_closed_by_peer(sock)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(fd)
    wait_until(lambda: server.stats().refused == {"OpeningError": 1})
    assert_serves(fleet, lane)


def test_a_region_stays_mapped_by_the_shard_for_as_long_as_its_lane(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher
) -> None:
    assert_serves(fleet, lane)
    with_lane = num_regions_mapped()
    lane.close()
    wait_until(lambda: server.stats().num_lanes == 0)
    # One map was the router's, one the shard's.
    assert num_regions_mapped() == with_lane - 2


def test_ready_is_the_last_word_of_the_opening(unix_name: str) -> None:
    with knock_unix(unix_name) as sock:
        prove_as_router(sock, secret=SECRET, shard_id="shard-0")
        fd = memfd(SHAPE.num_bytes)
        socket.send_fds(sock, [encode_offer(SHAPE, Announcing.MEMORY)], [fd])
        os.close(fd)
        assert read(sock, len(READY)) == READY
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_an_address_in_use_by_another_process_is_not_ours(server: ShardServer, unix_name: str) -> None:
    """Names are random, so two shards of one host, or of one process, never meet."""
    with Fleet(num_shards=1) as other:
        assert other.epoch.shards[0].unix_name != unix_name
