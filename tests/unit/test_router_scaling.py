"""How many routers there should be: one test per situation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.balance.router_load import RouterLoad
from cluster.balance.router_scaling import RouterScaling, wanted_routers
from router.messages import EngineStats

SCALING = RouterScaling(kv_target=0.75, waiting_tokens_target=4000, requests_target=50, margin=0.2)
IDLE = RouterLoad(kv_use=0.0, num_waiting_tokens=0, num_requests=0)


def wanted(num_routers: int, *loads: RouterLoad | None, num_queued: float = 0.0) -> int:
    return wanted_routers(num_routers=num_routers, loads=loads, num_queued=num_queued, scaling=SCALING)


def load(**values: float) -> RouterLoad:
    return replace(IDLE, **values)


def test_routers_at_their_targets_stay() -> None:
    busy = load(kv_use=0.75, num_waiting_tokens=4000, num_requests=50)
    assert wanted(2, busy, busy) == 2


@pytest.mark.parametrize("over", [{"kv_use": 0.76}, {"num_waiting_tokens": 4001}, {"num_requests": 51}])
def test_any_of_the_three_above_its_target_asks_for_more(over: dict[str, float]) -> None:
    assert wanted(1, load(**over)) == 2


def test_as_many_are_wanted_as_there_is_work_for() -> None:
    assert wanted(1, load(num_waiting_tokens=19_000)) == 5


def test_what_waits_in_queues_counts_as_requests() -> None:
    assert wanted(1, load(num_requests=40), num_queued=10) == 1
    assert wanted(1, load(num_requests=40), num_queued=111) == 4


def test_load_is_shared_out_before_there_are_more() -> None:
    assert wanted(2, load(kv_use=1.0), load(kv_use=0.5)) == 2


def test_routers_that_still_start_are_not_asked_for_twice() -> None:
    assert wanted(3, load(num_requests=150)) == 3


def test_routers_go_once_the_others_would_stay_well_below_their_targets() -> None:
    # One has room for 40 requests then, two for 80.
    assert wanted(3, load(num_requests=81), IDLE, IDLE) == 3
    assert wanted(3, load(num_requests=80), IDLE, IDLE) == 2
    assert wanted(3, load(num_requests=41), IDLE, IDLE) == 2
    assert wanted(3, load(num_requests=40), IDLE, IDLE) == 1


def test_one_stays_without_any_load() -> None:
    assert wanted(3, IDLE, IDLE, IDLE) == 1


@pytest.mark.parametrize("num_routers", range(1, 10))
def test_what_one_decision_does_the_load_alone_does_not_undo(num_routers: int) -> None:
    for num_requests in range(400):
        then = wanted(num_routers, load(num_requests=num_requests))
        assert wanted(then, load(num_requests=num_requests)) == then


def test_a_router_of_which_nothing_is_known_leaves_the_number_as_it_is() -> None:
    assert wanted(2, load(num_requests=500), None) == 2
    assert wanted(2, IDLE, None) == 2
    assert wanted(2) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_target": 0.0}, "kv_target must be above 0 and at most 1, got 0.0"),
        ({"kv_target": 1.1}, "kv_target must be above 0 and at most 1, got 1.1"),
        ({"waiting_tokens_target": 0}, "waiting_tokens_target must be above 0, got 0"),
        ({"requests_target": -1}, "requests_target must be above 0, got -1"),
        ({"margin": 1.0}, "margin must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_scaling_names_the_value_that_makes_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SCALING, **values)


def test_a_load_is_what_the_engine_tells_and_its_fuller_group_of_blocks_counts() -> None:
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_waiting_tokens=70,
        num_free_blocks={"global": 90, "local": 25},
        num_blocks={"global": 100, "local": 100},
        num_steps=0,
        num_preemptions=0,
        num_prompt_tokens=0,
        num_generated_tokens=0,
        num_cached_tokens=0,
        num_degraded_tokens=0,
        lost_shards={},
        expert_load=[],
    )
    assert RouterLoad.of(stats) == RouterLoad(kv_use=0.75, num_waiting_tokens=70, num_requests=5)
