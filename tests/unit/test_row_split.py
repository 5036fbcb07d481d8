"""Who computes which rows of a dispatch."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from experts.destinations import choose_shards
from experts.placement import ShardId
from experts.row_split import MIN_PART_ROWS, RowPart, split_rows

A, B, C = ShardId("a"), ShardId("b"), ShardId("c")


def test_an_expert_without_a_copy_has_no_part() -> None:
    assert split_rows({0: 3, 1: 4}, {0: [A], 1: []}, offset=0) == {0: (RowPart(A, 3),)}


def test_few_rows_stay_together_for_each_part_would_read_the_weights() -> None:
    assert len(split_rows({0: 63}, {0: [A, B]}, offset=0)[0]) == 1
    assert len(split_rows({0: 64}, {0: [A, B]}, offset=0)[0]) == 2


def test_many_rows_are_split_so_that_shards_come_out_even() -> None:
    parts = split_rows({0: 300, 1: 100}, {0: [A, B], 1: [A]}, offset=0)
    assert parts[1] == (RowPart(A, 100),)
    assert dict(parts[0]) == {A: 100, B: 200}


def test_a_shard_that_has_enough_to_do_gets_no_part() -> None:
    parts = split_rows({0: 300, 1: 500}, {0: [A, B, C], 1: [A]}, offset=0)
    assert dict(parts[0]) == {B: 150, C: 150}


def test_a_part_is_never_smaller_than_what_reading_the_weights_costs_anyway() -> None:
    parts = split_rows({0: 300, 1: 290}, {0: [A, B], 1: [A]}, offset=0)
    assert parts[0] == (RowPart(B, 300),)


def test_few_rows_weigh_as_much_as_reading_the_weights() -> None:
    # Two experts with a row each on A cost as much as one with 64.
    rows = {0: 1, 1: 1, 2: 40, 3: 1}
    parts = split_rows(rows, {0: [A], 1: [A], 2: [B], 3: [A, B]}, offset=1)
    assert parts[3] == (RowPart(B, 1),)


def test_lanes_prefer_different_copies() -> None:
    assert {split_rows({4: 1}, {4: [A, B, C]}, offset=offset)[4][0].shard_id for offset in range(3)} == {A, B, C}


@st.composite
def dispatches(draw: st.DrawFn) -> tuple[dict[int, int], dict[int, list[ShardId]], int]:
    shards = [ShardId(str(index)) for index in range(draw(st.integers(1, 5)))]
    experts = sorted(draw(st.sets(st.integers(0, 20), min_size=1, max_size=10)))
    rows = {expert: draw(st.integers(1, 2000)) for expert in experts}
    copies = {expert: draw(st.lists(st.sampled_from(shards), unique=True)) for expert in experts}
    return rows, copies, draw(st.integers(0, 9))


@given(dispatches())
def test_every_row_goes_to_exactly_one_copy(dispatch: tuple[dict[int, int], dict[int, list[ShardId]], int]) -> None:
    rows, copies, offset = dispatch
    parts = split_rows(rows, copies, offset=offset)
    assert set(parts) == {expert for expert in rows if copies[expert]}
    for expert, expert_parts in parts.items():
        assert sum(part.num_rows for part in expert_parts) == rows[expert]
        shards = [part.shard_id for part in expert_parts]
        assert len(set(shards)) == len(shards)
        assert set(shards) <= set(copies[expert])
        if len(expert_parts) > 1:
            assert min(part.num_rows for part in expert_parts) >= MIN_PART_ROWS


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 9))
def test_shards_that_hold_everything_come_out_even(rows: list[int], num_shards: int, offset: int) -> None:
    shards = [ShardId(str(index)) for index in range(num_shards)]
    load = Counter(dict.fromkeys(shards, 0))
    for parts in split_rows(dict(enumerate(rows)), dict.fromkeys(range(len(rows)), shards), offset=offset).values():
        load.update({part.shard_id: max(part.num_rows, MIN_PART_ROWS) for part in parts})
    assert max(load.values()) - min(load.values()) < 2 * MIN_PART_ROWS


@given(dispatches())
def test_with_few_rows_each_it_does_what_counting_experts_does(
    dispatch: tuple[dict[int, int], dict[int, list[ShardId]], int],
) -> None:
    _rows, copies, offset = dispatch
    parts = split_rows(dict.fromkeys(copies, 1), copies, offset=offset)
    assert {expert: part[0].shard_id for expert, part in parts.items()} == choose_shards(copies, offset=offset)
