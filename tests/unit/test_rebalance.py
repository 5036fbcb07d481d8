"""What rebalance decides, one test per situation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from expert_fleets import SLOT_BYTES, SPAN_S, fleet, shard_ids, skewed_steps, traffic_of_steps

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.fleet import Fleet
from cluster.balance.plan import PlacedSlot, Plan, Refusal, RefusalReason
from cluster.balance.rebalance import BalanceGoal, predict, rebalance
from experts.placement import ExpertPlacement, ShardId, Slot, place
from experts.row_split import split_rows
from experts.shard_speed import ShardSpeed

LAYERS = (1, 3, 5)
GOAL = BalanceGoal(load_bytes_per_s=1e9)
A, B, C, D = shard_ids(4)


def placed(*experts_by_shard: str, layer: int = 1) -> ExpertPlacement:
    """ "012" is a shard with experts 0, 1 and 2."""
    slots = [tuple(Slot(layer, int(expert)) for expert in experts) for experts in experts_by_shard]
    return ExpertPlacement(slots_by_shard=dict(zip(shard_ids(len(slots)), slots, strict=True)))


def prefill(*rows_by_expert: int, layer: int = 1, times: int = 10) -> ExpertTraffic:
    """So many rows of each expert at a time that only rows count."""
    return traffic_of_steps([{Slot(layer, expert): rows for expert, rows in enumerate(rows_by_expert)}] * times)


def decode(*activations_by_expert: int, layer: int = 1) -> ExpertTraffic:
    """One row at a time: only activations count."""
    by_slot = {Slot(layer, expert): SlotTraffic(times, times) for expert, times in enumerate(activations_by_expert)}
    return ExpertTraffic(span_s=SPAN_S, by_slot=by_slot)


def planned(outcome: Plan | Refusal) -> Plan:
    assert isinstance(outcome, Plan), outcome
    return outcome


def refused(outcome: Plan | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    return outcome


def shards(plan: Plan, expert: int, layer: int = 1) -> set[ShardId]:
    return set(plan.placement.shards_of(Slot(layer, expert)))


# ---- the loads of the issue ----


@pytest.mark.parametrize("num_shards", [3, 4, 5, 8, 11])
def test_a_skewed_prefill_load_is_balanced_by_one_rebalance(num_shards: int) -> None:
    steps = skewed_steps(layers=LAYERS, num_experts=16, num_steps=20, num_tokens=2048, skew=(0.8, 2))
    spare = -(-len(LAYERS) * 16 // num_shards) + 3 * len(LAYERS)
    hosts = fleet([spare] * num_shards)
    current = place(moe_layers=LAYERS, num_experts=16, shard_ids=hosts.shard_ids)
    plan = planned(rebalance(current, traffic_of_steps(steps), hosts, GOAL))
    assert plan.before.imbalance > 0.35
    assert plan.after.imbalance < 0.15
    assert max(plan.after.imbalance_by_layer.values()) < 0.15
    assert len(plan.stages) == 1
    # The same steps, row by row through the dispatcher's own rule.
    rows = Counter[ShardId]()
    for step in steps:
        for layer in LAYERS:
            rows_of = {slot.expert: rows for slot, rows in step.items() if slot.layer == layer}
            copies = {expert: plan.placement.shards_of(Slot(layer, expert)) for expert in rows_of}
            for parts in split_rows(rows_of, copies, offset=0).values():
                rows.update({part.shard_id: part.num_rows for part in parts})
    assert max(rows.values()) / (sum(rows.values()) / num_shards) - 1 < 0.15


@pytest.mark.parametrize("num_shards", [2, 3, 4, 5])
def test_after_a_rebalance_for_decode_activated_experts_per_shard_differ_by_one_at_most(num_shards: int) -> None:
    num_steps = 400
    steps = skewed_steps(layers=LAYERS, num_experts=16, num_steps=num_steps, num_tokens=32, skew=(0.8, 2))
    traffic = traffic_of_steps(steps)
    hosts = fleet([16 * len(LAYERS)] * num_shards)
    # All hot experts begin on one shard.
    order = [hosts.shard_ids[0], hosts.shard_ids[0], *hosts.shard_ids * 16]
    slots = {shard: [] for shard in hosts.shard_ids}
    for layer in LAYERS:
        for expert in range(16):
            slots[order[expert]].append(Slot(layer, expert))
    current = ExpertPlacement(slots_by_shard={shard: tuple(held) for shard, held in slots.items()})
    plan = planned(rebalance(current, traffic, hosts, GOAL))
    assert plan.after.imbalance < plan.before.imbalance
    for layer in LAYERS:
        activated = [
            sum(traffic.of(slot).activations for slot in plan.placement.slots_of(shard) if slot.layer == layer)
            for shard in hosts.shard_ids
        ]
        assert (max(activated) - min(activated)) / num_steps <= 1
        assert all(len(plan.placement.shards_of(Slot(layer, expert))) == 1 for expert in range(16))


@pytest.mark.parametrize("num_tokens", [32, 2048])
@pytest.mark.parametrize("seed", range(5))
def test_an_even_load_is_left_alone_whatever_chance_did(num_tokens: int, seed: int) -> None:
    steps = skewed_steps(layers=LAYERS, num_experts=16, num_steps=40, num_tokens=num_tokens, skew=(0.5, 8), seed=seed)
    hosts = fleet([40] * 4)
    current = place(moe_layers=LAYERS, num_experts=16, shard_ids=hosts.shard_ids)
    outcome = refused(rebalance(current, traffic_of_steps(steps), hosts, replace(GOAL, min_samples=100)))
    assert outcome.reason is RefusalReason.EVEN
    assert "the load is even" in outcome.sentence


# ---- what it does ----


def test_a_hot_expert_with_many_rows_gets_a_copy_on_the_shard_with_the_least_to_do() -> None:
    plan = planned(rebalance(placed("01", "23", "45"), prefill(600, 20, 300, 20, 20, 20), fleet([3, 3, 3]), GOAL))
    assert plan.stages[0].additions == (PlacedSlot(C, Slot(1, 0)),)
    assert plan.stages[0].removals == ()
    assert plan.bytes_loaded == SLOT_BYTES


def test_a_hot_expert_with_few_rows_at_a_time_is_not_copied_for_its_weights_would_be_read_twice() -> None:
    plan = planned(rebalance(placed("012", "345"), decode(1000, 600, 500, 100, 100, 100), fleet([6, 6]), GOAL))
    assert {len(plan.placement.shards_of(Slot(1, expert))) for expert in range(6)} == {1}
    assert plan.after.imbalance < 0.1


def test_what_is_well_placed_stays() -> None:
    current = place(moe_layers=(1, 3), num_experts=8, shard_ids=shard_ids(4))
    even = {Slot(3, expert): SlotTraffic(2000, 10) for expert in range(8)}
    hot = {Slot(1, expert): SlotTraffic(8000 if expert == 0 else 1000, 40) for expert in range(8)}
    plan = planned(rebalance(current, ExpertTraffic(span_s=SPAN_S, by_slot={**even, **hot}), fleet([6] * 4), GOAL))
    assert {slot.layer for stage in plan.stages for _shard, slot in (*stage.additions, *stage.removals)} == {1}
    assert plan.after.busy_by_layer[3] == plan.before.busy_by_layer[3]
    assert sum(len(stage.additions) for stage in plan.stages) <= 4


def test_shards_get_uneven_numbers_of_slots_when_that_is_even_work() -> None:
    plan = planned(
        rebalance(placed("0123", "4567"), decode(900, 900, 900, 900, 300, 300, 300, 300), fleet([8, 8]), GOAL)
    )
    counts = [len(plan.placement.slots_of(shard)) for shard in (A, B)]
    assert counts == [3, 5]


def test_two_experts_swap_where_a_move_would_only_turn_the_tables() -> None:
    plan = planned(rebalance(placed("01", "23"), decode(900, 800, 500, 400), fleet([3, 3]), GOAL))
    assert len(plan.stages[0].additions) == len(plan.stages[0].removals) == 2
    assert plan.after.imbalance < 0.05


def test_a_shard_twice_as_fast_gets_twice_the_work() -> None:
    fast = ShardSpeed(bytes_per_s=2e6, flops_per_s=2e6)
    slow = ShardSpeed(bytes_per_s=1e6, flops_per_s=1e6)
    hosts = fleet([6, 6], speeds=[slow, fast])
    plan = planned(rebalance(placed("012", "345"), decode(*[1000] * 6), hosts, GOAL))
    assert [len(plan.placement.slots_of(shard)) for shard in (A, B)] == [2, 4]


def test_a_copy_goes_to_another_host_even_if_a_shard_beside_it_has_less_to_do() -> None:
    hosts = fleet([2] * 4, nodes=["north", "north", "south", "south"])
    goal = replace(GOAL, min_gain=0.25)
    plan = planned(rebalance(placed("0", "1", "2", "3"), prefill(600, 280, 300, 310), hosts, goal))
    assert shards(plan, 0) == {A, C}


def test_a_move_does_not_bring_two_copies_onto_one_host() -> None:
    """Moving 0 to C would be best, but leave both copies in the south."""
    hosts = fleet([3] * 3, nodes=["west", "south", "south"])
    plan = planned(rebalance(placed("01", "02", "3"), decode(800, 1000, 1000, 200), hosts, GOAL))
    assert {hosts.nodes[shard] for shard in shards(plan, 0)} == {"west", "south"}


def test_a_swap_does_not_bring_two_copies_onto_one_host() -> None:
    """Swapping 0 for C's copy of 2 would be best, but leave both copies of 2 in the north."""
    hosts = fleet([4] * 3, nodes=["north", "north", "south"])
    plan = planned(rebalance(placed("01", "24", "235"), decode(1000, 650, 800, 200, 950, 150), hosts, GOAL))
    assert {hosts.nodes[shard] for shard in shards(plan, 2)} == {"north", "south"}


