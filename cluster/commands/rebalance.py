"""`arriero rebalance`: has a running service move experts by their load, and waits until it is so. No Ray, no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from cluster.commands.scale import POLL_S, unless_passing
from cluster.commands.status import TIMEOUT_S, add_address_argument, aligned, call_admin, find_service
from cluster.v1 import admin_pb2

DECISION_TIMEOUT_S = 70.0
MAX_LAYERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="Only show what would be done, and what it would bring.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="How long to wait until all is moved. 0: not at all.",
    )


def run(arguments: argparse.Namespace) -> int:
    """0: done, or shown. 2: the service refuses, because there is nothing that it could or should move."""
    address, token = find_service(arguments.address)
    try:
        response = rebalance(address, token, dry_run=arguments.dry_run)
        print(json.dumps(response_to_json(response)) if arguments.json else response_to_text(response), flush=True)
        if arguments.dry_run or arguments.timeout_s <= 0:
            return 0
        return _wait(address, token, response.rebalance_id, arguments.timeout_s)
    except grpc.RpcError as error:
        print(f"arriero rebalance: {address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 2 if error.code() is grpc.StatusCode.FAILED_PRECONDITION else 1


def rebalance(address: str, token: str, *, dry_run: bool) -> admin_pb2.RebalanceResponse:
    """Raises grpc.RpcError, within DECISION_TIMEOUT_S."""
    request = admin_pb2.RebalanceRequest(dry_run=dry_run)
    response: admin_pb2.RebalanceResponse = call_admin(
        address, token, lambda admin: admin.Rebalance, request, timeout_s=DECISION_TIMEOUT_S
    )
    return response


def _wait(address: str, token: str, rebalance_id: str, timeout_s: float) -> int:
    """Tells on stderr how it ends: what is printed is the plan."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = unless_passing(lambda: _progress(address, token, rebalance_id))
        if found is not None and found.state != "moving":
            print(f"arriero rebalance: {outcome_to_text(found)}", file=sys.stderr)
            return 0 if found.state == "done" else 1
        time.sleep(POLL_S)
    print(f"arriero rebalance: not done within {timeout_s:g} s; it goes on", file=sys.stderr)
    return 1


def _progress(address: str, token: str, rebalance_id: str) -> admin_pb2.GetRebalanceResponse:
    """Raises grpc.RpcError, within TIMEOUT_S."""
    request = admin_pb2.GetRebalanceRequest(rebalance_id=rebalance_id)
    try:
        found: admin_pb2.GetRebalanceResponse = call_admin(
            address, token, lambda admin: admin.GetRebalance, request, timeout_s=TIMEOUT_S
        )
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        # Another controller has come, which gives up what was only prepared.
        reason = "the controller that had begun it has gone"
        return admin_pb2.GetRebalanceResponse(rebalance_id=rebalance_id, state="given_up", reason=reason)
    return found


def outcome_to_text(found: admin_pb2.GetRebalanceResponse) -> str:
    if found.state == "done":
        return f"done; epoch {found.epoch} is in force"
    return f"given up after {found.num_stages_done} of {found.num_stages} stages: {found.reason}"


def response_to_json(response: admin_pb2.RebalanceResponse) -> dict[str, Any]:
    refusal = response.refusal
    return {
        "refusal": {"reason": refusal.reason, "sentence": refusal.sentence, "missing_bytes": refusal.missing_bytes}
        if response.HasField("refusal")
        else None,
        "rebalance_id": response.rebalance_id,
        "stages": [
            {"additions": _placed(stage.additions), "removals": _placed(stage.removals)} for stage in response.stages
        ],
        "bytes_loaded": response.bytes_loaded,
        "span_s": response.span_s,
        "before": _prediction(response.before) if response.HasField("before") else None,
        "after": _prediction(response.after) if response.HasField("after") else None,
    }


