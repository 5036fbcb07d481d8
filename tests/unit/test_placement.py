from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
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