def test_a_copy_goes_beside_another_when_every_host_has_one() -> None:
    hosts = fleet([2] * 4, nodes=["north", "north", "south", "south"])
    plan = planned(rebalance(placed("0", "1", "0", "2"), prefill(1600, 10, 10), hosts, GOAL))
    assert shards(plan, 0) == {A, B, C, D}


def test_the_copy_that_nobody_needs_makes_room_for_the_one_that_is_needed() -> None:
    current = placed("0", "12", "13")
    plan = planned(rebalance(current, prefill(900, 20, 20, 20), fleet([1, 2, 2]), GOAL))
    dropped = plan.stages[0]
    assert dropped.additions == ()
    assert [slot for _shard, slot in dropped.removals] == [Slot(1, 1)]
    assert len(shards(plan, 0)) == 2
    assert len(shards(plan, 1)) == 1


def test_the_copy_with_the_least_to_do_makes_room_first() -> None:
    plan = planned(rebalance(placed("0", "12", "12"), prefill(900, 200, 20), fleet([1, 2, 2]), GOAL))
    assert PlacedSlot(B, Slot(1, 2)) in [removal for stage in plan.stages for removal in stage.removals]


def test_of_three_copies_that_could_make_room_two_stay_where_two_are_wished() -> None:
    goal = replace(GOAL, min_copies=2)
    plan = planned(rebalance(placed("0", "1", "1", "1", "0"), prefill(1800, 20), fleet([1] * 5), goal))
    assert len(shards(plan, 0)) == 3
    assert len(shards(plan, 1)) == 2


