"""What a shard computes next. Rows carry their request's number and their place, so that each can be told."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.message import Identity, request_header
from experts.placement import Slot, WeightSlot
from experts.tiles import ExpertTile, TileQueue
from experts.transport.base import RowRequest


class Lane:
    """Stands for a lane; the queue only compares it."""


def request(layer: int, rows_per_expert: dict[int, int], weights_version: int = 0) -> RowRequest:
    pairs = tuple(sorted(rows_per_expert.items()))
    header = request_header(Identity(1, weights_version, 1, 1, layer, 0, 0), pairs)
    return RowRequest(header=header, rows_per_expert=pairs, x_RD=torch.zeros(header.num_rows, 1))


def shape(tiles: list[ExpertTile]) -> list[tuple[int, int, list[int]]]:
    return [(tile.slot.layer, tile.slot.expert, [len(part) for part in tile.parts_RD]) for tile in tiles]


def filled(tile_rows: int, *requests: RowRequest) -> TileQueue:
    queue = TileQueue(tile_rows)
    for one in requests:
        queue.add(Lane(), one)  # type: ignore[arg-type]
    return queue


def test_rows_of_one_expert_from_several_lanes_are_computed_together() -> None:
    queue = filled(256, request(1, {0: 3, 2: 1}), request(1, {2: 5}), request(1, {0: 2, 2: 4}))
    assert shape(queue.take()) == [(1, 0, [3, 2]), (1, 2, [1, 5, 4])]
    assert len(queue.pop_finished()) == 3
    assert not queue


def test_rows_of_another_layer_do_not_join() -> None:
    queue = filled(256, request(1, {0: 3}), request(3, {0: 2}))
    assert shape(queue.take()) == [(1, 0, [3])]
    assert len(queue.pop_finished()) == 1
    assert shape(queue.take()) == [(3, 0, [2])]


def test_rows_for_another_version_of_the_weights_do_not_join() -> None:
    queue = filled(256, request(1, {0: 3}), request(1, {0: 2}, weights_version=1))
    assert queue.slots == {WeightSlot(0, 1, 0), WeightSlot(1, 1, 0)}
    assert [(tile.slot, len(tile.parts_RD)) for tile in queue.take()] == [(WeightSlot(0, 1, 0), 1)]
    queue.pop_finished()
    assert [(tile.slot, len(tile.parts_RD)) for tile in queue.take()] == [(WeightSlot(1, 1, 0), 1)]


def test_a_short_message_is_served_after_one_tile_of_a_long_one_and_lets_it_go_on() -> None:
    long, short = request(1, {0: 600, 1: 600}), request(3, {5: 2})
    queue = filled(256, long, short)
    assert shape(queue.take()) == [(1, 0, [256])]
    assert shape(queue.take()) == [(3, 5, [2])]
    assert [finished for _lane, finished in queue.pop_finished()] == [short]
    assert shape(queue.take()) == [(1, 0, [256])]


def test_a_stream_of_short_messages_does_not_starve_a_long_one() -> None:
    queue = filled(256, request(1, {0: 1000}))
    taken = 0
    for _turn in range(9):
        queue.add(Lane(), request(3, {5: 2}))  # type: ignore[arg-type]
        taken += sum(len(part) for tile in queue.take() if tile.slot.layer == 1 for part in tile.parts_RD)
        queue.pop_finished()
    assert taken == 1000


def test_a_dead_lanes_requests_are_forgotten() -> None:
    queue = TileQueue(256)
    lanes = [Lane(), Lane()]
    for lane in lanes:
        queue.add(lane, request(1, {0: 4}))  # type: ignore[arg-type]
    queue.drop(lanes[0])  # type: ignore[arg-type]
    assert shape(queue.take()) == [(1, 0, [4])]


requests = st.lists(
    st.tuples(st.integers(1, 2), st.dictionaries(st.integers(0, 4), st.integers(1, 30), min_size=1)), max_size=6
)


@given(requests, st.integers(1, 16))
def test_every_row_is_handed_out_once_and_to_its_own_expert(
    described: list[tuple[int, dict[int, int]]], tile_rows: int
) -> None:
    made = [request(layer, rows) for layer, rows in described]
    queue = filled(tile_rows, *made)
    finished: list[RowRequest] = []
    while queue:
        for tile in queue.take():
            assert sum(len(part) for part in tile.parts_RD) <= tile_rows
            for part in tile.parts_RD:
                assert len(part) > 0
                # Handed out once: still zero; the mark says by which slot.
                assert not part.any()
                part.fill_(_mark(tile.slot.slot))
        finished.extend(one for _lane, one in queue.pop_finished())
    assert sorted(map(id, finished)) == sorted(map(id, made))
    for one in made:
        layer = one.header.identity.layer
        wanted = [_mark(Slot(layer, expert)) for expert, rows in one.rows_per_expert for _row in range(rows)]
        assert one.x_RD[:, 0].tolist() == wanted


def _mark(slot: Slot) -> float:
    return slot.layer * 100.0 + slot.expert + 1


def test_a_request_is_popped_whole_only_if_it_is_alone_untouched_and_no_larger_than_a_tile() -> None:
    alone = filled(4, request(1, {0: 3, 2: 1}))
    popped = alone.pop_whole()
    assert popped is not None
    assert popped[1].rows_per_expert == ((0, 3), (2, 1))
    assert not alone
    assert filled(4).pop_whole() is None
    assert filled(4, request(1, {0: 5})).pop_whole() is None
    assert filled(4, request(1, {0: 1}), request(3, {0: 1})).pop_whole() is None
    begun = filled(2, request(1, {0: 1}), request(1, {0: 1, 2: 1}))
    # The first leads, the second's row for the same expert joins.
    assert shape(begun.take()) == [(1, 0, [1, 1])]
    assert len(begun.pop_finished()) == 1
    assert begun.pop_whole() is None
    assert shape(begun.take()) == [(1, 2, [1])]