def _placed(slots: Iterable[admin_pb2.PlacedSlot]) -> list[list[Any]]:
    return [[placed.shard_id, placed.slot.layer, placed.slot.expert] for placed in slots]


def _prediction(prediction: admin_pb2.BusyPrediction) -> dict[str, Any]:
    return {
        "imbalance": prediction.imbalance,
        "layers": [[layer.layer, layer.imbalance] for layer in prediction.layers],
        "shards": [
            {
                "shard_id": shard.shard_id,
                "busy": shard.busy,
                "num_slots": shard.num_slots,
                "measured_busy": shard.measured_busy if shard.HasField("measured_busy") else None,
            }
            for shard in prediction.shards
        ],
    }


def response_to_text(response: admin_pb2.RebalanceResponse) -> str:
    return "\n".join(_lines(response))


def _lines(response: admin_pb2.RebalanceResponse) -> Iterator[str]:
    if response.HasField("refusal"):
        yield f"nothing to do ({response.refusal.reason}): {response.refusal.sentence}"
    else:
        yield f"{response.bytes_loaded / 1e6:.1f} MB to load in {len(response.stages)} stages"
    for number, stage in enumerate(response.stages, 1):
        yield f"stage {number}"
        yield from (f"  load {_slots(shard, slots)}" for shard, slots in _by_shard(stage.additions))
        yield from (f"  drop {_slots(shard, slots)}" for shard, slots in _by_shard(stage.removals))
    if response.HasField("before"):
        yield from _busy_table(response)


def _by_shard(placed: Iterable[admin_pb2.PlacedSlot]) -> Iterable[tuple[str, list[admin_pb2.Slot]]]:
    slots_by_shard: dict[str, list[admin_pb2.Slot]] = {}
    for each in placed:
        slots_by_shard.setdefault(each.shard_id, []).append(each.slot)
    return sorted(slots_by_shard.items())


def _slots(shard: str, slots: Iterable[admin_pb2.Slot]) -> str:
    """Layers with their experts: "3: 0 5; 7: 1"."""
    experts: dict[int, list[int]] = {}
    for slot in slots:
        experts.setdefault(slot.layer, []).append(slot.expert)
    by_layer = (f"{layer}: {' '.join(map(str, sorted(of_layer)))}" for layer, of_layer in sorted(experts.items()))
    return f"{shard}  layer {'; '.join(by_layer)}"


def _busy_table(response: admin_pb2.RebalanceResponse) -> Iterator[str]:
    """Each shard, then the layers that are the least even."""
    before, after = response.before, response.after
    yield f"busy in the last {response.span_s:.0f} s: measured, and by the model now and after"
    afterwards = {shard.shard_id: shard for shard in after.shards}
    head = ("SHARD", "SLOTS", "AFTER", "MEASURED", "MODEL", "AFTER")
    yield from aligned([head, *_shard_rows(before, afterwards)])
    yield f"imbalance: {before.imbalance:.3f}" + (f", after {after.imbalance:.3f}" if afterwards else "")
    layers_after = {layer.layer: f"{layer.imbalance:.3f}" for layer in after.layers}
    worst = sorted(before.layers, key=lambda layer: -layer.imbalance)[:MAX_LAYERS]
    rows = [(str(layer.layer), f"{layer.imbalance:.3f}", layers_after.get(layer.layer, "")) for layer in worst]
    yield from aligned([("LAYER", "IMBALANCE", "AFTER"), *rows])


def _shard_rows(
    before: admin_pb2.BusyPrediction, afterwards: dict[str, admin_pb2.ShardBusy]
) -> Iterator[tuple[str, ...]]:
    for shard in before.shards:
        then = afterwards.get(shard.shard_id)
        measured = f"{shard.measured_busy:.1%}" if shard.HasField("measured_busy") else ""
        slots, busy = ("", "") if then is None else (str(then.num_slots), f"{then.busy:.1%}")
        yield shard.shard_id, str(shard.num_slots), slots, measured, f"{shard.busy:.1%}", busy
