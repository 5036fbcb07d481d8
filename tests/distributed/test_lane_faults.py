"""What a router does when a shard is lost, stopped, stale or lying. Real processes where a process must die."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from expert_fleet import HIDDEN, LAYERS, SECRET, Fleet, ProcessShard, ThreadShard
from lane_rows import Rows, random_rows, run
from raw_ends import FakeShard, is_closed_by_peer, read_request

from experts import message
from experts.dispatch import Combined, Dispatcher
from experts.epoch import Epoch, ShardAddress
from experts.lane import LaneDispatcher
from experts.placement import ExpertPlacement, ShardId, Slot, WeightSlot

LAYER = LAYERS[0]
ROWS = random_rows(40, top_k=2)
VICTIM = ShardId("shard-1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["shm", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def processes(transport: str) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(num_shards: int, copies: int) -> Fleet:
        made.append(Fleet(num_shards=num_shards, copies=copies, hosting=ProcessShard, transport=transport))
        return made[-1]

    yield make
    for fleet in made:
        fleet.__exit__(None, None, None)


def dispatch_and_combine(dispatcher: Dispatcher, rows: Rows) -> Combined:
    return dispatcher.combine(dispatcher.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK))


def kill_in_mid_exchange(fleet: Fleet, lane: LaneDispatcher, rows: Rows) -> Combined:
    """The victim is stopped, gets its rows, and dies before it can answer."""
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    victim.stop()
    handle = lane.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK)
    assert handle.num_pending > 0
    victim.kill()
    return lane.combine(handle)


def test_rows_of_a_killed_shard_come_from_a_copy_with_the_same_bits(processes: Callable[..., Fleet]) -> None:
    fleet = processes(3, copies=2)
    lane = fleet.dispatcher()
    combined = kill_in_mid_exchange(fleet, lane, ROWS)
    assert combined.missing_T is None
    assert torch.equal(combined.y_TD, run(fleet.oracle, ROWS))
    assert list(lane.lost) == [VICTIM]
    for part in ("shard-1 (127.0.0.1:", "layer 1", "phase wait"):
        assert part in lane.lost[VICTIM]
    for step in range(1, 4):
        lane.begin_step(step)
        rows = random_rows(20, top_k=2, seed=step)
        assert torch.equal(run(lane, rows), run(fleet.oracle, rows))


def test_both_micro_batches_of_a_killed_shard_come_from_a_copy_with_the_same_bits(
    processes: Callable[..., Fleet],
) -> None:
    fleet = processes(2, copies=2)
    lane = fleet.dispatcher()
    halves = [random_rows(40, top_k=2, seed=seed) for seed in (1, 2)]
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    victim.stop()
    handles = [lane.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK) for rows in halves]
    assert all(handle.num_pending == 2 for handle in handles)
    victim.kill()
    for handle, rows in zip(handles, halves, strict=True):
        combined = lane.combine(handle)
        assert combined.missing_T is None
        assert torch.equal(combined.y_TD, run(fleet.oracle, rows))
    assert list(lane.lost) == [VICTIM]


def test_parts_of_an_expert_come_from_its_other_copies_with_the_same_bits(processes: Callable[..., Fleet]) -> None:
    fleet = processes(3, copies=2)
    lane = fleet.dispatcher()
    rows = random_rows(800, top_k=2, skewed=True)
    handle = lane.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK)
    experts = [span.expert for span in handle.plan.spans]  # type: ignore[attr-defined]
    assert experts.count(0) == 2, "its rows are split"
    assert torch.equal(lane.combine(handle).y_TD, run(fleet.oracle, rows))
    lane.begin_step(1)
    combined = kill_in_mid_exchange(fleet, lane, rows)
    assert combined.missing_T is None
    assert torch.equal(combined.y_TD, run(fleet.oracle, rows))
    assert list(lane.lost) == [VICTIM]


def test_without_a_copy_exactly_the_tokens_of_the_killed_shard_are_missing(processes: Callable[..., Fleet]) -> None:
    fleet = processes(3, copies=1)
    lane = fleet.dispatcher()
    rows = random_rows(60)
    combined = kill_in_mid_exchange(fleet, lane, rows)
    experts_lost = [slot.expert for slot in fleet.epoch.placement.slots_by_shard[VICTIM] if slot.layer == LAYER]
    wanted_T = torch.isin(rows.ids_TK[:, 0], torch.tensor(experts_lost))
    assert wanted_T.any()
    assert combined.missing_T is not None
    assert torch.equal(combined.missing_T, wanted_T)
    oracle_TD = run(fleet.oracle, rows)
    assert torch.equal(combined.y_TD[~wanted_T], oracle_TD[~wanted_T])
    assert not combined.y_TD[wanted_T].any()


def test_a_token_keeps_the_part_of_the_expert_that_still_lives(processes: Callable[..., Fleet]) -> None:
    fleet = processes(2, copies=1)
    lane = fleet.dispatcher()
    combined = kill_in_mid_exchange(fleet, lane, ROWS)
    alive = {slot.expert for slot in fleet.epoch.placement.slots_by_shard[ShardId("shard-0")] if slot.layer == LAYER}
    assert combined.missing_T is not None
    for token in range(ROWS.x_TD.shape[0]):
        kept = [k for k in range(2) if int(ROWS.ids_TK[token, k]) in alive]
        assert bool(combined.missing_T[token]) == (len(kept) < 2)
        if len(kept) == 1:
            pick = (slice(token, token + 1), slice(kept[0], kept[0] + 1))
            rows = Rows(x_TD=ROWS.x_TD[pick[0]], ids_TK=ROWS.ids_TK[pick], scores_TK=ROWS.scores_TK[pick])
            assert torch.equal(combined.y_TD[token : token + 1], run(fleet.oracle, rows))


def test_two_of_three_copies_may_die_one_after_the_other(processes: Callable[..., Fleet]) -> None:
    fleet = processes(3, copies=3)
    lane = fleet.dispatcher()
    assert kill_in_mid_exchange(fleet, lane, ROWS).missing_T is None
    fleet.shards[ShardId("shard-0")].kill()
    lane.begin_step(1)
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
    assert set(lane.lost) == {ShardId("shard-0"), VICTIM}
    fleet.shards[ShardId("shard-2")].kill()
    lane.begin_step(2)
    combined = dispatch_and_combine(lane, ROWS)
    assert combined.missing_T is not None
    assert combined.missing_T.all()
    lane.begin_step(3)
    assert dispatch_and_combine(lane, ROWS).missing_T is not None


def test_a_stopped_shard_is_given_up_at_its_deadline_and_stays_so_when_it_wakes(
    processes: Callable[..., Fleet],
) -> None:
    fleet = processes(2, copies=2)
    lane = fleet.dispatcher(timeout_s=0.5)
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    victim.stop()
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
    assert "layer 1, phase wait: no answer within 0.5 s" in lane.lost[VICTIM]
    victim.process.send_signal(signal.SIGCONT)
    lane.begin_step(1)
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
    assert list(lane.lost) == [VICTIM]


def test_a_shard_that_shows_no_sign_of_work_is_given_up_before_its_deadline(processes: Callable[..., Fleet]) -> None:
    fleet = processes(2, copies=2)
    lane = fleet.dispatcher(timeout_s=60.0, silence_s=0.3)
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
    victim.stop()
    assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
    assert "phase wait: no sign of work for 0.3 s" in lane.lost[VICTIM]
    assert list(lane.lost) == [VICTIM]


def test_a_shard_that_is_slow_but_at_work_is_waited_for(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet(num_shards=2, transport=transport) as fleet:
        silence_s = 1.0
        slow = fleet.shards[VICTIM]
        assert isinstance(slow, ThreadShard)
        quick_apply = slow.shard.apply_expert

        def apply(slot: WeightSlot, x_RD: torch.Tensor) -> torch.Tensor:
            time.sleep(0.4 * silence_s)
            return quick_apply(slot, x_RD)

        monkeypatch.setattr(slow.shard, "apply_expert", apply)
        lane = fleet.dispatcher(silence_s=silence_s)
        start = time.monotonic()
        assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))
        assert time.monotonic() - start > 1.5 * silence_s, "the shard was not slow enough to be suspected"
        assert lane.lost == {}


def test_a_stopped_shard_cannot_block_a_large_send(transport: str, processes: Callable[..., Fleet]) -> None:
    fleet = processes(2, copies=2)
    lane = fleet.dispatcher(timeout_s=1.0)
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    victim.stop()
    rows = random_rows(60_000)
    assert torch.equal(run(lane, rows), run(fleet.oracle, rows))
    # Sockets do not hold so much; a region does.
    phase = {"shm": "wait", "tcp": "send"}[transport]
    assert f"phase {phase}: no answer within 1 s" in lane.lost[VICTIM]


@pytest.mark.parametrize("transport", ["shm"])
def test_a_stopped_shard_whose_memory_is_full_cannot_block_a_second_send(processes: Callable[..., Fleet]) -> None:
    fleet = processes(2, copies=2)
    lane = fleet.dispatcher(timeout_s=1.0)
    victim = fleet.shards[VICTIM]
    assert isinstance(victim, ProcessShard)
    victim.stop()
    rows = random_rows(60_000, num_experts=2)
    handles = [lane.dispatch(LAYER, rows.x_TD, rows.ids_TK, rows.scores_TK) for _ in range(3)]
    wanted_TD = run(fleet.oracle, rows)
    assert all(torch.equal(lane.combine(handle).y_TD, wanted_TD) for handle in handles)
    assert "phase send: no answer within 1 s" in lane.lost[VICTIM]


def test_a_shard_that_is_not_there_is_lost_from_the_start(transport: str) -> None:
    with Fleet(num_shards=2, copies=2, transport=transport) as fleet:
        fleet.shards[VICTIM].kill()
        lane = fleet.dispatcher()
        assert "phase connect" in lane.lost[VICTIM]
        assert torch.equal(run(lane, ROWS), run(fleet.oracle, ROWS))


def test_a_stale_epoch_is_refused_and_the_lane_of_the_live_one_goes_on(transport: str) -> None:
    with Fleet(num_shards=1, transport=transport) as fleet:
        good = fleet.dispatcher("good")
        stale = fleet.dispatcher("stale", epoch=replace(fleet.epoch, number=6))
        combined = dispatch_and_combine(stale, ROWS)
        assert combined.missing_T is not None
        assert combined.missing_T.all()
        assert "refused epoch 6: STALE_EPOCH" in stale.lost[ShardId("shard-0")]
        assert torch.equal(run(good, ROWS), run(fleet.oracle, ROWS))
        stats = fleet.shards[ShardId("shard-0")].server.stats()
        assert (stats.num_refused_requests, stats.refused) == (1, {})


def test_another_weights_version_is_refused(transport: str) -> None:
    with Fleet(num_shards=1, transport=transport) as fleet:
        lane = fleet.dispatcher(epoch=replace(fleet.epoch, weights_version=3))
        dispatch_and_combine(lane, ROWS)
        assert "OTHER_WEIGHTS_VERSION" in lane.lost[ShardId("shard-0")]


def test_a_slot_that_the_epoch_does_not_place_there_is_refused(transport: str) -> None:
    with Fleet(num_shards=1, transport=transport) as fleet:
        only = (Slot(LAYER, 0),)
        shard = fleet.shards[ShardId("shard-0")]
        shard.serve_epoch(replace(fleet.epoch, number=8, placement=_placed(only)))
        lane = fleet.dispatcher(epoch=replace(fleet.epoch, number=8))
        dispatch_and_combine(lane, ROWS)
        assert "NO_SUCH_SLOT" in lane.lost[ShardId("shard-0")]


def test_a_router_with_another_secret_gets_no_lane(transport: str) -> None:
    with Fleet(num_shards=1, transport=transport) as fleet:
        lane = fleet.dispatcher(secret=b"another secret")
        assert "phase opening" in lane.lost[ShardId("shard-0")]
        assert fleet.shards[ShardId("shard-0")].server.stats().refused == {"OpeningError": 1}


def test_a_shard_that_does_not_know_the_secret_gets_no_rows() -> None:
    with fake_shard(lambda sock: None, proof_secret=b"a guess") as fake:
        lane = lane_to(fake.port)
        assert "phase opening: the proof does not fit" in lane.lost[ShardId("shard-0")]
        lane.close()


def test_an_answer_to_another_attempt_is_dropped_and_the_right_one_taken() -> None:
    def act(sock: socket.socket) -> None:
        header, rows = read_request(sock, HIDDEN * 4)
        stale = header.reply()._replace(identity=header.identity._replace(attempt=9))
        sock.sendall(message.encode_header(stale) + bytes(len(rows)))
        sock.sendall(message.encode_header(header.reply()) + rows)

    with fake_shard(act) as fake:
        lane = lane_to(fake.port)
        # This shard's experts are the identity, so the answer is the scaled input.
        ones = Rows(x_TD=ROWS.x_TD, ids_TK=ROWS.ids_TK[:, :1], scores_TK=torch.ones(40, 1))
        assert torch.equal(dispatch_and_combine(lane, ones).y_TD, ROWS.x_TD)
        lane.close()


def _wrong_number_of_rows(sock: socket.socket) -> None:
    header, rows = read_request(sock, HIDDEN * 4)
    sock.sendall(message.encode_header(header.reply()._replace(num_rows=header.num_rows - 1)) + rows)
    is_closed_by_peer(sock)


def _garbage(sock: socket.socket) -> None:
    read_request(sock, HIDDEN * 4)
    sock.sendall(b"\xff" * 4096)
    is_closed_by_peer(sock)


def _half_an_answer(sock: socket.socket) -> None:
    header, rows = read_request(sock, HIDDEN * 4)
    sock.sendall(message.encode_header(header.reply()) + rows[: len(rows) // 2])


def _request_sent_back(sock: socket.socket) -> None:
    header, _rows = read_request(sock, HIDDEN * 4)
    sock.sendall(message.encode_header(header))
    is_closed_by_peer(sock)


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (_wrong_number_of_rows, "broke the protocol: the reply has 39 rows, the request had 40"),
        (_garbage, "broke the protocol: magic"),
        (_half_an_answer, "closed by the other end"),
        (_request_sent_back, "broke the protocol: a shard sent a request"),
    ],
)
def test_a_shard_that_breaks_the_protocol_is_lost_and_named(act: Callable[[socket.socket], None], why: str) -> None:
    with fake_shard(act) as fake:
        lane = lane_to(fake.port)
        rows = Rows(x_TD=ROWS.x_TD, ids_TK=ROWS.ids_TK[:, :1], scores_TK=ROWS.scores_TK[:, :1])
        combined = dispatch_and_combine(lane, rows)
        assert combined.missing_T is not None
        assert combined.missing_T.all()
        assert why in lane.lost[ShardId("shard-0")]
        assert "layer 1, phase wait" in lane.lost[ShardId("shard-0")]
        lane.close()


def test_a_shard_that_reads_nothing_and_says_nothing_is_given_up_at_the_deadline() -> None:
    release = threading.Event()

    def act(_sock: socket.socket) -> None:
        release.wait(10)

    with fake_shard(act) as fake:
        lane = lane_to(fake.port, timeout_s=0.3)
        combined = dispatch_and_combine(lane, ROWS)
        release.set()
        assert combined.missing_T is not None
        assert "no answer within 0.3 s" in lane.lost[ShardId("shard-0")]
        lane.close()


def fake_shard(act: Callable[[socket.socket], None], proof_secret: bytes | None = None) -> FakeShard:
    return FakeShard(act, shard_id="shard-0", secret=SECRET, hidden_size=HIDDEN, proof_secret=proof_secret)


def lane_to(port: int, timeout_s: float = 10.0) -> LaneDispatcher:
    address = ShardAddress(shard_id=ShardId("shard-0"), node_id="here", host="127.0.0.1", port=port)
    epoch = Epoch(
        number=7,
        weights_version=0,
        shards=(address,),
        placement=_placed([Slot(LAYER, expert) for expert in range(8)]),
    )
    lane = LaneDispatcher(lane_id="lane", epoch=epoch, secret=SECRET, timeout_s=timeout_s)
    lane.begin_step(1)
    return lane


def _placed(slots: tuple[Slot, ...] | list[Slot]) -> ExpertPlacement:
    return ExpertPlacement(slots_by_shard={ShardId("shard-0"): tuple(slots)})
