"""What a decision about placement says: what to load and drop in which order, or why not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from experts.placement import ExpertPlacement, ShardId, Slot


class PlacedSlot(NamedTuple):
    """One copy of a slot on a shard."""

    shard_id: ShardId
    slot: Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One epoch's worth of change: load all additions, take the new placement into use, then drop all removals.

    Until then the removals serve and take memory, so additions need room beside them.
    """

    additions: tuple[PlacedSlot, ...]
    removals: tuple[PlacedSlot, ...]

    def applied_to(self, placement: ExpertPlacement) -> ExpertPlacement:
        """Raises ValueError for an addition that is there already."""
        slots_by_shard = {shard: list(slots) for shard, slots in placement.slots_by_shard.items()}
        for shard, slot in self.additions:
            slots_by_shard.setdefault(shard, []).append(slot)
        gone = set(self.removals)
        return ExpertPlacement(
            slots_by_shard={
                shard: tuple(sorted(slot for slot in slots if PlacedSlot(shard, slot) not in gone))
                for shard, slots in slots_by_shard.items()
            }
        )


def joined(stages: Sequence[Stage], last: Stage) -> list[Stage]:
    """stages and then last, which costs no epoch of its own when all it does is to drop."""
    if last.additions or not stages:
        return [*stages, last]
    *others, before = stages
    return [*others, replace(before, removals=(*before.removals, *last.removals))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long each shard will be busy with each layer, in seconds per second of the traffic that was seen."""

    shard_ids: tuple[ShardId, ...]
    busy_by_layer: Mapping[int, tuple[float, ...]]

    @property
    def wait_s(self) -> float:
        """What a router waits for: the busiest shard of one layer after the other."""
        return sum(max(busy) for busy in self.busy_by_layer.values())

    @property
    def imbalance(self) -> float:
        """Over all layers: how much longer a router waits than if every layer's shards were equally busy."""
        mean_s = sum(sum(busy) / len(busy) for busy in self.busy_by_layer.values())
        return self.wait_s / mean_s - 1 if mean_s else 0.0

    @property
    def imbalance_by_layer(self) -> dict[int, float]:
        return {layer: max(busy) * len(busy) / sum(busy) - 1 for layer, busy in self.busy_by_layer.items() if sum(busy)}

    @property
    def busy_by_shard(self) -> dict[ShardId, float]:
        totals = (
            map(sum, zip(*self.busy_by_layer.values(), strict=True))
            if self.busy_by_layer
            else [0.0] * len(self.shard_ids)
        )
        return dict(zip(self.shard_ids, totals, strict=True))


class RefusalReason(StrEnum):
    LITTLE_TRAFFIC = "little_traffic"
    EVEN = "even"
    NO_ROOM = "no_room"
    NOTHING_HELPS = "nothing_helps"
    DOES_NOT_PAY = "does_not_pay"
    NOT_READY = "not_ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Nothing is to be changed. sentence is for people; missing_bytes: how much more room is needed, for NO_ROOM."""

    reason: RefusalReason
    sentence: str
    missing_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages one after the other, and what they lead to. Every placement on the way serves every expert."""

    stages: tuple[Stage, ...]
    placement: ExpertPlacement
    bytes_loaded: int
    before: Prediction
    after: Prediction

    def placements_from(self, current: ExpertPlacement) -> list[ExpertPlacement]:
        """current, then what each stage leads to."""
        placements = [current]
        for stage in self.stages:
            placements.append(stage.applied_to(placements[-1]))
        return placements
