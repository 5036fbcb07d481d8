from __future__ import annotations

import numpy as np
import pytest
from expert_fleets import SPAN_S, SPEED, fleet
from hypothesis import given
from hypothesis import strategies as st

from cluster.balance.busy_time import Bools, Floats, busy_s, is_splittable, samples_of, share_out
from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from experts.placement import Slot
from experts.row_split import MIN_PART_ROWS

HOSTS = fleet([1])


def test_few_rows_cost_what_reading_the_weights_costs_and_many_what_they_take_to_compute() -> None:
    reading, computing = (busy_s(SlotTraffic(rows, 10), SPAN_S, HOSTS, SPEED) * SPAN_S for rows in (10, 1000))
    assert reading == pytest.approx(10 * 1e-3)
    assert computing == pytest.approx(1000 * 1e-4)
    # Ten rows at once are where the one becomes the other.
    assert busy_s(SlotTraffic(100, 10), SPAN_S, HOSTS, SPEED) == pytest.approx(reading / SPAN_S)
    assert busy_s(SlotTraffic(0, 0), SPAN_S, HOSTS, SPEED) == 0


def test_an_expert_is_split_when_two_copies_have_enough_to_do_at_a_time() -> None:
    enough = 2 * MIN_PART_ROWS
    assert is_splittable(SlotTraffic(7 * enough, 7))
    assert not is_splittable(SlotTraffic(7 * enough - 1, 7))
    assert not is_splittable(SlotTraffic(0, 0))
    assert samples_of(SlotTraffic(7 * enough, 7)) == 7 * enough
    assert samples_of(SlotTraffic(7, 7)) == 7


def test_traffic_in_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="span_s must be positive, got 0"):
        ExpertTraffic(span_s=0.0, by_slot={Slot(1, 0): SlotTraffic(1, 1)})


def test_shares_bring_shards_to_one_level_and_leave_those_above_it_alone() -> None:
    held_ES = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    busy_ES = np.array([[6.0], [1.0], [3.0], [9.0]]) * np.ones(3)
    shares_ES = share_out(busy_ES, held_ES)
    assert (shares_ES * busy_ES).sum(axis=0).tolist() == pytest.approx([5, 5, 9])
    assert shares_ES[0].tolist() == pytest.approx([4 / 6, 2 / 6, 0])


def test_a_faster_copy_takes_more() -> None:
    shares_ES = share_out(np.array([[2.0, 1.0]]), np.array([[True, True]]))
    assert shares_ES[0].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_chain_of_copies_hands_load_on_from_shard_to_shard() -> None:
    """0 has twice what it should: 1 makes room for it on the next shard, and 2 for 1 on the one after."""
    held_ES = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    busy_ES = np.array([[6.0], [3.0], [3.0]]) * np.ones(4)
    assert (share_out(busy_ES, held_ES) * busy_ES).sum(axis=0).tolist() == pytest.approx([3, 3, 3, 3], rel=0.01)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Floats, Bools]:
    num_experts, num_shards = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    costs = draw(st.lists(st.just(0.0) | st.floats(1e-6, 10), min_size=num_experts, max_size=num_experts))
    held_ES = np.zeros((num_experts, num_shards), dtype=bool)
    for expert in range(num_experts):
        held_ES[expert, list(draw(st.sets(st.integers(0, num_shards - 1), min_size=1)))] = True
    return np.array(costs)[:, None] * np.ones(num_shards), held_ES


@given(layers())
def test_shares_add_up_to_one_over_the_copies_and_no_shard_could_hand_load_on(layer: tuple[Floats, Bools]) -> None:
    busy_ES, held_ES = layer
    shares_ES = share_out(busy_ES, held_ES)
    assert shares_ES.sum(axis=1).tolist() == pytest.approx([1] * len(shares_ES))
    assert not shares_ES[~held_ES].any()
    assert (shares_ES >= 0).all()
    loads_S = (shares_ES * busy_ES).sum(axis=0)
    slack = 0.02 * loads_S.mean() + 1e-9
    for expert, shard in np.argwhere(shares_ES * busy_ES > slack).tolist():
        assert loads_S[shard] <= loads_S[held_ES[expert]].min() + slack