@pytest.mark.parametrize("nodes", [None, ["north"] * 4])
def test_a_copy_that_must_be_kept_makes_no_room(nodes: list[str] | None) -> None:
    current = placed("0", "012", "13", "23")
    hosts = fleet([1, 3, 2, 2], nodes=nodes)
    goal = replace(GOAL, min_copies=2)
    assert refused(rebalance(current, prefill(900, 20, 20, 20), hosts, goal)).reason is RefusalReason.NO_ROOM
    assert isinstance(rebalance(current, prefill(900, 20, 20, 20), hosts, GOAL), Plan)


def test_the_only_copy_on_another_host_makes_no_room() -> None:
    hosts = fleet([1] * 5, nodes=["north", "north", "north", "south", "west"])
    plan = planned(rebalance(placed("0", "1", "1", "1", "0"), prefill(1800, 20), hosts, replace(GOAL, min_copies=2)))
    assert D in shards(plan, 1)
    assert len(shards(plan, 0)) == 3


def test_a_copy_that_carries_a_shards_load_makes_no_room() -> None:
    current = placed("0", "12", "13")
    refusal = refused(rebalance(current, prefill(900, 1200, 20, 20), fleet([1, 2, 2]), GOAL))
    assert refusal.reason is RefusalReason.NO_ROOM


def test_full_shards_trade_through_the_room_that_the_first_stage_frees() -> None:
    """One free slot in all, and each change needs it."""
    current = placed("012", "3", layer=1)
    plan = planned(rebalance(current, decode(600, 500, 400, 300), fleet([3, 2]), GOAL))
    state = {shard: set(slots) for shard, slots in current.slots_by_shard.items()}
    for stage in plan.stages:
        for shard, slot in stage.additions:
            state[shard].add(slot)
        assert len(state[A]) <= 3
        assert len(state[B]) <= 2
        for shard, slot in stage.removals:
            state[shard].remove(slot)
    assert {shard: tuple(sorted(slots)) for shard, slots in state.items()} == plan.placement.slots_by_shard


# ---- when it refuses ----


def test_little_traffic_says_nothing() -> None:
    refusal = refused(rebalance(placed("0", "1"), decode(90, 10), fleet([2, 2]), GOAL))
    assert refusal.reason is RefusalReason.LITTLE_TRAFFIC
    assert "50 samples per shard and layer in 60 s say too little: 400 are needed" in refusal.sentence


