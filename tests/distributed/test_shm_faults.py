"""What a router does when a shard on its host dies, stops, wakes up again or lies, at each point of the exchange."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from expert_fleet import HIDDEN, LAYERS, SECRET, Fleet, ProcessShard, wait_until
from lane_rows import Rows, random_rows, run
from raw_ends import is_closed_by_peer
from raw_shm import FakeShmShard, RawShard, num_open_files, num_regions_mapped
from shard_faults import POINTS

from experts import message
from experts.dispatch import Combined, Dispatcher
from experts.epoch import Epoch
from experts.lane import LaneDispatcher
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.transport import shm
from experts.transport.waiting import WaitPolicy

LAYER = LAYERS[0]
ROWS = random_rows(40, top_k=2)
SINGLE = Rows(x_TD=ROWS.x_TD, ids_TK=ROWS.ids_TK[:, :1], scores_TK=torch.ones(40, 1))
SHARD_0, VICTIM = ShardId("shard-0"), ShardId("shard-1")
OPENING = ("challenge", "welcome", "region")
# By tcp there is no region to come to.
TRANSPORTS_AND_POINTS = [
    *(("shm", point) for point in POINTS),
    *(("tcp", point) for point in POINTS if point != "region"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Neither maps nor descriptors nor files are more than they were."""
    before = num_regions_mapped(), num_open_files(), os.listdir("/dev/shm")
    yield
    assert (num_regions_mapped(), num_open_files(), os.listdir("/dev/shm")) == before


def two_copies(point: str, signal_number: int, transport: str = "shm") -> Fleet:
    """The victim does to itself what is said; a copy of each of its experts lives on the other shard."""
    how = {VICTIM: {"fault": (point, signal_number)}}
    return Fleet(num_shards=2, copies=2, hosting=ProcessShard, transport=transport, how=how)


def victim_of(fleet: Fleet) -> ProcessShard:
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    return victim


def dispatch_and_combine(dispatcher: Dispatcher, rows: Rows) -> Combined:
    return dispatcher.combine(dispatcher.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("transport", "point"), TRANSPORTS_AND_POINTS)
def test_a_shard_that_dies_costs_nothing_but_its_place(transport: str, point: str) -> None:
    with two_copies(point, signal.SIGKILL, transport) as fleet:
        lane = fleet.dispatcher()
        for step in range(1, 4):
            lane.begin_step(step)
            assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
        assert victim_of(fleet).process.wait(10) == -signal.SIGKILL
        assert list(lane.lost) == [VICTIM]
        # Right after an answer its end may be seen together with it, or when the next rows are under way.
        where = {"replied": "phase"}.get(point, "phase opening" if point in OPENING else "layer 1, phase wait")
        assert where in lane.lost[VICTIM]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("transport", "point"), TRANSPORTS_AND_POINTS)
def test_a_shard_that_stops_is_given_up_and_changes_nothing_when_it_wakes(transport: str, point: str) -> None:
    with two_copies(point, signal.SIGSTOP, transport) as fleet:
        lane = fleet.dispatcher(timeout_s=1.5)
        assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
        victim_of(fleet).wait_stopped()
        if point == "replied":
            # Its answer was out; the next one is missing.
            lane.begin_step(1)
            assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
        assert list(lane.lost) == [VICTIM]
        # A step is under way while it wakes up and goes on where it was, in the middle of a copy.
        victim_of(fleet).wake_up()
        for step in range(2, 40):
            lane.begin_step(step)
            rows = random_rows(40, top_k=2, seed=step)
            assert torch.equal(run(lane, rows), run(fleet.oracle, rows))
        assert list(lane.lost) == [VICTIM]
        # It rejoins with a new lane, and new memory.
        again = fleet.dispatcher("again")
        assert torch.equal(run(again, ROWS), run(fleet.oracle, ROWS))
        assert again.lost == {}


@pytest.mark.usefixtures("nothing_left")
def test_after_kill_9_nothing_is_left_of_a_shard() -> None:
    before = num_regions_mapped()
    with Fleet(num_shards=2, copies=2, hosting=ProcessShard, transport="shm") as fleet:
        lane = fleet.dispatcher()
        run(lane, ROWS)
        names = [address.unix_name for address in fleet.epoch.shards]
        assert num_regions_mapped() == before + 2
        assert all(f"@{name}" in Path("/proc/net/unix").read_text() for name in names)
        victim_of(fleet).kill()
        lane.begin_step(1)
        assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
        assert num_regions_mapped() == before + 1
        assert f"@{names[1]}" not in Path("/proc/net/unix").read_text()


def test_a_router_that_is_killed_leaves_nothing_in_its_shard(tmp_path: Path) -> None:
    """Its shard lives here, the router in a process of its own."""
    with Fleet(num_shards=1, transport="shm") as fleet:
        server = fleet.shards[SHARD_0].server  # type: ignore[union-attr]
        before = num_regions_mapped(), num_open_files()
        child = os.fork()
        if child == 0:
            lane = fleet.dispatcher()
            lane.dispatch(LAYER, ROWS.x_TD, ROWS.ids_TK, ROWS.scores_TK)
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until(lambda: server.stats().progress > 0)
        os.waitpid(child, 0)
        wait_until(lambda: server.stats().num_lanes == 0)
        assert (num_regions_mapped(), num_open_files()) == before


