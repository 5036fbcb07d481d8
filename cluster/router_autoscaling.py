"""Serve's autoscaling of the routers: what it is told in a deployment's options, and what it asks every 0.1 s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.balance.router_load import RouterLoad
from cluster.balance.router_scaling import RouterScaling, wanted_routers
from cluster.config import ServiceConfig

POLICY = "cluster.router_autoscaling:RouterPolicy"
# Without a target of its own: steps' worth of tokens that may wait.
WAITING_STEPS = 2
# How old what Serve decides by may be, as a part of the shorter delay; Serve's own default is this part of its own.
PERIODS_PER_DELAY = 3
MIN_PERIOD_S = 0.2
MAX_PERIOD_S = 10.0
# A load is a mean over the last ones.
PERIODS_PER_MEAN = 3


class RouterPolicy:
    """Serve makes one in its controller and applies delays and bounds to what it answers."""

    def __init__(self, **scaling: float) -> None:
        """scaling: fields of RouterScaling."""
        self._scaling = RouterScaling(**scaling)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        wanted = wanted_routers(
            num_routers=context.target_num_replicas,
            loads=[_load(metrics, replica) for replica in context.running_replicas],
            num_queued=context.total_queued_requests or 0.0,
            scaling=self._scaling,
        )
        return wanted, {}


def _load(metrics: Mapping[str, Mapping[Any, float]], replica: Any) -> RouterLoad | None:
    """metrics: by name and replica, as told by RouterReplica.record_autoscaling_stats."""
    names = [field.name for field in fields(RouterLoad)]
    if not all(replica in metrics.get(name, {}) for name in names):
        return None
    return RouterLoad(**{name: metrics[name][replica] for name in names})


def autoscaling_options(config: ServiceConfig) -> dict[str, Any]:
    """Serve's autoscaling_config of the router deployment."""
    shorter_delay_s = min(config.router_up_delay_s, config.router_down_delay_s)
    period_s = min(max(shorter_delay_s / PERIODS_PER_DELAY, MIN_PERIOD_S), MAX_PERIOD_S)
    return {
        "min_replicas": config.routers,
        "max_replicas": config.most_routers,
        "upscale_delay_s": config.router_up_delay_s,
        "downscale_delay_s": config.router_down_delay_s,
        "metrics_interval_s": period_s,
        "look_back_period_s": PERIODS_PER_MEAN * period_s,
        "policy": {"policy_function": POLICY, "policy_kwargs": asdict(router_scaling(config))},
    }


def router_scaling(config: ServiceConfig) -> RouterScaling:
    seats = min(config.max_num_seqs, config.max_num_batched_tokens)
    return RouterScaling(
        kv_target=config.router_kv_target,
        waiting_tokens_target=config.router_waiting_target or WAITING_STEPS * config.max_num_batched_tokens,
        requests_target=config.router_seat_target * seats,
    )
