"""What a shard does with routers that are strangers, garble, vanish or do not listen."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from expert_fleet import HIDDEN, LAYERS, SECRET, Fleet, ThreadShard, wait_until
from lane_rows import random_rows, run
from raw_ends import identity, is_closed_by_peer, knock, open_lane, read

from experts import message, opening
from experts.lane import LaneDispatcher
from experts.message import Header, Kind, request_header
from experts.placement import ShardId
from experts.server import ServerLimits, ShardServer

LAYER = LAYERS[0]
ROWS = random_rows(40, top_k=2)
ROW_BYTES = HIDDEN * 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(num_shards=1, limits=ServerLimits(opening_s=0.3, max_rows=4096)) as made:
        yield made


@pytest.fixture
def server(fleet: Fleet) -> ShardServer:
    shard = fleet.shards[ShardId("shard-0")]
    assert isinstance(shard, ThreadShard)
    return shard.server


@pytest.fixture
def lane(fleet: Fleet) -> LaneDispatcher:
    return fleet.dispatcher(timeout_s=10)


def request(lane_number: int, rows_per_expert: list[tuple[int, int]], **changed: int) -> tuple[Header, bytes]:
    """A request of zero rows' content: its header, and its bytes."""
    header = request_header(identity(lane_number, **changed), rows_per_expert)
    counts = message.encode_rows_per_expert(rows_per_expert)
    return header, message.encode_header(header) + counts + bytes(header.num_rows * ROW_BYTES)


def assert_serves(fleet: Fleet, lane: LaneDispatcher, step: int = 1) -> None:
    lane.begin_step(step)
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))


