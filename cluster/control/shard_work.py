"""What a shard says of its work, for balancing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.balance.expert_traffic import SlotTraffic
from experts.placement import Slot
from experts.shard_speed import ShardSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """by_slot, busy_s: since it started. speed: None for a shard that loaded without experts."""

    by_slot: Mapping[Slot, SlotTraffic]
    busy_s: float
    speed: ShardSpeed | None

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any]) -> ShardWork:
        """stats: as experts.actor.ExpertShardActor.stats makes it."""
        rows = {(layer, expert): rows for layer, expert, rows in stats["load"]}
        return cls(
            by_slot={
                Slot(layer, expert): SlotTraffic(rows.get((layer, expert), 0), activations)
                for layer, expert, activations in stats["activations"]
            },
            busy_s=stats["busy_s"],
            speed=stats["speed"],
        )
