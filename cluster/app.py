"""The service as a Serve application: `build` is what `arriero serve` runs and what `serve deploy` imports."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from cluster.config import ServiceConfig, parse_config
from cluster.front.gateway import Gateway
from cluster.front.http_api import build_http_api
from cluster.router_autoscaling import autoscaling_options
from cluster.router_replica import RouterReplica

ROUTER = "Router"
GATEWAY = "Gateway"
ROUTER_CHOICE = "cluster.front.router_choice:RouterChoice"
# Blocks of each router's prefix cache that a gateway keeps in mind, some hundred bytes each.
MAX_KNOWN_BLOCKS = 65536
HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 30.0
# Calls that are not generation (status, health, tokenizing) must get in however many streams are open.
SPARE_CALLS = 1000
# Engines compute in processes and threads of their own; idle ones must not burn the cores of the others.
ENVIRONMENT = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}


def build(args: dict[str, Any]) -> Application:
    """args: the keys of ServiceConfig. Raises ConfigError naming every key that is unknown, missing or wrong."""
    config = parse_config(args)
    values = config.model_dump()
    router = serve.deployment(**_router_options(config))(RouterReplica).bind(values)
    ingress = serve.ingress(build_http_api)(Gateway)
    return serve.deployment(**_gateway_options(config))(ingress).bind(values, router)


def _router_options(config: ServiceConfig) -> dict[str, Any]:
    return {
        **_common_options(config),
        "name": ROUTER,
        **_number_of_routers(config),
        "max_ongoing_requests": calls_per_router(config),
        "max_queued_requests": config.max_queued_requests,
        "request_router_config": {
            "request_router_class": ROUTER_CHOICE,
            "request_router_kwargs": {"max_gap": config.prefix_gap, "max_blocks": num_known_blocks(config)},
        },
        "ray_actor_options": {
            "num_cpus": config.router_num_cpus,
            "num_gpus": 1.0 if config.device == "cuda" else 0.0,
            "runtime_env": ENVIRONMENT,
        },
    }


def _number_of_routers(config: ServiceConfig) -> dict[str, Any]:
    if config.most_routers == config.routers:
        return {"num_replicas": config.routers}
    return {"autoscaling_config": autoscaling_options(config)}


def _gateway_options(config: ServiceConfig) -> dict[str, Any]:
    # A router's queue refuses; the gateway itself must never be what is full.
    open_calls = config.most_routers * calls_per_router(config) + config.max_queued_requests
    return {
        **_common_options(config),
        "name": GATEWAY,
        "num_replicas": config.gateways,
        "max_ongoing_requests": open_calls + SPARE_CALLS,
        "ray_actor_options": {"num_cpus": config.gateway_num_cpus},
    }


def _common_options(config: ServiceConfig) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        # A start that failed has a reason that another start would meet again.
        "max_constructor_retry_count": 1,
    }


def num_known_blocks(config: ServiceConfig) -> int:
    return min(config.num_kv_blocks or MAX_KNOWN_BLOCKS, MAX_KNOWN_BLOCKS)


def calls_per_router(config: ServiceConfig) -> int:
    """One batch runs, and one waits in the engine, so that a finished sequence's place is taken at the next step."""
    return 2 * config.max_num_seqs
