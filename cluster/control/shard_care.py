"""What the controller does for shards that serve already: balances what they hold, and has more or fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from cluster.control.desired_state import Memory
from cluster.control.expert_tier import ExpertTier
from cluster.control.rebalancing import Rebalancing
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_growth import ShardGrowth
from experts.placement import ShardId


class ShardCare:
    """Both hear of every shard's work. All methods belong to one event loop."""

    def __init__(self, tier: ExpertTier, memory: Memory, *, num_cores: int, clock: Callable[[], float]) -> None:
        self.rebalancing = Rebalancing(tier, num_cores=num_cores, clock=clock)
        self.growth = ShardGrowth(tier, memory, clock=clock)

    def note(self, shard_id: ShardId, report: ShardReport) -> None:
        self.rebalancing.note(shard_id, report)
        self.growth.note(shard_id, report)

    def forget(self, shard_id: ShardId) -> None:
        self.rebalancing.forget(shard_id)
        self.growth.forget(shard_id)

    def begin_anew(self) -> None:
        """The shards are others now."""
        self.rebalancing.begin_anew()
        self.growth.begin_anew()

    def work(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """What goes on for as long as the controller lives."""
        return self.rebalancing.repeat_for_ever(), self.growth.grow_for_ever()
