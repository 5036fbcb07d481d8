from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.destinations import LayerDestinations, choose_shards
from experts.placement import ShardId, Slot, place
from experts.row_plan import plan_rows
from experts.row_split import MIN_PART_ROWS

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


COPIES = {0: [A, B], 1: [A], 2: [C, B, A], 3: []}
SHARDS = [A, B, C]


def rows_by_shard(destinations: LayerDestinations, ids_TK: torch.Tensor) -> dict[int, dict[int, int]]:
    """shard's number -> expert -> rows, after making sure that each row is its expert's."""
    order = destinations.order(ids_TK)
    assert list(order.shards) == sorted(order.shards)
    plan = plan_rows(ids_TK, order)
    found: dict[int, dict[int, int]] = {}
    for span, rank in zip(plan.spans, plan.ranks, strict=True):
        copies = plan.copy_of_row_R[span.start : span.stop]
        assert set(ids_TK.reshape(-1)[torch.from_numpy(copies)].tolist()) == {span.expert}
        assert sorted(copies) == list(copies), "in the order of the tokens"
        of_shard = found.setdefault(order.shards[rank], {})
        assert span.expert not in of_shard
        of_shard[span.expert] = span.stop - span.start
        assert list(of_shard) == sorted(of_shard)
    return found


def test_rows_of_a_hot_expert_go_to_all_its_copies_and_shards_come_out_even() -> None:
    ids_T1 = torch.tensor([0] * 300 + [1] * 100 + [0] * 100)[torch.randperm(500)].reshape(-1, 1)
    found = rows_by_shard(LayerDestinations(COPIES, SHARDS, offset=0), ids_T1)
    assert found == {0: {0: 150, 1: 100}, 1: {0: 250}}


def test_rows_too_few_for_two_parts_stay_together() -> None:
    destinations = LayerDestinations(COPIES, SHARDS, offset=0)
    few = torch.zeros(2 * MIN_PART_ROWS - 1, 1, dtype=torch.int64)
    assert [len(rows) for rows in rows_by_shard(destinations, few).values()] == [1]
    enough = torch.zeros(2 * MIN_PART_ROWS, 1, dtype=torch.int64)
    assert rows_by_shard(destinations, enough) == {0: {0: MIN_PART_ROWS}, 1: {0: MIN_PART_ROWS}}


def test_beside_a_hot_expert_one_without_a_copy_is_missing_and_one_that_is_nowhere_is_told() -> None:
    copies = {**COPIES, 5: [A]}
    destinations = LayerDestinations(copies, SHARDS, offset=0)
    ids_T1 = torch.tensor([4] + [0] * 100 + [3] * 2).reshape(-1, 1)
    found = rows_by_shard(destinations, ids_T1)
    assert (found[destinations.missing], found[destinations.unplaced]) == ({3: 2}, {4: 1})


def test_an_expert_above_all_others_is_an_index_error() -> None:
    destinations = LayerDestinations(COPIES, SHARDS, offset=0)
    above_T1 = torch.tensor([0] * 100 + [6]).reshape(-1, 1)
    with pytest.raises(IndexError):
        destinations.order(above_T1)


@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=1, max_size=400), st.integers(1, 2), st.integers(0, 10))
def test_every_row_goes_to_one_place(ids: list[int], top_k: int, offset: int) -> None:
    ids_TK = torch.tensor(ids[: len(ids) // top_k * top_k] or [0, 1][:top_k]).reshape(-1, top_k)
    found = rows_by_shard(LayerDestinations(COPIES, SHARDS, offset=offset), ids_TK)
    totals: Counter[int] = Counter()
    for shard, rows in found.items():
        totals.update(rows)
        assert all(shard == 3 if expert == 3 else SHARDS[shard] in COPIES[expert] for expert in rows)
    assert totals == Counter(ids_TK.reshape(-1).tolist())
