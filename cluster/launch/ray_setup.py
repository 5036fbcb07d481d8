"""Ray and Serve as `arriero serve` sets them up: a cluster of its own on this machine, or a client of a given one.

A cluster of our own listens on the loopback interface and takes calls only from processes with its token, which
lives in the environment of its processes and in no file. Several can run side by side: ports are drawn, and
sockets and logs lie in a folder of their own.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
from dataclasses import dataclass
from typing import Any

from cluster.config import ServiceConfig
from cluster.launch.worker_lines import show_lines_as_json

# Only requests and control messages pass through it; tensors travel in lanes.
OBJECT_STORE_BYTES = 256 * 2**20
# Its name in the log.
DRIVER = "driver"
GRPC_SERVICERS = (
    "cluster.front.grpc_services.add_generation_service",
    "cluster.front.grpc_services.add_admin_service",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


def set_environment(ray_address: str | None) -> None:
    """Must be called before Ray is imported: it reads its environment once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Serve logs every failed start as a stack trace, and every call; its log files have them all the same.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # Ray leaves lines away that look alike, such as the same one of two shards.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if ray_address is not None:
        # Ray would otherwise decide by whether a token file happens to lie in the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        return
    os.environ.pop("RAY_ADDRESS", None)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_ray(config: ServiceConfig, *, ray_address: str | None, temp_folder: str) -> None:
    """Connects to the cluster at ray_address, or starts one. Raises ConnectionError, RuntimeError."""
    _init_ray(config, ray_address=ray_address, temp_folder=temp_folder)
    if config.log_format == "json":
        show_lines_as_json(DRIVER)


def _init_ray(config: ServiceConfig, *, ray_address: str | None, temp_folder: str) -> None:
    import ray

    if ray_address is not None:
        ray.init(address=ray_address, log_to_driver=True, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        num_cpus=_num_cpus(config),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
        _temp_dir=temp_folder,
        _node_ip_address="127.0.0.1",
    )


def _num_cpus(config: ServiceConfig) -> int:
    """What Ray believes this machine has: at least enough to place every process of the service."""
    wanted = (
        config.gateways * config.gateway_num_cpus
        + config.most_routers * config.router_num_cpus
        + config.shards * config.shard_num_cpus
    )
    return max(os.cpu_count() or 1, math.ceil(wanted) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSetup:
    """Serve as it runs. started: by us; one that was there before keeps its own ports."""

    started: bool
    http_host: str
    http_port: int
    grpc_port: int


def start_serve(config: ServiceConfig) -> ServeSetup:
    """Starts Serve's controller and proxies where there are none. Raises ValueError for a Serve that has no gRPC."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        _start_serve(config)
        return ServeSetup(
            started=True, http_host=config.http_host, http_port=config.http_port, grpc_port=config.grpc_port
        )
    details: Any = ray.get(controller.get_serve_instance_details.remote())
    http, grpc = details["http_options"], details["grpc_options"]
    missing = set(GRPC_SERVICERS) - set(grpc["grpc_servicer_functions"])
    if missing:
        raise ValueError(f"Serve runs on this cluster without {', '.join(sorted(missing))}: shut it down first")
    return ServeSetup(started=False, http_host=http["host"], http_port=http["port"], grpc_port=grpc["port"])


def _start_serve(config: ServiceConfig) -> None:
    from ray import serve

    serve.start(
        http_options={"host": config.http_host, "port": config.http_port, "request_timeout_s": None},
        grpc_options={
            "port": config.grpc_port,
            "grpc_servicer_functions": list(GRPC_SERVICERS),
            "request_timeout_s": None,
        },
    )