@pytest.mark.parametrize("transport", ["shm", "shm-rung", "tcp"])
def test_no_wake_up_is_lost_between_ends_that_sleep_at_every_turn(transport: str) -> None:
    how = {SHARD_0: {"spin_us": 0}}
    with Fleet(num_shards=1, hosting=ProcessShard, transport=transport, how=how) as fleet:
        lane = fleet.dispatcher(timeout_s=5, wait=WaitPolicy(spin_s=0.0))
        rows = random_rows(2)
        wanted_TD = run(fleet.oracle, rows)
        for step in range(1, 3000):
            lane.begin_step(step)
            combined = dispatch_and_combine(lane, rows)
            assert combined.missing_T is None, lane.lost
        assert torch.equal(combined.y_TD, wanted_TD)


def test_an_answer_to_another_attempt_is_dropped_and_the_right_one_taken() -> None:
    def act(end: RawShard) -> None:
        header, _at, _rows = end.read_request()
        stale = header.reply()._replace(identity=header.identity._replace(attempt=9))
        end.answer(message.encode_header(stale))
        end.answer(message.encode_header(header.reply()))
        assert is_closed_by_peer(end.sock)

    with fake_shard(act) as fake:
        lane = lane_to(fake)
        # This shard's experts are the identity, so the answer is the scaled input.
        assert torch.equal(dispatch_and_combine(lane, SINGLE).y_TD, ROWS.x_TD)
        lane.close()


def _wrong_number_of_rows(end: RawShard) -> None:
    header, _at, _rows = end.read_request()
    end.answer(message.encode_header(header.reply()._replace(num_rows=header.num_rows - 1)))
    assert is_closed_by_peer(end.sock)


def _garbage(end: RawShard) -> None:
    end.read_request()
    end.answer(b"\xff" * 64)
    assert is_closed_by_peer(end.sock)


def _nothing_written(end: RawShard) -> None:
    end.read_request()
    end.publish()
    assert is_closed_by_peer(end.sock)


def _more_answers_than_entries(end: RawShard) -> None:
    end.read_request()
    end.publish(65)
    assert is_closed_by_peer(end.sock)


def _half_an_answer(end: RawShard) -> None:
    _header, at, rows = end.read_request()
    end.map[at : at + len(rows) // 2] = bytes(len(rows) // 2)


def _request_sent_back(end: RawShard) -> None:
    header, _at, _rows = end.read_request()
    end.answer(message.encode_header(header))
    assert is_closed_by_peer(end.sock)


def _refusal_without_a_reason(end: RawShard) -> None:
    header, _at, _rows = end.read_request()
    encoded = bytearray(message.encode_header(header.refusal(message.Refusal.STALE_EPOCH)))
    encoded[5] = 0
    end.answer(bytes(encoded))
    assert is_closed_by_peer(end.sock)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("act", "why"),
    [
        (_wrong_number_of_rows, "broke the protocol: the reply has 39 rows, the request had 40"),
        (_garbage, "broke the protocol: magic"),
        (_nothing_written, "broke the protocol: magic"),
        (_more_answers_than_entries, "broke the protocol: 65 messages are announced at once"),
        (_half_an_answer, "closed by the other end"),
        (_request_sent_back, "broke the protocol: a shard sent a request"),
        (_refusal_without_a_reason, "broke the protocol: reason is 0"),
    ],
)
def test_a_shard_that_breaks_the_protocol_is_lost_and_named(act: Callable[[RawShard], None], why: str) -> None:
    with fake_shard(act) as fake:
        lane = lane_to(fake)
        combined = dispatch_and_combine(lane, SINGLE)
        assert combined.missing_T is not None
        assert combined.missing_T.all()
        assert why in lane.lost[SHARD_0]
        assert "layer 1, phase wait" in lane.lost[SHARD_0]
        lane.close()


@pytest.mark.usefixtures("nothing_left")
def test_rows_that_a_shard_writes_after_it_was_given_up_reach_nobody() -> None:
    before = num_regions_mapped()
    release = threading.Event()

    def act(end: RawShard) -> None:
        _header, at, rows = end.read_request()
        release.wait(10)
        end.map[at : at + len(rows)] = b"\xff" * len(rows)
        end.map[12288:] = b"\xff" * (end.shape.num_bytes - 12288)

    with fake_shard(act) as fake:
        lane = lane_to(fake, timeout_s=0.3)
        handle = lane.dispatch(LAYER, SINGLE.x_TD, SINGLE.ids_TK, SINGLE.scores_TK)
        combined = lane.combine(handle)
        assert "no answer within 0.3 s" in lane.lost[SHARD_0]
        # The shard's own map is the only one left.
        assert num_regions_mapped() == before + 1
        release.set()
        wait_until(lambda: num_regions_mapped() == before)
        assert not handle.results_RB.any()
        assert combined.missing_T is not None
        assert not combined.y_TD.any()
        lane.close()


def fake_shard(act: Callable[[RawShard], None]) -> FakeShmShard:
    return FakeShmShard(act, shard_id=SHARD_0, secret=SECRET, hidden_size=HIDDEN)


def lane_to(fake: FakeShmShard, timeout_s: float = 10.0) -> LaneDispatcher:
    slots = tuple(Slot(LAYER, expert) for expert in range(8))
    placement = ExpertPlacement(slots_by_shard={SHARD_0: slots})
    epoch = Epoch(number=7, weights_version=0, shards=(fake.address,), placement=placement)
    lane = LaneDispatcher(lane_id="lane", epoch=epoch, secret=SECRET, timeout_s=timeout_s, connect=shm.connect)
    lane.begin_step(1)
    return lane
