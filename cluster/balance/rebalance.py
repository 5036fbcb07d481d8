"""``rebalance``: which experts should live elsewhere or in more copies, given what is asked of them. Pure.

It looks at the layer where the busiest shard is furthest above the mean, changes it by the best next step, and again,
until the layer is faster by more than that costs; then at whatever layer is the worst now. What does not pay is not
done, so most of a placement stays as it is. It ends when a whole look finds nothing any more, which is why a second
call right after refuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cluster.balance.busy_time import samples_of
from cluster.balance.draft import Draft
from cluster.balance.expert_traffic import ExpertTraffic
from cluster.balance.fleet import Fleet
from cluster.balance.plan import Plan, Prediction, Refusal, RefusalReason, Stage, joined
from cluster.balance.restore import restore
from cluster.balance.search import Offer, Price, search
from experts.placement import ExpertPlacement

_BOUNDLESS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceGoal:
    """min_copies: that each expert keeps or gets, where there are as many shards.

    max_imbalance: up to which nothing is done. min_gain: part of a layer's mean by which the layer must get faster
    per slot that is loaded. Loading goes at load_bytes_per_s and must be worth its time within horizon_s seconds of
    the same traffic. min_samples: of its traffic that each shard must have seen per layer; with fewer, chance alone
    looks like an imbalance of 2 / sqrt(min_samples). Raises ValueError for what makes no sense.
    """

    min_copies: int = 1
    max_imbalance: float = 0.1
    min_gain: float = 0.02
    horizon_s: float = 600.0
    load_bytes_per_s: float = 1e9
    min_samples: int = 400

    def __post_init__(self) -> None:
        for name in ("min_copies", "min_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_imbalance", "min_gain", "horizon_s", "load_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def rebalance(current: ExpertPlacement, traffic: ExpertTraffic, fleet: Fleet, goal: BalanceGoal) -> Plan | Refusal:
    """current: the placement in force. A shard of it that is not in the fleet is leaving or lost: its slots go to
    others first. A shard of the fleet that is not in current is new and empty."""
    placement, stages = current, list[Stage]()
    while True:
        restored = restore(placement, fleet, min_copies=goal.min_copies)
        if isinstance(restored, Refusal):
            return restored
        improved = restored or _improve(placement, traffic, fleet, goal)
        if isinstance(improved, Refusal):
            break
        for stage in improved:
            placement = stage.applied_to(placement)
            stages = joined(stages, stage)
    if not stages:
        return improved
    placement = ExpertPlacement(slots_by_shard={shard: placement.slots_of(shard) for shard in fleet.shard_ids})
    return Plan(
        stages=tuple(stages),
        placement=placement,
        bytes_loaded=sum(len(stage.additions) for stage in stages) * fleet.slot_bytes,
        before=predict(current, traffic, fleet),
        after=predict(placement, traffic, fleet),
    )


def predict(placement: ExpertPlacement, traffic: ExpertTraffic, fleet: Fleet) -> Prediction:
    """How busy the same traffic would make the shards under this placement."""
    return Draft.begin(placement, traffic, fleet, min_copies=1).prediction


def _improve(
    placement: ExpertPlacement, traffic: ExpertTraffic, fleet: Fleet, goal: BalanceGoal
) -> tuple[Stage, ...] | Refusal:
    draft = Draft.begin(placement, traffic, fleet, min_copies=goal.min_copies)
    num_samples = sum(map(samples_of, traffic.by_slot.values())) / max(1, len(draft.layers) * len(draft.shard_ids))
    refusal = _reason_to_stay(draft, num_samples, traffic.span_s, goal)
    if refusal is not None:
        return refusal
    price = Price(
        min_gain=goal.min_gain,
        chance=2 / math.sqrt(num_samples),
        horizon_s=goal.horizon_s,
        slot_s=fleet.slot_bytes / goal.load_bytes_per_s,
    )
    found = search(draft, price)
    return found.draft.stages() if found.num_changes else _why_not(draft, found.turned_down, price, fleet.slot_bytes)


def _reason_to_stay(draft: Draft, num_samples: float, span_s: float, goal: BalanceGoal) -> Refusal | None:
    """num_samples: per shard and layer."""
    if num_samples < goal.min_samples:
        return Refusal(
            reason=RefusalReason.LITTLE_TRAFFIC,
            sentence=f"{num_samples:.0f} samples per shard and layer in {span_s:.0f} s say too little: "
            f"{goal.min_samples} are needed",
        )
    imbalance = draft.prediction.imbalance
    if imbalance <= goal.max_imbalance:
        return Refusal(
            reason=RefusalReason.EVEN,
            sentence=f"the load is even: an imbalance of {imbalance:.3f} is within {goal.max_imbalance:g}",
        )
    return None


def _why_not(draft: Draft, turned_down: Offer | None, price: Price, slot_bytes: int) -> Refusal:
    """Nothing was worth doing: for want of room, because of its price, or because there is nothing."""
    imbalance = draft.prediction.imbalance
    roomy = search(replace(draft, room_S=draft.room_S + _BOUNDLESS), price)
    if roomy.num_changes:
        roomy_S = sum(layer.added_S for layer in roomy.draft.layers.values())
        missing_S = np.maximum(0, roomy_S - np.maximum(0, draft.room_S))
        missing = {shard: n * slot_bytes for shard, n in zip(draft.shard_ids, missing_S.tolist(), strict=True) if n}
        rooms = ", ".join(f"{shard} {num_bytes}" for shard, num_bytes in missing.items())
        return Refusal(
            reason=RefusalReason.NO_ROOM,
            sentence=f"an imbalance of {imbalance:.3f} would fall to {roomy.draft.prediction.imbalance:.3f} with "
            f"more room for weights; bytes missing: {rooms}",
            missing_bytes=sum(missing.values()),
        )
    if turned_down is not None:
        return Refusal(
            reason=RefusalReason.DOES_NOT_PAY,
            sentence=f"an imbalance of {imbalance:.3f} stays: the best change would save {turned_down.gain_s:.3g} s "
            f"of waiting per second, which is not worth loading {turned_down.num_slots} experts "
            f"({price.cost_s(turned_down):.3g} s)",
        )
    return Refusal(
        reason=RefusalReason.NOTHING_HELPS,
        sentence=f"an imbalance of {imbalance:.3f} stays: no move, copy or swap takes load off the busiest shard",
    )
