"""`arriero scale`: asks a running service for another number of shards, and waits until it is so. No Ray, no torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from cluster.commands.status import TIMEOUT_S, add_address_argument, call_admin, find_service, get_view
from cluster.v1 import admin_pb2

POLL_S = 0.5
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

Answer = TypeVar("Answer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, required=True, metavar="N", help="How many expert shards there shall be.")
    add_address_argument(parser)
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="How long to wait until it is so. 0: not at all.",
    )


def run(arguments: argparse.Namespace) -> int:
    address, token = find_service(arguments.address)
    try:
        request = admin_pb2.ScaleShardsRequest(num_shards=arguments.shards)
        wanted = set(call_admin(address, token, lambda stub: stub.ScaleShards, request).shard_ids)
        return _wait(address, token, wanted, arguments.timeout_s)
    except grpc.RpcError as error:
        print(f"arriero scale: {address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1


def _wait(address: str, token: str, wanted: set[str], timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        view = unless_passing(lambda: get_view(address, token))
        if view is not None and is_done(view, wanted):
            print(f"{len(wanted)} shards serve epoch {view.epoch}")
            return 0
        time.sleep(min(POLL_S, TIMEOUT_S))
    if timeout_s > 0:
        print(f"arriero scale: not done within {timeout_s:g} s; `arriero status` shows how far it is", file=sys.stderr)
        return 1
    return 0


def unless_passing(ask: Callable[[], Answer]) -> Answer | None:
    """None while nobody answers: the controller may be on its way back. Raises grpc.RpcError for anything else."""
    try:
        return ask()
    except grpc.RpcError as error:
        if error.code() not in PASSING:
            raise
        return None


def is_done(view: admin_pb2.GetViewResponse, wanted: set[str]) -> bool:
    """Whether the wanted shards, and no others, are there and serve."""
    alive = {shard.member.id: shard for shard in view.shards if shard.member.state != "dead"}
    serving = {name for name, shard in alive.items() if shard.member.state == "ready" and shard.slots}
    return serving == set(alive) == wanted
