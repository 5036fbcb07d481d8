"""What holds for every plan, whatever the placement, the load and the fleet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expert_fleets import SPAN_S, SPEED, fleet, shard_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.fleet import Fleet
from cluster.balance.plan import Plan, Refusal
from cluster.balance.rebalance import BalanceGoal, rebalance
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.shard_speed import ShardSpeed

SLOW = ShardSpeed(bytes_per_s=3e5, flops_per_s=4e5)


@dataclass(frozen=True, kw_only=True)
class Situation:
    current: ExpertPlacement
    traffic: ExpertTraffic
    hosts: Fleet
    goal: BalanceGoal

    def rebalance(self) -> Plan | Refusal:
        return rebalance(self.current, self.traffic, self.hosts, self.goal)

    @property
    def nodes(self) -> dict[ShardId, str]:
        return self.hosts.nodes

    def num_copies(self, placement: ExpertPlacement, slot: Slot) -> int:
        return len(self.living(placement, slot))

    def num_nodes(self, placement: ExpertPlacement, slot: Slot) -> int:
        return len({self.nodes[shard] for shard in self.living(placement, slot)})

    def living(self, placement: ExpertPlacement, slot: Slot) -> list[ShardId]:
        return [shard for shard in placement.shards_of(slot) if shard in self.nodes]


@st.composite
def situations(draw: st.DrawFn, *, steady: bool = False) -> Situation:
    """steady: every shard stays, has the same speed and holds no more than it may, and every expert has its copies."""
    num_shards, num_layers, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    ids = shard_ids(num_shards)
    num_leaving = 0 if steady else draw(st.integers(0, num_shards - 1))
    min_copies = draw(st.integers(1, min(2, num_shards)))
    slots = [Slot(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    fewest = min_copies if steady else 1
    holders = {slot: draw(st.sets(st.sampled_from(ids), min_size=fewest, max_size=3)) for slot in slots}
    current = ExpertPlacement(
        slots_by_shard={shard: tuple(slot for slot in slots if shard in holders[slot]) for shard in ids}
    )
    room = [len(current.slots_of(shard)) + draw(st.integers(0 if steady else -1, 6)) for shard in ids]
    hosts = fleet(
        [max(0, number) for number in room],
        nodes=[f"node-{draw(st.integers(0, 3))}" for _ in ids],
        speeds=None if steady else [draw(st.sampled_from([SPEED, SLOW])) for _ in ids],
    )
    by_slot = {slot: draw(st.builds(traffic, st.integers(0, 300), st.sampled_from([1, 5, 40, 200]))) for slot in slots}
    return Situation(
        current=current,
        traffic=ExpertTraffic(span_s=SPAN_S, by_slot=by_slot),
        hosts=replace(hosts, shards=hosts.shards[num_leaving:]),
        goal=BalanceGoal(min_copies=min_copies, min_samples=1),
    )


def traffic(activations: int, rows_each: int) -> SlotTraffic:
    return SlotTraffic(activations * rows_each, activations)


def states(situation: Situation, plan: Plan) -> Iterator[tuple[str, ExpertPlacement]]:
    """What shards hold before, between and after the stages."""
    state = situation.current
    for stage in plan.stages:
        state = replace(stage, removals=()).applied_to(state)
        yield "loaded", state
        state = replace(stage, additions=()).applied_to(state)
        yield "dropped", state


PROPERTY = settings(max_examples=60, deadline=None)


@PROPERTY
@given(situations())
def test_on_the_way_every_expert_has_a_copy_that_serves(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        lost = {slot for slot in situation.current.slots if not situation.living(situation.current, slot)}
        for _when, state in states(situation, outcome):
            without = {slot for slot in situation.current.slots if not situation.living(state, slot)}
            assert without <= lost
            lost &= without
        assert not lost
        assert set(outcome.placement.slots_by_shard) == set(situation.nodes)


@PROPERTY
@given(situations())
def test_on_the_way_no_shard_loads_more_than_it_has_memory_for(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        most = situation.hosts.max_slots
        held = {shard: len(situation.current.slots_of(shard)) for shard in most}
        for when, state in states(situation, outcome):
            for shard in most:
                now = len(state.slots_of(shard))
                assert now <= max(most[shard], held[shard]), (when, shard)
                held[shard] = now


@PROPERTY
@given(situations())
def test_the_stages_lead_to_the_placement_that_the_plan_says(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        held = {(shard, slot) for shard, slots in situation.current.slots_by_shard.items() for slot in slots}
        for stage in outcome.stages:
            assert held.isdisjoint(stage.additions)
            held |= set(stage.additions)
            assert held.issuperset(stage.removals)
            held -= set(stage.removals)
        *_, (_when, last) = states(situation, outcome)
        for shard in situation.nodes:
            assert set(last.slots_of(shard)) == set(outcome.placement.slots_of(shard))
        assert all(not last.slots_of(shard) for shard in last.slots_by_shard if shard not in situation.nodes)


@PROPERTY
@given(situations())
def test_copies_are_never_fewer_than_wished_unless_they_were(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        for slot in situation.current.slots:
            before = situation.num_copies(situation.current, slot)
            assert situation.num_copies(outcome.placement, slot) >= max(1, min(before, situation.goal.min_copies))


@PROPERTY
@given(situations())
def test_copies_stay_on_as_many_hosts_as_wished(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        for slot in situation.current.slots:
            before = situation.num_nodes(situation.current, slot)
            assert situation.num_nodes(outcome.placement, slot) >= min(before, situation.goal.min_copies)


@PROPERTY
@given(situations())
def test_a_second_rebalance_right_after_refuses(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        again = rebalance(outcome.placement, situation.traffic, situation.hosts, situation.goal)
        assert isinstance(again, Refusal), again


@PROPERTY
@given(situations())
def test_the_same_situation_leads_to_the_same_outcome(situation: Situation) -> None:
    assert situation.rebalance() == situation.rebalance()


@PROPERTY
@given(situations(steady=True))
def test_a_plan_makes_no_layer_slower_and_the_whole_faster(situation: Situation) -> None:
    outcome = situation.rebalance()
    if isinstance(outcome, Plan):
        assert outcome.after.wait_s < outcome.before.wait_s
        assert outcome.after.imbalance < outcome.before.imbalance
        for layer, busy in outcome.after.busy_by_layer.items():
            before = outcome.before.busy_by_layer[layer]
            assert max(busy) <= max(before) + 0.01 * sum(before) / len(before)
