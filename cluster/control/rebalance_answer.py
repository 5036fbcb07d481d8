"""What `Rebalance` answers, as plain values under the names of arriero.v1.RebalanceResponse. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.balance.plan import PlacedSlot, Prediction, Refusal
from cluster.control.balancer import BalanceQuestion
from experts.placement import ExpertPlacement, ShardId


def answer(question: BalanceQuestion) -> dict[str, Any]:
    """Decides, and tells. May take a second or more for a large model."""
    outcome = question.decide()
    before = _prediction(question.predict(), question.placement, question.measured_busy)
    if isinstance(outcome, Refusal):
        return {**refusal_answer(outcome), "span_s": question.traffic.span_s, "before": before}
    return {
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
