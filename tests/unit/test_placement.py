from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from experts.epoch import Epoch, ShardAddress
from experts.placement import ExpertPlacement, ShardId, Slot, place


def ids(count: int) -> list[ShardId]:
    return [ShardId(f"shard-{index}") for index in range(count)]


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, list[int], int, int]:
    num_shards = draw(st.integers(1, 11))
    layers = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True))
    num_experts = draw(st.integers(1, 40))
    copies = draw(st.integers(1, num_shards))
    placement = place(moe_layers=layers, num_experts=num_experts, shard_ids=ids(num_shards), copies=copies)
    return placement, layers, num_experts, copies


@given(placements())
def test_every_expert_has_exactly_its_copies_on_different_shards(
    made: tuple[ExpertPlacement, list[int], int, int],
) -> None:
    placement, layers, num_experts, copies = made
    wanted = {Slot(layer, expert) for layer in layers for expert in range(num_experts)}
    assert set(placement.slots) == wanted
    for slot in wanted:
        assert len(set(placement.shards_of(slot))) == len(placement.shards_of(slot)) == copies


@given(placements())
def test_shards_differ_by_one_slot_at_most_per_layer_and_in_total(
    made: tuple[ExpertPlacement, list[int], int, int],
) -> None:
    placement, layers, _num_experts, _copies = made
    totals = [len(slots) for slots in placement.slots_by_shard.values()]
    assert max(totals) - min(totals) <= 1
    for layer in layers:
        counts = [sum(slot.layer == layer for slot in slots) for slots in placement.slots_by_shard.values()]
        assert max(counts) - min(counts) <= 1


@given(placements())
def test_the_two_directions_of_a_placement_agree(made: tuple[ExpertPlacement, list[int], int, int]) -> None:
    placement = made[0]
    forward = {(shard, slot) for shard, slots in placement.slots_by_shard.items() for slot in slots}
    backward = {(shard, slot) for slot in placement.slots for shard in placement.shards_of(slot)}
    assert forward == backward


