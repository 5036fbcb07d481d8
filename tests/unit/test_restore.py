"""Where experts go whose shard is lost or leaves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from expert_fleets import SLOT_BYTES, fleet, shard_ids

from cluster.balance.fleet import Fleet
from cluster.balance.plan import PlacedSlot, Refusal, RefusalReason
from cluster.balance.restore import restore
from experts.placement import ExpertPlacement, ShardId, Slot, place

LAYERS = (1, 3)
A, B, C, D = shard_ids(4)


def without(hosts: Fleet, *lost: ShardId) -> Fleet:
    return replace(hosts, shards=tuple(shard for shard in hosts.shards if shard.shard_id not in lost))


def dealt(num_shards: int, *, copies: int = 1) -> ExpertPlacement:
    return place(moe_layers=LAYERS, num_experts=8, shard_ids=shard_ids(num_shards), copies=copies)


def test_nothing_is_to_be_done_while_every_expert_has_its_copies() -> None:
    assert restore(dealt(4, copies=2), fleet([8] * 4), min_copies=2) == ()


def test_the_experts_of_a_lost_shard_are_spread_over_the_others_and_nothing_else_moves() -> None:
    current = dealt(4)
    outcome = restore(current, without(fleet([8] * 4), D), min_copies=1)
    assert not isinstance(outcome, Refusal)
    (stage,) = outcome
    assert {slot for _shard, slot in stage.additions} == set(current.slots_of(D))
    assert set(stage.removals) == {PlacedSlot(D, slot) for slot in current.slots_of(D)}
    counts = Counter(shard for shard, _slot in stage.additions)
    assert set(counts) == {A, B, C}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_an_expert_that_keeps_a_copy_gets_none_unless_more_are_wished() -> None:
    current = dealt(4, copies=2)
    left = without(fleet([16] * 4), D)
    outcome = restore(current, left, min_copies=1)
    assert not isinstance(outcome, Refusal)
    assert outcome[0].additions == ()
    assert set(outcome[0].removals) == {PlacedSlot(D, slot) for slot in current.slots_of(D)}
    again = restore(current, left, min_copies=2)
    assert not isinstance(again, Refusal)
    assert {slot for _shard, slot in again[0].additions} == set(current.slots_of(D))


def test_the_last_room_goes_to_experts_without_a_copy() -> None:
    slots = {A: (Slot(1, 0), Slot(1, 1)), B: (Slot(1, 1), Slot(1, 2)), C: (Slot(1, 3),), D: (Slot(1, 3), Slot(1, 2))}
    current = ExpertPlacement(slots_by_shard=slots)
    outcome = restore(current, without(fleet([2, 3, 1, 2]), A), min_copies=2)
    assert not isinstance(outcome, Refusal)
    assert outcome[0].additions == (PlacedSlot(B, Slot(1, 0)),)


def test_new_copies_prefer_hosts_without_one() -> None:
    hosts = fleet([8, 1, 8], nodes=["north", "south", "north"])
    current = ExpertPlacement(slots_by_shard={A: (Slot(1, 0), Slot(1, 1), Slot(1, 2)), B: (), C: ()})
    outcome = restore(current, hosts, min_copies=2)
    assert not isinstance(outcome, Refusal)
    # South has room for one; the others go beside the first copy rather than nowhere.
    assert [shard for shard, _slot in outcome[0].additions] == [B, C, C]


def test_as_many_copies_as_there_are_shards_will_do() -> None:
    assert restore(dealt(2, copies=2), fleet([16, 16]), min_copies=5) == ()


def test_where_experts_would_have_no_place_it_says_how_much_is_missing() -> None:
    outcome = restore(dealt(4), without(fleet([4, 5, 5, 4]), D), min_copies=1)
    assert isinstance(outcome, Refusal)
    assert outcome.reason is RefusalReason.NO_ROOM
    assert outcome.missing_bytes == 2 * SLOT_BYTES
    assert "2 of 16 experts have no place on 3 shards: 2000 bytes are missing" in outcome.sentence
    assert not isinstance(restore(dealt(4), without(fleet([4, 6, 6, 4]), D), min_copies=1), Refusal)


def test_all_shards_lost_and_one_new() -> None:
    hosts = without(fleet([0, 0, 0, 0, 16]), A, B, C, D)
    outcome = restore(dealt(4), hosts, min_copies=2)
    assert not isinstance(outcome, Refusal)
    assert {shard for shard, _slot in outcome[0].additions} == {hosts.shard_ids[0]}
    assert len(outcome[0].additions) == 16
