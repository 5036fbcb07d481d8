"""More and fewer shards, by examples and by random changes one after the other."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.resize import resize
from experts.placement import ExpertPlacement, ShardId, Slot, place

LAYERS = (1, 3, 5)


def names(count: int) -> list[ShardId]:
    return [ShardId(f"shard-{index}") for index in range(count)]


def placed(num_shards: int, *, num_experts: int = 8, copies: int = 1) -> ExpertPlacement:
    return place(moe_layers=LAYERS, num_experts=num_experts, shard_ids=names(num_shards), copies=copies)


def num_moved(before: ExpertPlacement, after: ExpertPlacement) -> int:
    """Slots that a shard must load."""
    return sum(
        len(set(slots) - set(before.slots_by_shard.get(shard, ()))) for shard, slots in after.slots_by_shard.items()
    )


@pytest.mark.parametrize(("old", "new", "moved"), [(2, 3, 8), (3, 2, 8), (4, 4, 0), (1, 2, 12), (5, 2, 15)])
def test_only_what_must_move_moves(old: int, new: int, moved: int) -> None:
    before = placed(old)
    after = resize(before, names(new))
    assert num_moved(before, after) <= moved


def test_of_more_copies_than_there_will_be_shards_the_rest_goes() -> None:
    hot, cold = Slot(1, 0), Slot(1, 1)
    spread = ExpertPlacement(
        slots_by_shard={shard: (hot, cold)[: 2 - index % 2] for index, shard in enumerate(names(4))}
    )
    after = resize(spread, names(2))
    assert [set(slots) for slots in after.slots_by_shard.values()] == [{hot, cold}, {hot, cold}]
    alone = resize(ExpertPlacement(slots_by_shard={names(2)[0]: (hot, cold), names(2)[1]: (hot,)}), names(1))
    assert alone.slots_by_shard == {names(1)[0]: (hot, cold)}
    with pytest.raises(ValueError, match="between 2, the copies of an expert"):
        resize(spread, names(1))


def test_a_new_shard_gets_its_share_of_every_layer() -> None:
    after = resize(placed(2), names(3))
    for slots in after.slots_by_shard.values():
        assert set(Counter(slot.layer for slot in slots).values()) <= {2, 3}


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    num_experts=st.sampled_from([4, 7, 16]),
    copies=st.integers(1, 3),
)
def test_every_copy_stays_and_counts_are_even(sizes: list[int], num_experts: int, copies: int) -> None:
    sizes = [max(size, copies) for size in sizes]
    placement = placed(sizes[0], num_experts=num_experts, copies=copies)
    for size in sizes[1:]:
        placement = resize(placement, names(size))
        counts = [len(slots) for slots in placement.slots_by_shard.values()]
        assert list(placement.slots_by_shard) == names(size)
        assert max(counts) - min(counts) <= 1
        copies_of = [len(placement.shards_of(Slot(layer, expert))) for layer in LAYERS for expert in range(num_experts)]
        assert set(copies_of) == {copies}


@pytest.mark.parametrize(("copies", "count"), [(2, 1), (1, 0), (1, 25)])
def test_a_number_that_cannot_be_is_refused_with_the_bounds(copies: int, count: int) -> None:
    with pytest.raises(ValueError, match=rf"shards must be between {copies}, .* and {24 * copies}, .* not {count}"):
        resize(placed(3, copies=copies), names(count))
