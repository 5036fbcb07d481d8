from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from experts.destinations import choose_shards
from experts.placement import ShardId, Slot, place

A, B, C = ShardId("a"), ShardId("b"), ShardId("c")


def test_an_expert_without_a_copy_has_no_destination() -> None:
    assert choose_shards({0: [A], 1: [], 2: [B]}, offset=0) == {0: A, 2: B}


def test_experts_with_a_choice_avoid_the_shards_of_those_without_one() -> None:
    copies = {0: [A], 1: [A, B], 2: [A], 3: [A, B]}
    # With offset 1 the turn would be A's.
    assert [choose_shards(copies, offset=offset) for offset in (0, 1)] == [{0: A, 1: B, 2: A, 3: B}] * 2


def test_lanes_prefer_different_copies() -> None:
    assert {choose_shards({4: [A, B, C]}, offset=offset)[4] for offset in range(3)} == {A, B, C}


@given(st.integers(2, 6), st.integers(0, 10), st.sets(st.integers(0, 31), min_size=1))
def test_with_two_copies_activated_experts_spread_over_the_shards(
    num_shards: int, offset: int, activated: set[int]
) -> None:
    shard_ids = [ShardId(str(index)) for index in range(num_shards)]
    placement = place(moe_layers=[1], num_experts=32, shard_ids=shard_ids, copies=2)
    copies = {expert: placement.shards_of(Slot(1, expert)) for expert in sorted(activated)}
    chosen = choose_shards(copies, offset=offset)
    assert set(chosen) == activated
    assert all(shard in copies[expert] for expert, shard in chosen.items())
    assert chosen == choose_shards(copies, offset=offset)
    # Never worse than everything on first copies.
    assert max(Counter(chosen.values()).values()) <= max(Counter(shards[0] for shards in copies.values()).values()) + 1
