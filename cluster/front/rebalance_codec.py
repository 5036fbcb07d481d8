"""The controller's answers about better places for experts, as protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.v1 import admin_pb2


def rebalance_response(answer: Mapping[str, Any]) -> admin_pb2.RebalanceResponse:
    """answer: as cluster.control.rebalance_answer makes it."""
    refusal = answer["refusal"]
    return admin_pb2.RebalanceResponse(
        refusal=None if refusal is None else admin_pb2.RebalanceRefusal(**refusal),
        stages=[
            admin_pb2.RebalanceStage(additions=_placed(stage["additions"]), removals=_placed(stage["removals"]))
            for stage in answer["stages"]
        ],
        bytes_loaded=answer["bytes_loaded"],
        span_s=answer["span_s"],
        before=_prediction(answer["before"]),
        after=_prediction(answer["after"]),
        rebalance_id=answer["rebalance_id"],
    )


def progress_response(progress: Mapping[str, Any]) -> admin_pb2.GetRebalanceResponse:
    """progress: as cluster.control.rebalance_answer makes it."""
    return admin_pb2.GetRebalanceResponse(**progress)


def _placed(slots: Sequence[Mapping[str, Any]]) -> list[admin_pb2.PlacedSlot]:
    return [
        admin_pb2.PlacedSlot(
            shard_id=placed["shard_id"], slot=admin_pb2.Slot(layer=placed["layer"], expert=placed["expert"])
        )
        for placed in slots
    ]


def _prediction(prediction: Mapping[str, Any] | None) -> admin_pb2.BusyPrediction | None:
    if prediction is None:
        return None
    return admin_pb2.BusyPrediction(
        imbalance=prediction["imbalance"],
        layers=[admin_pb2.LayerImbalance(**layer) for layer in prediction["layers"]],
        shards=[admin_pb2.ShardBusy(**shard) for shard in prediction["shards"]],
    )