def test_no_traffic_at_all_says_nothing() -> None:
    nothing = ExpertTraffic(span_s=0.0, by_slot={})
    assert refused(rebalance(placed("0", "1"), nothing, fleet([2, 2]), GOAL)).reason is RefusalReason.LITTLE_TRAFFIC


def test_without_room_it_says_how_much_is_missing_and_that_is_enough() -> None:
    current, traffic = placed("01", "23"), prefill(600, 20, 20, 20)
    refusal = refused(rebalance(current, traffic, fleet([2, 2]), GOAL))
    assert refusal.reason is RefusalReason.NO_ROOM
    assert refusal.missing_bytes == SLOT_BYTES
    assert f"bytes missing: {B} {SLOT_BYTES}" in refusal.sentence
    assert isinstance(rebalance(current, traffic, fleet([2, 3]), GOAL), Plan)


def test_a_gain_below_the_time_of_loading_is_refused() -> None:
    current, traffic, hosts = placed("01", "23"), prefill(600, 20, 20, 20), fleet([3, 3])
    slow = replace(GOAL, load_bytes_per_s=100.0, horizon_s=60.0)
    refusal = refused(rebalance(current, traffic, hosts, slow))
    assert refusal.reason is RefusalReason.DOES_NOT_PAY
    assert "not worth loading 1 experts (10 s)" in refusal.sentence
    assert isinstance(rebalance(current, traffic, hosts, replace(slow, horizon_s=6000.0)), Plan)


def test_a_small_gain_is_not_worth_moving_for() -> None:
    refusal = refused(
        rebalance(placed("012", "34"), decode(1000, 1000, 30, 1000, 400), fleet([5, 5]), replace(GOAL, min_gain=0.1))
    )
    assert refusal.reason is RefusalReason.DOES_NOT_PAY


def test_an_expert_that_is_too_much_for_one_shard_alone_stays_when_it_must_be_read_as_a_whole() -> None:
    refusal = refused(rebalance(placed("0", "1"), decode(1000, 100), fleet([2, 2]), GOAL))
    assert refusal.reason is RefusalReason.NOTHING_HELPS


# ---- fleets that change ----


def test_a_new_shard_gets_its_part() -> None:
    hosts = fleet([8] * 3)
    plan = planned(rebalance(placed("0123", "4567"), decode(*[1000] * 8), hosts, GOAL))
    assert sorted(len(plan.placement.slots_of(shard)) for shard in hosts.shard_ids) == [2, 3, 3]


def test_a_leaving_shard_gives_everything_away_even_when_the_load_is_even() -> None:
    current = place(moe_layers=LAYERS, num_experts=8, shard_ids=shard_ids(4))
    stay = fleet([20, 20, 20])
    plan = planned(rebalance(current, ExpertTraffic(span_s=0.0, by_slot={}), stay, GOAL))
    assert set(plan.placement.slots_by_shard) == {A, B, C}
    assert plan.placement.slots == current.slots
    assert set(plan.stages[0].removals) == {PlacedSlot(D, slot) for slot in current.slots_of(D)}
    assert max(Counter(len(slots) for slots in plan.placement.slots_by_shard.values())) == 8


def test_predict_shares_an_experts_rows_so_that_its_shards_come_out_even() -> None:
    # 0 can only be on A, 1 on both: A has 20 rows of 0 and 10 of 1, B 30 of 1 and none else.
    prediction = predict(placed("01", "1"), prefill(200, 400), fleet([2, 2]))
    assert prediction.busy_by_shard[A] == pytest.approx(prediction.busy_by_shard[B])
    assert prediction.busy_by_shard[A] == pytest.approx(10 * 300 * 1e-4 / SPAN_S)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_copies": 0}, "min_copies must be at least 1, got 0"),
        ({"min_samples": 0}, "min_samples must be at least 1, got 0"),
        ({"horizon_s": 0.0}, "horizon_s must be positive, got 0.0"),
        ({"load_bytes_per_s": float("nan")}, "load_bytes_per_s must be positive, got nan"),
    ],
)
def test_a_goal_names_the_value_that_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOAL, **values)


def test_a_fleet_names_the_value_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Fleet(shards=(), slot_bytes=1, flops_per_row=1)
    with pytest.raises(ValueError, match="slot_bytes must be at least 1, got 0"):
        replace(fleet([1]), slot_bytes=0)
    with pytest.raises(ValueError, match="shards must be distinct"):
        replace(fleet([1]), shards=fleet([1]).shards * 2)
    with pytest.raises(ValueError, match="flops_per_s must be positive, got 0"):
        ShardSpeed(bytes_per_s=1.0, flops_per_s=0.0)