@st.composite
def tight_deals(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of place with shards of any size on any nodes, and at least room for all copies."""
    shard_ids = ids(draw(st.integers(1, 7)))
    layers, num_experts = list(range(draw(st.integers(1, 4)))), draw(st.integers(1, 9))
    copies = draw(st.integers(1, min(3, len(shard_ids))))
    num_slots = len(layers) * num_experts
    max_slots = {shard_id: draw(st.integers(0, num_slots + 3)) for shard_id in shard_ids}
    assume(sum(min(num_slots, most) for most in max_slots.values()) >= num_slots * copies)
    nodes = {shard_id: f"node-{draw(st.integers(0, 3))}" for shard_id in shard_ids}
    return {
        "moe_layers": layers,
        "num_experts": num_experts,
        "shard_ids": shard_ids,
        "copies": copies,
        "max_slots": max_slots,
        "nodes": nodes,
    }


@given(tight_deals())
def test_whatever_fits_is_placed_within_each_shards_memory(deal: dict[str, Any]) -> None:
    placement = place(**deal)
    assert len(placement.slots) == len(deal["moe_layers"]) * deal["num_experts"]
    assert all(len(placement.shards_of(slot)) == deal["copies"] for slot in placement.slots)
    for shard_id, slots in placement.slots_by_shard.items():
        assert len(slots) <= deal["max_slots"][shard_id]
    assert placement == place(**deal)


@given(tight_deals())
def test_copies_lie_on_different_nodes_where_the_nodes_have_the_room(deal: dict[str, Any]) -> None:
    num_slots = len(deal["moe_layers"]) * deal["num_experts"]
    room = Counter[str]()
    for shard_id, most in deal["max_slots"].items():
        room[deal["nodes"][shard_id]] += min(most, num_slots)
    assume(sum(min(num_slots, most) for most in room.values()) >= num_slots * deal["copies"])
    placement = place(**deal)
    for slot in placement.slots:
        assert len({deal["nodes"][shard] for shard in placement.shards_of(slot)}) == deal["copies"]


@pytest.mark.parametrize("num_shards", [3, 5, 11])
def test_small_shards_are_full_in_step_with_the_layers_and_large_ones_take_the_rest(num_shards: int) -> None:
    small, *large = ids(num_shards)
    placement = place(moe_layers=range(8), num_experts=16, shard_ids=[small, *large], max_slots={small: 8})
    per_layer = Counter(slot.layer for slot in placement.slots_by_shard[small])
    assert per_layer == dict.fromkeys(range(8), 1)
    totals = [len(placement.slots_by_shard[shard_id]) for shard_id in large]
    assert sum(totals) == 8 * 15
    assert max(totals) - min(totals) <= 1


def test_one_shard_alone_on_its_node_gets_a_copy_of_everything() -> None:
    a, b, c = ids(3)
    nodes = {a: "north", b: "north", c: "south"}
    placement = place(moe_layers=[1], num_experts=6, shard_ids=[a, b, c], copies=2, nodes=nodes)
    assert {shard: len(slots) for shard, slots in placement.slots_by_shard.items()} == {a: 3, b: 3, c: 6}


def test_a_shard_that_must_hold_everything_comes_before_a_better_node() -> None:
    a, b, c = ids(3)
    nodes = {a: "north", b: "north", c: "south"}
    sizes = {a: 4, b: 2, c: 2}
    placement = place(moe_layers=[1], num_experts=4, shard_ids=[a, b, c], copies=2, nodes=nodes, max_slots=sizes)
    assert {shard: len(slots) for shard, slots in placement.slots_by_shard.items()} == sizes


def test_three_shards_share_sixteen_experts_unevenly() -> None:
    placement = place(moe_layers=[1, 3], num_experts=16, shard_ids=ids(3))
    assert Counter(len(slots) for slots in placement.slots_by_shard.values()) == {11: 2, 10: 1}


def test_more_shards_than_slots_leave_some_empty() -> None:
    placement = place(moe_layers=[0], num_experts=2, shard_ids=ids(5))
    assert [len(slots) for slots in placement.slots_by_shard.values()] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_ids": []}, "shard_ids is empty"),
        ({"shard_ids": ["a", "a"]}, "shard_ids must be distinct, got ['a', 'a']"),
        ({"moe_layers": [1, 1]}, "moe_layers must be distinct, got [1, 1]"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"copies": 3}, "copies must be between 1 and the number of shards (2), got 3"),
        ({"copies": 0}, "got 0"),
        ({"max_slots": {"a": 2, "b": 1}}, "4 slots in 1 copies are 1 more than there is room"),
    ],
)
def test_place_names_the_argument_it_cannot_use(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"moe_layers": [1], "num_experts": 4, "shard_ids": ["a", "b"], "copies": 1}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is compared below
        place(**{**good, **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_placement_with_a_slot_twice_on_a_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="names a slot twice"):
        ExpertPlacement(slots_by_shard={ShardId("a"): (Slot(1, 2), Slot(1, 2))})


def address(shard_id: ShardId, port: int = 1) -> ShardAddress:
    return ShardAddress(shard_id=shard_id, node_id="node", host="10.0.0.1", port=port)


@given(placements())
def test_an_epoch_survives_the_way_through_plain_dicts(made: tuple[ExpertPlacement, list[int], int, int]) -> None:
    shards = tuple(address(shard_id, port) for port, shard_id in enumerate(made[0].slots_by_shard))
    epoch = Epoch(number=3, weights_version=2, shards=shards, placement=made[0])
    again = Epoch.from_dict(epoch.to_dict())
    assert again == epoch
    assert again.placement.shards_of(epoch.placement.slots[0]) == epoch.placement.shards_of(epoch.placement.slots[0])


def test_an_epoch_that_places_slots_on_a_stranger_is_refused() -> None:
    placement = ExpertPlacement(slots_by_shard={ShardId("b"): (Slot(1, 0),)})
    with pytest.raises(ValueError, match=r"without an address: \['b'\]"):
        Epoch(number=1, weights_version=0, shards=(address(ShardId("a")),), placement=placement)
