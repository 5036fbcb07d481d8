"""`arriero status`: asks the AdminService of a running service what it consists of. Imports neither Ray nor torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from cluster.launch.token_file import find_record, state_folder
from cluster.v1 import admin_pb2, admin_pb2_grpc

TIMEOUT_S = 5.0
TOKEN_ENV = "ARRIERO_ADMIN_TOKEN"
NUM_HOTTEST = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address_argument(parser)
    parser.add_argument(
        "--requests", action="store_true", help="Show the oldest requests under way instead of the members."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    """What ``find_service`` takes."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="gRPC address of the service. Default: the one started last on this machine. The admin token comes "
        f"from the service's file in {state_folder()} or from ${TOKEN_ENV}.",
    )


def run(arguments: argparse.Namespace) -> int:
    address, token = find_service(arguments.address)
    try:
        print(
            _requests(address, token, arguments.json) if arguments.requests else _view(address, token, arguments.json)
        )
    except grpc.RpcError as error:
        print(f"arriero status: {address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def _view(address: str, token: str, as_json: bool) -> str:
    view = get_view(address, token)
    return json.dumps(view_to_json(view)) if as_json else view_to_table(address, view)


def _requests(address: str, token: str, as_json: bool) -> str:
    found = list_requests(address, token)
    return json.dumps(requests_to_json(found)) if as_json else requests_to_table(address, found)


def find_service(address: str | None) -> tuple[str, str]:
    """(address, admin token). Raises FileNotFoundError where no service of this machine is known."""
    token = os.environ.get(TOKEN_ENV)
    if token is not None and address is not None:
        return address, token
    record = find_record(state_folder(), address)
    return record.grpc_address, record.admin_token if token is None else token


def get_view(address: str, token: str) -> admin_pb2.GetViewResponse:
    """Raises grpc.RpcError, within TIMEOUT_S."""
    response: admin_pb2.GetViewResponse = call_admin(
        address, token, lambda admin: admin.GetView, admin_pb2.GetViewRequest()
    )
    return response


def list_requests(address: str, token: str) -> admin_pb2.ListRequestsResponse:
    """Raises grpc.RpcError, within TIMEOUT_S."""
    response: admin_pb2.ListRequestsResponse = call_admin(
        address, token, lambda admin: admin.ListRequests, admin_pb2.ListRequestsRequest()
    )
    return response


def call_admin(
    address: str,
    token: str,
    method: Callable[[admin_pb2_grpc.AdminServiceStub], Any],
    request: Any,
    *,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """One call of the AdminService. Raises grpc.RpcError, within timeout_s."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = method(admin_pb2_grpc.AdminServiceStub(channel))
        return call(request, timeout=timeout_s, metadata=(("authorization", f"Bearer {token}"),))


def view_to_json(view: admin_pb2.GetViewResponse) -> dict[str, Any]:
    return {
        "epoch": view.epoch,
        "controller": _member(view.controller),
        "gateways": [_member(member) for member in view.gateways],
        "routers": [_member(member) for member in view.routers],
        "shards": [
            _member(shard.member) | {"slots": [[slot.layer, slot.expert] for slot in shard.slots]}
            for shard in view.shards
        ],
        "shard_growth": _growth(view.shard_growth),
        "load": [[load.layer, load.expert, load.tokens] for load in view.load],
        "weights_version": view.weights_version,
        "model": view.model,
        "update": update_to_json(view.update) if view.HasField("update") else None,
    }


def update_to_json(update: admin_pb2.GetUpdateResponse) -> dict[str, Any]:
    names = [field.name for field in update.DESCRIPTOR.fields if field.name != "waits_for"]
    return {name: getattr(update, name) for name in names} | {"waits_for": list(update.waits_for)}


def update_to_text(update: admin_pb2.GetUpdateResponse) -> str:
    """A line."""
    waiting = f", waits for {', '.join(update.waits_for)}" if update.waits_for else ""
    reason = f": {update.reason}" if update.reason else ""
    what = f"weights version {update.weights_version}, {update.model}"
    return f"{update.update_id} to {what}: {update.state}{waiting}{reason}"


def _member(member: admin_pb2.Member) -> dict[str, Any]:
    return {"id": member.id, "pid": member.pid, "node": member.node, "state": member.state}


def _growth(growth: admin_pb2.ShardGrowth) -> dict[str, Any]:
    busy = growth.busy if growth.HasField("busy") else None
    return {"state": growth.state, "least": growth.least, "most": growth.most, "busy": busy, "why": growth.why}


def view_to_table(address: str, view: admin_pb2.GetViewResponse) -> str:
    tokens = {(load.layer, load.expert): load.tokens for load in view.load}
    rows: list[tuple[str, ...]] = [("ROLE", "ID", "PID", "NODE", "STATE", "EXPERTS", "TOKENS")]
    rows += [_row("controller", view.controller)]
    rows += [_row("gateway", member) for member in view.gateways]
    rows += [_row("router", member) for member in view.routers]
    for shard in view.shards:
        routed = sum(tokens.get((slot.layer, slot.expert), 0) for slot in shard.slots)
        rows += [_row("shard", shard.member, str(len(shard.slots)), str(routed))]
    hottest = sorted(view.load, key=lambda load: -load.tokens)[:NUM_HOTTEST]
    load = ", ".join(f"layer {each.layer} expert {each.expert}: {each.tokens}" for each in hottest if each.tokens)
    head = f"{address}  epoch {view.epoch}  weights version {view.weights_version}, {view.model}"
    update = [update_to_text(view.update)] if view.HasField("update") else []
    last = [f"most used: {load or 'nothing yet'}", *_growth_lines(view.shard_growth)]
    return "\n".join([head, *update, *aligned(rows), *last])


def _growth_lines(growth: admin_pb2.ShardGrowth) -> list[str]:
    """None where no load changes the number of shards."""
    if growth.least == growth.most:
        return []
    busy = f", {growth.busy:.0%} busy" if growth.HasField("busy") else ""
    return [f"shards: {growth.least} to {growth.most}{busy}, {growth.state}: {growth.why}"]


def requests_to_json(found: admin_pb2.ListRequestsResponse) -> dict[str, Any]:
    names = [field.name for field in admin_pb2.OpenRequest.DESCRIPTOR.fields]
    requests = [{name: getattr(request, name) for name in names} for request in found.requests]
    return {"num_open": found.num_open, "requests": requests}


def requests_to_table(address: str, found: admin_pb2.ListRequestsResponse) -> str:
    rows: list[tuple[str, ...]] = [
        ("REQUEST", "CHOICE", "GATEWAY", "ROUTER", "PHASE", "AGE", "IDLE", "PROMPT", "TOKENS")
    ]
    rows += [
        (
            request.request_id,
            str(request.choice_index),
            request.gateway_id,
            request.router_id or "-",
            request.phase + (f" (attempt {request.attempt})" if request.attempt > 0 else ""),
            f"{request.age_s:.1f} s",
            f"{request.idle_s:.1f} s",
            str(request.num_prompt_tokens),
            str(request.num_completion_tokens),
        )
        for request in found.requests
    ]
    return "\n".join([f"{address}  {found.num_open} open, oldest first", *aligned(rows)])


def _row(role: str, member: admin_pb2.Member, experts: str = "", tokens: str = "") -> tuple[str, ...]:
    return role, member.id, str(member.pid), member.node[:12], member.state, experts, tokens


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; all rows, of which the first is the head, are of one length."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
