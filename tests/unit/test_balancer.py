"""From what shards report to what `arriero rebalance --dry-run` prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.balance.expert_traffic import SlotTraffic
from cluster.balance.plan import Refusal
from cluster.balance.rebalance import BalanceGoal
from cluster.commands.rebalance import response_to_json, response_to_text
from cluster.control.balancer import BalanceQuestion, Balancer, not_ready
from cluster.control.rebalance_answer import answer, refusal_answer
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_work import ShardWork
from cluster.front.rebalance_codec import rebalance_response
from experts.epoch import Epoch, ShardAddress
from experts.expert_dtype import ExpertDtype
from experts.expert_shape import ExpertShape
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.shard_speed import ShardSpeed

A, B, C = ShardId("shard-a"), ShardId("shard-b"), ShardId("shard-c")
SHAPE = ExpertShape(hidden_size=10, intermediate_size=20, num_experts=6)
SLOT_BYTES = 2 * 3 * 10 * 20
PLACEMENT = ExpertPlacement(
    slots_by_shard={A: (Slot(1, 0), Slot(1, 1)), B: (Slot(1, 2), Slot(1, 3)), C: (Slot(1, 4), Slot(1, 5))}
)
NODES = {A: "north", B: "north", C: "south"}
EPOCH = Epoch(
    number=7,
    weights_version=1,
    shards=tuple(ShardAddress(shard_id=shard, node_id=node, host="h", port=1) for shard, node in NODES.items()),
    placement=PLACEMENT,
)
SPEED = ShardSpeed(bytes_per_s=1.2e6, flops_per_s=1.2e7)


def report(
    shard: ShardId, rows_each: int, *, free: int = 3, speed: ShardSpeed | None = SPEED, busy_s: float = 0.0
) -> ShardReport:
    """Each activation has 200 rows."""
    by_slot = {slot: SlotTraffic(rows_each, rows_each // 200) for slot in PLACEMENT.slots_of(shard)}
    return ShardReport(
        pid=1,
        node_id=NODES[shard],
        load=[],
        epochs=dict.fromkeys({7}, 1),
        memory_pool=NODES[shard],
        num_free_slots=free,
        num_loaded=0,
        work=ShardWork(by_slot=by_slot, busy_s=busy_s, speed=speed),
    )


def heard(balancer: Balancer, *, a_rows: int, others_rows: int, free: int = 3) -> None:
    """Of all shards, twice: what was done between the two reports, in 60 s."""
    for shard in (A, B, C):
        balancer.note(shard, report(shard, 0, free=free), 0.0)
        rows = a_rows if shard == A else others_rows
        balancer.note(shard, report(shard, rows, free=free, busy_s=rows / 1e4), 60.0)


def question(balancer: Balancer) -> BalanceQuestion | Refusal:
    return balancer.question(EPOCH, SHAPE, dtype=ExpertDtype(compute="bfloat16"), goal=BalanceGoal(), now_s=60.0)


def asked(balancer: Balancer) -> BalanceQuestion:
    found = question(balancer)
    assert isinstance(found, BalanceQuestion), found
    return found


def told(balancer: Balancer) -> dict[str, Any]:
    found = asked(balancer)
    return answer(found, found.decide())


def test_it_knows_sizes_room_nodes_speed_and_traffic() -> None:
    balancer = Balancer()
    heard(balancer, a_rows=20000, others_rows=2000)
    found = asked(balancer)
    assert (found.fleet.slot_bytes, found.fleet.flops_per_row) == (SLOT_BYTES, 1200)
    # Two shards share the three free slots of the north.
    assert found.fleet.max_slots == {A: 3, B: 3, C: 5}
    assert found.fleet.nodes == NODES
    assert {shard.speed for shard in found.fleet.shards} == {SPEED}
    assert found.traffic.of(Slot(1, 1)) == SlotTraffic(20000, 100)
    assert found.measured_busy == {A: pytest.approx(2 / 60), B: pytest.approx(0.2 / 60), C: pytest.approx(0.2 / 60)}


def test_a_single_bad_measurement_of_speed_does_not_make_a_shard_slow() -> None:
    balancer = Balancer()
    heard(balancer, a_rows=0, others_rows=0)
    balancer.note(B, report(B, 0, speed=ShardSpeed(bytes_per_s=1.0, flops_per_s=1.0)), 61.0)
    balancer.note(C, report(C, 0, speed=ShardSpeed(bytes_per_s=1.3e6, flops_per_s=1.3e7)), 61.0)
    assert {shard.speed for shard in asked(balancer).fleet.shards} == {SPEED}


def test_it_is_not_ready_while_a_shard_is_unknown() -> None:
    balancer = Balancer()
    heard(balancer, a_rows=20000, others_rows=2000)
    balancer.forget(B)
    assert question(balancer) == not_ready("nothing is known of shard-b")


def test_it_is_not_ready_while_no_speed_is_known() -> None:
    balancer = Balancer()
    for shard in (A, B, C):
        balancer.note(shard, report(shard, 0, speed=None), 0.0)
    assert question(balancer) == not_ready("no shard has measured how fast it is")


def test_a_plan_arrives_at_the_command_line_whole() -> None:
    balancer = Balancer()
    heard(balancer, a_rows=20000, others_rows=2000)
    response = rebalance_response(told(balancer))
    printed = json.loads(json.dumps(response_to_json(response)))
    assert set(printed) == {"refusal", "rebalance_id", "stages", "bytes_loaded", "span_s", "before", "after"}
    assert printed["refusal"] is None
    assert printed["span_s"] == 60.0
    additions = [placed for stage in printed["stages"] for placed in stage["additions"]]
    assert printed["bytes_loaded"] == SLOT_BYTES * len(additions)
    assert {tuple(slot) for _shard, *slot in additions} <= {(1, 0), (1, 1)}
    assert printed["after"]["imbalance"] < 0.1 < printed["before"]["imbalance"]
    assert [layer for layer, _imbalance in printed["before"]["layers"]] == [1]
    before = {shard["shard_id"]: shard for shard in printed["before"]["shards"]}
    assert before[A]["num_slots"] == 2
    assert before[A]["busy"] == pytest.approx(2 * 20000 * 1e-4 / 60)
    assert before[A]["measured_busy"] == pytest.approx(2 / 60)
    assert {shard["measured_busy"] for shard in printed["after"]["shards"]} == {None}
    text = response_to_text(response)
    assert f"{printed['bytes_loaded'] / 1e6:.1f} MB to load in {len(printed['stages'])} stages" in text
    for shard, layer, expert in additions:
        assert any(f"load {shard}  layer {layer}: " in line and f" {expert}" in line for line in text.splitlines())
    assert f"imbalance: {printed['before']['imbalance']:.3f}, after {printed['after']['imbalance']:.3f}" in text


def test_a_refusal_arrives_with_its_reason_and_how_busy_shards_are() -> None:
    balancer = Balancer()
    heard(balancer, a_rows=20000, others_rows=2000, free=0)
    response = rebalance_response(told(balancer))
    printed = response_to_json(response)
    assert printed["refusal"]["reason"] == "no_room"
    assert printed["refusal"]["missing_bytes"] > 0
    assert (printed["stages"], printed["after"]) == ([], None)
    assert printed["before"]["imbalance"] > 0.5
    text = response_to_text(response)
    assert text.startswith("nothing to do (no_room): ")
    assert "bytes missing" in text
    assert "AFTER" in text


def test_an_answer_without_knowledge_has_no_prediction() -> None:
    response = rebalance_response(refusal_answer(not_ready("the shards are not up yet")))
    assert response_to_text(response) == "nothing to do (not_ready): the shards are not up yet"
    assert response_to_json(response)["before"] is None


def test_work_is_read_from_a_shards_statistics() -> None:
    stats = {
        "load": [(1, 0, 30), (1, 1, 0)],
        "activations": [(1, 0, 3), (1, 1, 0)],
        "busy_s": 1.5,
        "speed": SPEED,
    }
    assert ShardWork.from_stats(stats) == ShardWork(
        by_slot={Slot(1, 0): SlotTraffic(30, 3), Slot(1, 1): SlotTraffic(0, 0)},
        busy_s=1.5,
        speed=SPEED,
    )