GARBAGE = {
    "noise": b"\xa5" * 300,
    "http": b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n" + b"x" * 300,
    "a message before the opening": request(1, [(0, 2)])[1],
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_instead_of_an_opening_is_refused_and_counted(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, garbage: bytes
) -> None:
    with knock(server.port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(garbage)
        assert is_closed_by_peer(sock)
    assert server.stats().refused == {"OpeningError": 1}
    assert_serves(fleet, lane)


def test_a_recorded_opening_does_not_open_a_second_lane(server: ShardServer) -> None:
    with knock(server.port) as sock:
        answer = opening.make_answer(
            read(sock, opening.CHALLENGE_BYTES), secret=SECRET, nonce=bytes(32), shard_id="shard-0", lane_id="x"
        )
        sock.sendall(answer)
        read(sock, opening.WELCOME_BYTES)
    with knock(server.port) as sock:
        read(sock, opening.CHALLENGE_BYTES)
        sock.sendall(answer)
        assert is_closed_by_peer(sock)
    wait_until(lambda: server.stats().refused == {"OpeningError": 1})


def test_a_router_that_wants_another_shard_is_refused(server: ShardServer) -> None:
    with pytest.raises(ConnectionResetError):
        open_lane(server.port, secret=SECRET, shard_id="shard-0-of-yesterday")
    wait_until(lambda: server.stats().refused == {"OpeningError": 1})


def test_who_knocks_and_says_nothing_is_sent_away(fleet: Fleet, server: ShardServer, lane: LaneDispatcher) -> None:
    with knock(server.port) as sock:
        assert is_closed_by_peer(sock)
    assert server.stats().refused == {"opening timed out": 1}
    assert_serves(fleet, lane)


def _with(**changed: object) -> Callable[[int], bytes]:
    def make(lane_number: int) -> bytes:
        header, encoded = request(lane_number, [(0, 2), (3, 1)])
        return message.encode_header(header._replace(**changed)) + encoded[message.HEADER_BYTES :]

    return make


def _counts(rows_per_expert: list[tuple[int, int]]) -> Callable[[int], bytes]:
    """Counts that do not fit a header of three rows for two experts; the message has the length it announces."""

    def make(lane_number: int) -> bytes:
        header = request(lane_number, [(0, 2), (3, 1)])[0]
        counts = message.encode_rows_per_expert(rows_per_expert)
        return message.encode_header(header) + counts + bytes(3 * ROW_BYTES)

    return make


BROKEN: dict[str, Callable[[int], bytes]] = {
    "no header": lambda _lane: b"\xff" * 600,
    "more rows than allowed": lambda lane: request(lane, [(0, 4097)])[1],
    "the most rows a header can name": _with(num_rows=2**32 - 1),
    "no rows": _with(num_rows=0),
    "more slots than rows": _with(num_slots=4),
    "no slots": _with(num_slots=0),
    "a reply": _with(kind=Kind.REPLY),
    "another lane's number": lambda lane: request(lane + 1, [(0, 2)])[1],
    "counts that add up to more": _counts([(0, 2), (3, 2)]),
    "a count of four billion": _counts([(0, 2**32 - 1), (3, 4)]),
    "an expert without rows": _counts([(0, 3), (3, 0)]),
    "an expert twice": _counts([(3, 2), (3, 1)]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_message_closes_its_lane_and_no_other(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, broken: Callable[[int], bytes]
) -> None:
    sock, number = open_lane(server.port, secret=SECRET, shard_id="shard-0")
    with sock:
        # The shard need not read to the end of what it refuses.
        with contextlib.suppress(ConnectionError):
            sock.sendall(broken(number))
        assert is_closed_by_peer(sock)
    wait_until(lambda: server.stats().refused == {"MessageError": 1})
    assert_serves(fleet, lane)
    assert server.stats().num_lanes == 1


@pytest.mark.parametrize("cut", [1, message.HEADER_BYTES - 1, message.HEADER_BYTES + 3, -1])
def test_a_router_that_dies_in_the_middle_of_a_message_leaves_nothing_behind(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher, cut: int
) -> None:
    sock, number = open_lane(server.port, secret=SECRET, shard_id="shard-0")
    with sock:
        sock.sendall(request(number, [(0, 2)])[1][:cut])
    wait_until(lambda: server.stats().num_lanes == 1)
    assert server.stats().refused == {}
    assert_serves(fleet, lane)


def test_an_oversize_refused_request_is_read_past_and_the_lane_goes_on(server: ShardServer) -> None:
    sock, number = open_lane(server.port, secret=SECRET, shard_id="shard-0")
    with sock:
        stale, encoded = request(number, [(0, 4000)], epoch=3)
        good, encoded_good = request(number, [(0, 2)], attempt=1)
        sock.sendall(encoded + encoded_good)
        header = message.decode_header(read(sock, message.HEADER_BYTES), max_rows=4096)
        assert header == stale.refusal(message.Refusal.STALE_EPOCH)
        header = message.decode_header(read(sock, message.HEADER_BYTES), max_rows=4096)
        assert header == good.reply()
        assert read(sock, 2 * ROW_BYTES) == bytes(2 * ROW_BYTES)


def test_a_router_that_never_reads_holds_up_nobody_and_is_no_longer_read(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher
) -> None:
    sock, number = open_lane(server.port, secret=SECRET, shard_id="shard-0")
    with sock:
        sock.setblocking(False)
        sent, step = 0, 0
        # Blocked for half a second: the shard has stopped to take from this lane.
        blocked_since = None
        pending = b""
        while blocked_since is None or time.monotonic() - blocked_since < 0.5:
            if not pending:
                step += 1
                pending = request(number, [(0, 4000)], step=step)[1]
            try:
                count = sock.send(pending)
                sent, pending, blocked_since = sent + count, pending[count:], None
            except BlockingIOError:
                blocked_since = blocked_since or time.monotonic()
            assert sent < 200 * 4000 * ROW_BYTES, "the shard takes requests without end"
        assert_serves(fleet, lane)
    wait_until(lambda: server.stats().num_lanes == 1)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_hundred_routers_that_come_and_die_give_their_sockets_back(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher
) -> None:
    assert_serves(fleet, lane, 1)
    before = num_open_files()
    for cycle in range(200):
        _live_and_die(server.port, how=cycle % 5)
    wait_until(lambda: server.stats().num_lanes == 1)
    assert num_open_files() == before
    assert_serves(fleet, lane, 2)


def _live_and_die(port: int, how: int) -> None:
    """Dies, by reset, before the opening, after it, within a header, within rows, or with its answer on the way."""
    if how == 0:
        with knock(port) as sock:
            _reset_on_close(sock)
        return
    sock, number = open_lane(port, secret=SECRET, shard_id="shard-0")
    with sock:
        _reset_on_close(sock)
        encoded = request(number, [(0, 50), (2, 50)])[1]
        sock.sendall(encoded[: {1: 0, 2: 9, 3: len(encoded) // 2, 4: len(encoded)}[how]])


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def no_further_descriptor() -> Iterator[None]:
    """No descriptor can be opened in this process meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_out_of_descriptors_serves_its_lanes_and_accepts_again_later(
    fleet: Fleet, server: ShardServer, lane: LaneDispatcher
) -> None:
    with socket.socket() as stranger:
        with no_further_descriptor():
            stranger.connect(("127.0.0.1", server.port))
            wait_until(lambda: server.stats().refused == {"no socket": 1})
            assert_serves(fleet, lane)
        stranger.settimeout(10)
        assert read(stranger, opening.CHALLENGE_BYTES)
    assert server.error is None


def test_stop_closes_open_lanes_at_once(fleet: Fleet, server: ShardServer, lane: LaneDispatcher) -> None:
    assert_serves(fleet, lane)
    started_at = time.monotonic()
    server.stop()
    assert server.wait_closed(5)
    assert time.monotonic() - started_at < 1
    assert server.error is None
    with pytest.raises(ConnectionRefusedError):
        knock(server.port)


def test_drain_answers_what_has_arrived_and_then_closes(fleet: Fleet, server: ShardServer) -> None:
    # More than the sockets hold: when the drain begins, answers still wait in the shard.
    num_requests, num_rows = 7, 4000
    sock, number = open_lane(server.port, secret=SECRET, shard_id="shard-0")
    with sock:
        for step in range(num_requests):
            sock.sendall(request(number, [(0, num_rows)], step=step)[1])
        load = fleet.shards[ShardId("shard-0")].shard.load
        wait_until(lambda: sum(rows for _layer, _expert, rows in load.snapshot()) == num_requests * num_rows)
        server.drain(timeout_s=10)
        for _answer in range(num_requests):
            read(sock, message.HEADER_BYTES + num_rows * ROW_BYTES)
        assert is_closed_by_peer(sock)
    assert server.wait_closed(5)


def test_drain_gives_up_on_a_router_that_does_not_read() -> None:
    with Fleet(num_shards=1) as fleet:
        shard = fleet.shards[ShardId("shard-0")]
        assert isinstance(shard, ThreadShard)
        sock, number = open_lane(shard.address.port, secret=SECRET, shard_id="shard-0")
        with sock:
            sock.sendall(request(number, [(0, 60_000)])[1])
            wait_until(lambda: shard.server.stats().progress >= 235)
            shard.server.drain(timeout_s=0.2)
            assert shard.server.wait_closed(5)


def test_a_failure_of_the_weights_ends_the_service_and_is_kept() -> None:
    with Fleet(num_shards=1) as fleet:
        shard = fleet.shards[ShardId("shard-0")]
        assert isinstance(shard, ThreadShard)

        def broken(x_RD: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no memory for it")

        for slot in shard.shard.slots:
            shard.shard._slots[slot] = broken  # type: ignore[assignment]
        lane = fleet.dispatcher(timeout_s=5)
        handle = lane.dispatch(LAYER, ROWS.x_TD, ROWS.ids_TK, ROWS.scores_TK)
        combined = lane.combine(handle)
        assert combined.missing_T is not None
        assert shard.server.wait_closed(5)
        assert str(shard.server.error) == "no memory for it"


def test_a_server_without_a_secret_cannot_be_made(fleet: Fleet) -> None:
    shard = fleet.shards[ShardId("shard-0")]
    assert isinstance(shard, ThreadShard)
    with pytest.raises(ValueError, match="secret is empty"):
        ShardServer(shard.shard, secret=b"")
