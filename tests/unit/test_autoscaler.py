"""How many shards there should be: one test per situation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.balance.autoscaler import ShardScaling, Trend, desired_shards

SCALING = ShardScaling(min_shards=2, max_shards=5, target_busy=0.6, margin=0.1, up_delay_s=30.0, down_delay_s=600.0)


def look(
    num_shards: int, busy: float | None, *, now_s: float = 0.0, trend: Trend | None = None, num_ready: int | None = None
) -> tuple[int, Trend]:
    return desired_shards(
        num_shards=num_shards,
        num_ready=num_shards if num_ready is None else num_ready,
        busy=busy,
        trend=trend or Trend(),
        now_s=now_s,
        scaling=SCALING,
    )


def follow(num_shards: int, *looks: tuple[float, float | None]) -> list[int]:
    """What is decided at each (time, busy), each step being done at once."""
    trend, decided = Trend(), []
    for now_s, busy in looks:
        num_shards, trend = look(num_shards, busy, now_s=now_s, trend=trend)
        decided.append(num_shards)
    return decided


def test_shards_that_are_as_busy_as_they_should_be_stay() -> None:
    assert follow(3, (0, 0.6), (1000, 0.55), (2000, 0.6)) == [3, 3, 3]


def test_shards_too_busy_for_long_enough_get_one_more() -> None:
    assert follow(3, (0, 0.7), (29, 0.7), (30, 0.7)) == [3, 3, 4]


def test_a_step_is_followed_by_another_only_after_another_delay() -> None:
    assert follow(2, (0, 0.9), (30, 0.9), (31, 0.9), (60, 0.9), (61, 0.9)) == [2, 3, 3, 3, 4]


def test_a_moment_of_rest_begins_the_delay_anew() -> None:
    assert follow(3, (0, 0.9), (20, 0.5), (25, 0.9), (40, 0.9), (55, 0.9)) == [3, 3, 3, 3, 4]


def test_one_shard_goes_when_the_others_would_long_have_managed() -> None:
    # Two would be 0.45 busy: 0.3 * 3 / 2.
    assert follow(3, (0, 0.3), (599, 0.3), (600, 0.3)) == [3, 3, 2]


def test_no_shard_goes_when_the_others_would_come_near_the_target() -> None:
    # Two would be 0.51 busy, above target less margin.
    assert follow(3, (0, 0.34), (5000, 0.34)) == [3, 3]


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_what_one_step_does_the_load_alone_does_not_undo(num_shards: int) -> None:
    busy = 0.61
    assert follow(num_shards, (0, busy), (30, busy)) == [num_shards, num_shards + 1]
    spread = busy * num_shards / (num_shards + 1)
    assert follow(num_shards + 1, (0, spread), (10000, spread)) == [num_shards + 1, num_shards + 1]


def test_bounds_hold() -> None:
    assert follow(5, (0, 1.0), (1000, 1.0)) == [5, 5]
    assert follow(2, (0, 0.0), (1000, 0.0)) == [2, 2]


def test_a_pool_outside_its_bounds_goes_there_step_by_step_without_delay() -> None:
    assert look(1, 0.0)[0] == 2
    assert look(7, 1.0)[0] == 6


def test_nothing_is_decided_while_the_last_step_is_under_way() -> None:
    trend = Trend(too_busy_since_s=0.0)
    assert look(4, 1.0, now_s=1000.0, trend=trend, num_ready=3) == (4, Trend())


def test_what_is_not_known_ends_a_trend() -> None:
    assert follow(3, (0, 0.9), (20, None), (40, 0.9), (69, 0.9), (70, 0.9)) == [3, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_shards": 0}, r"min_shards must be between 1 and max_shards \(5\), got 0"),
        ({"max_shards": 1}, r"min_shards must be between 1 and max_shards \(1\), got 2"),
        ({"target_busy": 1.0}, "target_busy must be between margin and 1"),
        ({"margin": 0.7}, "got 0.6 and 0.7"),
        ({"up_delay_s": -1.0}, "up_delay_s must not be negative, got -1"),
    ],
)
def test_a_scaling_names_the_value_that_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SCALING, **values)
