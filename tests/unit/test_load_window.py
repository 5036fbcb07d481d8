from __future__ import annotations

import pytest

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.load_window import LoadWindow
from experts.placement import ShardId, Slot

A, B = ShardId("a"), ShardId("b")
X, Y = Slot(1, 0), Slot(1, 1)


def test_nothing_is_known_before_the_first_report() -> None:
    assert LoadWindow(60.0).traffic(5.0) == ExpertTraffic(span_s=0.0, by_slot={})


def test_a_moment_has_no_traffic() -> None:
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(0, 0)}, 5.0)
    window.report(A, {X: SlotTraffic(9, 3)}, 5.0)
    assert window.traffic(5.0) == ExpertTraffic(span_s=0.0, by_slot={})
    assert window.traffic(6.0).of(X) == SlotTraffic(9, 3)


def test_traffic_is_what_counters_have_grown_by_over_all_shards() -> None:
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(1000, 100)}, 0.0)
    window.report(B, {X: SlotTraffic(0, 0), Y: SlotTraffic(0, 0)}, 1.0)
    window.report(A, {X: SlotTraffic(1010, 103)}, 2.0)
    window.report(B, {X: SlotTraffic(5, 5), Y: SlotTraffic(7, 1)}, 3.0)
    assert window.traffic(4.0) == ExpertTraffic(span_s=4.0, by_slot={X: SlotTraffic(15, 8), Y: SlotTraffic(7, 1)})


def test_what_a_shard_did_before_it_was_known_does_not_count() -> None:
    """A controller that is reborn meets shards that have been at work for days."""
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(10**9, 10**8)}, 0.0)
    assert window.traffic(1.0).by_slot == {}


def test_what_is_older_than_the_window_is_forgotten() -> None:
    window = LoadWindow(10.0)
    for second in range(31):
        window.report(A, {X: SlotTraffic(100 if second > 5 else 0, 1 if second > 5 else 0)}, float(second))
        if second == 8:
            assert window.traffic(8.0).of(X) == SlotTraffic(100, 1)
    assert window.traffic(30.0).of(X) == SlotTraffic(0, 0)
    assert 9.0 <= window.traffic(30.0).span_s <= 10.0


def test_a_slot_that_was_dropped_and_loaded_again_counts_from_zero() -> None:
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(500, 50)}, 0.0)
    window.report(A, {X: SlotTraffic(20, 2)}, 1.0)
    assert window.traffic(2.0).of(X) == SlotTraffic(20, 2)


def test_a_slot_that_a_known_shard_loads_counts_from_the_beginning() -> None:
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(500, 50)}, 0.0)
    window.report(A, {X: SlotTraffic(500, 50), Y: SlotTraffic(30, 3)}, 1.0)
    assert window.traffic(2.0).by_slot == {Y: SlotTraffic(30, 3)}


def test_a_shard_that_has_gone_still_counts_until_it_is_old() -> None:
    window = LoadWindow(60.0)
    window.report(A, {X: SlotTraffic(0, 0)}, 0.0)
    window.report(A, {X: SlotTraffic(9, 3)}, 1.0)
    window.forget(A)
    assert window.traffic(2.0).of(X) == SlotTraffic(9, 3)
    window.report(A, {X: SlotTraffic(12, 4)}, 3.0)
    assert window.traffic(4.0).of(X) == SlotTraffic(9, 3)


def test_a_window_must_have_a_length() -> None:
    with pytest.raises(ValueError, match="window_s must be positive, got 0"):
        LoadWindow(0.0)
