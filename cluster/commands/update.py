"""`arriero update`: puts other weights into a running service, and waits until the old ones are gone. No Ray here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from cluster.commands.scale import POLL_S, unless_passing
from cluster.commands.status import (
    TIMEOUT_S,
    add_address_argument,
    aligned,
    call_admin,
    find_service,
    update_to_text,
)
from cluster.v1 import admin_pb2

BEGIN_TIMEOUT_S = 610.0
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="Checkpoint folder, at the same path on every node, or the id of a model on the Hugging Face hub. Its "
        "architecture and tokenizer must be those of the service.",
    )
    add_address_argument(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="Only show whether it could be done, and what memory it would take."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="How long to wait until the old weights are gone. 0: not at all.",
    )


def run(arguments: argparse.Namespace) -> int:
    """0: done, or it can be done. 2: the service refuses. 1: it was given up, or goes on after the time."""
    address, token = find_service(arguments.address)
    try:
        response = update(address, token, _absolute(arguments.model), dry_run=arguments.dry_run)
        print(json.dumps(response_to_json(response)) if arguments.json else response_to_text(response), flush=True)
        if arguments.dry_run:
            return 2 if response.refusal else 0
        return _wait(address, token, response.update_id, arguments.timeout_s) if arguments.timeout_s > 0 else 0
    except grpc.RpcError as error:
        print(f"arriero update: {address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 2 if error.code() in REFUSALS else 1


def update(address: str, token: str, model: str, *, dry_run: bool) -> admin_pb2.UpdateWeightsResponse:
    """Raises grpc.RpcError, within BEGIN_TIMEOUT_S."""
    request = admin_pb2.UpdateWeightsRequest(model=model, dry_run=dry_run)
    response: admin_pb2.UpdateWeightsResponse = call_admin(
        address, token, lambda admin: admin.UpdateWeights, request, timeout_s=BEGIN_TIMEOUT_S
    )
    return response


def _absolute(model: str) -> str:
    """The service has a working directory of its own."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _wait(address: str, token: str, update_id: str, timeout_s: float) -> int:
    """Tells on stderr of each state."""
    deadline, told = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        found = unless_passing(lambda: _progress(address, token, update_id))
        if found is not None and found.state != told:
            told = found.state
            print(f"arriero update: {update_to_text(found)}", file=sys.stderr, flush=True)
        if told in ("done", "given_up"):
            return 0 if told == "done" else 1
        time.sleep(POLL_S)
    print(f"arriero update: not done within {timeout_s:g} s; `arriero status` shows how far it is", file=sys.stderr)
    return 1


def _progress(address: str, token: str, update_id: str) -> admin_pb2.GetUpdateResponse:
    """Raises grpc.RpcError, within TIMEOUT_S."""
    request = admin_pb2.GetUpdateRequest(update_id=update_id)
    found: admin_pb2.GetUpdateResponse = call_admin(
        address, token, lambda admin: admin.GetUpdate, request, timeout_s=TIMEOUT_S
    )
    return found


def response_to_json(response: admin_pb2.UpdateWeightsResponse) -> dict[str, object]:
    names = [field.name for field in admin_pb2.MemoryRoom.DESCRIPTOR.fields if field.name != "members"]
    return {
        "update_id": response.update_id,
        "weights_version": response.weights_version,
        "refusal": response.refusal,
        "rooms": [
            {"members": list(room.members), **{name: getattr(room, name) for name in names}} for room in response.rooms
        ],
    }


def response_to_text(response: admin_pb2.UpdateWeightsResponse) -> str:
    return "\n".join(_lines(response))


def _lines(response: admin_pb2.UpdateWeightsResponse) -> Iterator[str]:
    if response.refusal:
        yield f"refused: {response.refusal}"
    else:
        yield f"weights version {response.weights_version}" + (f", {response.update_id}" if response.update_id else "")
    rows = [_row(room) for room in response.rooms]
    if rows:
        yield from aligned([("MEMORY", "NEEDED", "FREE", "MISSING", "MEMBERS"), *rows])


def _row(room: admin_pb2.MemoryRoom) -> tuple[str, ...]:
    sizes = (room.needed_bytes, room.free_bytes, room.missing_bytes)
    return room.memory[:20], *(f"{size / 1e6:.1f} MB" for size in sizes), "  ".join(room.members)
