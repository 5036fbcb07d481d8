"""What is known of shards that must leave, by what they and Ray say."""

from __future__ import annotations

from dataclasses import replace

from cluster.control.epoch_view import ShardView
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_records import PATIENCE_S, ShardRecords
from cluster.control.shard_work import ShardWork
from experts.epoch import ShardAddress
from experts.placement import ShardId

SHARD = ShardId("shard-0")
REPORT = ShardReport(
    pid=1,
    node_id="old",
    load=(),
    epochs={},
    memory_pool="old",
    num_free_slots=0,
    num_loaded=0,
    work=ShardWork(by_slot={}, busy_s=0.0, speed=None),
)


def records() -> ShardRecords:
    known = ShardRecords(suspect_after_s=1000.0)
    known.add(SHARD, ShardAddress(shard_id=SHARD, node_id="old", host="h", port=1))
    return known


def at(known: ShardRecords, now_s: float, report: ShardReport = REPORT) -> ShardView:
    known.note_report(SHARD, report, now_s)
    return known.views(now_s, 0)[SHARD]


def test_a_shard_on_a_node_that_is_to_go_must_leave_and_is_pressed_when_that_takes_long() -> None:
    known = records()
    assert not at(known, 1.0).must_leave
    known.note_draining(frozenset({"old"}))
    assert [at(known, now_s).must_leave for now_s in (2.0, 3.0)] == [True, True]
    assert not at(known, 2.0 + PATIENCE_S).is_pressed
    assert at(known, 2.1 + PATIENCE_S).is_pressed
    known.note_draining(frozenset({"another"}))
    assert not at(known, 3.0 + PATIENCE_S).must_leave


def test_a_shard_whose_process_was_told_to_end_must_leave() -> None:
    assert at(records(), 1.0, replace(REPORT, is_leaving=True)).must_leave
