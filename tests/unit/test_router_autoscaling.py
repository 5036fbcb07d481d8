"""What Serve is told about the number of routers, and what it hears when it asks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.balance.router_load import RouterLoad
from cluster.balance.router_scaling import RouterScaling
from cluster.config import parse_config
from cluster.router_autoscaling import autoscaling_options, router_scaling

ROUTERS = DeploymentID("Router", app_name="arriero")
A, B = ReplicaID("a", ROUTERS), ReplicaID("b", ROUTERS)


def policy_of(**config: Any) -> Any:
    """As Serve's controller gets it: pickled, and made there from its arguments."""
    options = autoscaling_options(parse_config({"model": "m", "max_routers": 5, **config}))
    policy = AutoscalingConfig(**options).policy
    return policy.get_policy()(**policy.policy_kwargs)


def context(loads: dict[ReplicaID, RouterLoad], *, running: list[ReplicaID], num_queued: float = 0) -> Any:
    metrics: dict[str, dict[ReplicaID, float]] = {}
    for replica, load in loads.items():
        for name, value in asdict(load).items():
            metrics.setdefault(name, {})[replica] = value
    return AutoscalingContext(
        deployment_id=ROUTERS,
        deployment_name=ROUTERS.name,
        app_name=ROUTERS.app_name,
        current_num_replicas=len(running),
        target_num_replicas=2,
        running_replicas=running,
        total_num_requests=0,
        total_queued_requests=num_queued,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


def test_the_policy_adds_up_what_routers_tell_and_what_waits_in_front_of_them() -> None:
    busy = RouterLoad(kv_use=0.1, num_waiting_tokens=0, num_requests=8)
    policy = policy_of(max_num_seqs=10, router_seat_target=0.8)
    assert policy(context({A: busy, B: busy}, running=[A, B])) == (2, {})
    assert policy(context({A: busy, B: busy}, running=[A, B], num_queued=1)) == (3, {})
    # A router that has gone may still be told of.
    assert policy(context({A: busy, B: busy}, running=[A])) == (2, {})


def test_a_router_that_has_not_told_anything_yet_leaves_the_number_as_it_is() -> None:
    idle = RouterLoad(kv_use=0.0, num_waiting_tokens=0, num_requests=0)
    policy = policy_of()
    assert policy(context({A: idle}, running=[A, B])) == (2, {})
    assert policy(context({}, running=[A, B], num_queued=10_000)) == (2, {})
    assert policy(context({A: idle, B: idle}, running=[A, B])) == (1, {})


def test_bounds_and_delays_are_the_operators() -> None:
    config = parse_config({"model": "m", "routers": 2, "max_routers": 4, "router_up_delay_s": 20.0})
    options = AutoscalingConfig(**autoscaling_options(config))
    assert (options.min_replicas, options.max_replicas) == (2, 4)
    assert (options.upscale_delay_s, options.downscale_delay_s) == (20.0, 600.0)


def test_serve_measures_well_within_the_shorter_delay_but_neither_all_the_time_nor_too_seldom() -> None:
    def period_s(**delays: float) -> float:
        options = autoscaling_options(parse_config({"model": "m", "max_routers": 4, **delays}))
        assert options["look_back_period_s"] == 3 * options["metrics_interval_s"]
        return float(options["metrics_interval_s"])

    assert period_s() == 10.0
    assert period_s(router_down_delay_s=6.0) == 2.0
    assert period_s(router_up_delay_s=0.0) == 0.2
    assert period_s(router_up_delay_s=100.0, router_down_delay_s=100.0) == 10.0


def test_targets_left_open_follow_from_what_a_step_can_do() -> None:
    config = parse_config({"model": "m", "max_num_batched_tokens": 100, "max_num_seqs": 200, "router_seat_target": 0.5})
    assert router_scaling(config) == RouterScaling(kv_target=0.7, waiting_tokens_target=200, requests_target=50)
    config = parse_config({"model": "m", "router_waiting_target": 7})
    assert router_scaling(config).waiting_tokens_target == 7
