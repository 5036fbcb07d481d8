"""What `Rebalance` and `GetRebalance` answer, as plain values under the names of arriero.v1's messages. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.balance.plan import PlacedSlot, Plan, Prediction, Refusal
from cluster.control.balancer import BalanceQuestion
from cluster.control.movement import Movement
from experts.placement import ExpertPlacement, ShardId


def answer(question: BalanceQuestion, outcome: Plan | Refusal) -> dict[str, Any]:
    """outcome: as question.decide() gives it. rebalance_id is for whoever carries it out."""
    before = _prediction(question.predict(), question.placement, question.measured_busy)
    if isinstance(outcome, Refusal):
        return {**refusal_answer(outcome), "span_s": question.traffic.span_s, "before": before}
    return {
        "rebalance_id": "",
        "refusal": None,
        "stages": [
            {"additions": _placed(stage.additions), "removals": _placed(stage.removals)} for stage in outcome.stages
        ],
        "bytes_loaded": outcome.bytes_loaded,
        "span_s": question.traffic.span_s,
        "before": before,
        "after": _prediction(outcome.after, outcome.placement, {}),
    }


def refusal_answer(refusal: Refusal) -> dict[str, Any]:
    """Where nothing else is known."""
    return {
        "rebalance_id": "",
        "refusal": {
            "reason": refusal.reason.value,
            "sentence": refusal.sentence,
            "missing_bytes": refusal.missing_bytes,
        },
        "stages": [],
        "bytes_loaded": 0,
        "span_s": 0.0,
        "before": None,
        "after": None,
    }


def progress_answer(movement: Movement, epoch: int) -> dict[str, Any]:
    """Under the names of arriero.v1.GetRebalanceResponse. epoch: the one in force."""
    return {
        "rebalance_id": movement.movement_id,
        "state": movement.state.value,
        "num_stages": movement.num_stages,
        "num_stages_done": movement.num_taken_up,
        "reason": movement.failure or "",
        "epoch": epoch,
    }


def _placed(slots: Iterable[PlacedSlot]) -> list[dict[str, Any]]:
    return [{"shard_id": shard, "layer": slot.layer, "expert": slot.expert} for shard, slot in slots]


def _prediction(
    prediction: Prediction, placement: ExpertPlacement, measured_busy: Mapping[ShardId, float | None]
) -> dict[str, Any]:
    return {
        "imbalance": prediction.imbalance,
        "layers": [{"layer": layer, "imbalance": value} for layer, value in prediction.imbalance_by_layer.items()],
        "shards": [
            {
                "shard_id": shard_id,
                "busy": busy,
                "num_slots": len(placement.slots_of(shard_id)),
                "measured_busy": measured_busy.get(shard_id),
            }
            for shard_id, busy in prediction.busy_by_shard.items()
        ],
    }
