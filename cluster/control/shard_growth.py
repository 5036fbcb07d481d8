"""The controller's part in having as many shards as the load asks for: hears how busy they are, decides now and then,
and has one added or taken away, as `arriero scale` would."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster.balance.autoscaler import ShardScaling, Trend, desired_shards
from cluster.balance.busy_fraction import BusyFraction
from cluster.config import ServiceConfig
from cluster.control.desired_state import Memory
from cluster.control.epoch_keeper import EpochKeeper, UnrestError
from cluster.control.expert_tier import ExpertTier
from cluster.control.growth import Growth, GrowthState, told
from cluster.control.shard_fleet import ShardReport
from experts.placement import ShardId

logger = logging.getLogger("arriero.controller")

# Busy fractions are a mean over the shorter delay, but over as long as this.
MIN_WINDOW_S = 1.0
MAX_WINDOW_S = 30.0
# What must be to spare of the target before a shard goes, as a part of it.
SPARE = 1 / 6


class ShardGrowth:
    """All methods belong to one event loop."""

    def __init__(self, tier: ExpertTier, memory: Memory, *, clock: Callable[[], float]) -> None:
        self._tier = tier
        self._memory = memory
        self._clock = clock
        self.begin_anew()

    def begin_anew(self) -> None:
        """The shards are others now."""
        self._busy = BusyFraction(window_s(self._tier.config))
        self._trend = Trend()
        self._growth = self._standing(GrowthState.WAITS, "no look has been taken yet")

    def note(self, shard_id: ShardId, report: ShardReport) -> None:
        self._busy.report(shard_id, report.work.busy_s, self._clock())

    def forget(self, shard_id: ShardId) -> None:
        self._busy.forget(shard_id)

    @property
    def growth(self) -> Growth:
        return self._growth

    async def scale(self, num_shards: int) -> tuple[ShardId, ...]:
        """By an operator's word: so many from now on, and never fewer under little load. See EpochKeeper.scale."""
        keeper = self._tier.keeper
        if keeper is None:
            raise ValueError("shards: this service has none, or they have not started yet")
        wanted = await keeper.scale(num_shards)
        await self._memory.change(least_shards=num_shards)
        self._trend = Trend()
        return wanted

    async def grow_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._tier.config.heartbeat_s)
            keeper = self._tier.keeper
            if keeper is not None:
                await self.look(keeper)

    async def look(self, keeper: EpochKeeper) -> None:
        """One decision; at most one shard more or less."""
        scaling = self._scaling()
        if scaling is None:
            self._growth = self._standing(GrowthState.OFF, "max_shards is not above shards")
            return
        unrest = keeper.unrest()
        num_shards, busy = len(self._memory.state.target), self._busy.mean
        wanted, self._trend = desired_shards(
            num_shards=num_shards,
            num_ready=num_shards if unrest is None else 0,
            busy=busy,
            trend=self._trend,
            now_s=self._clock(),
            scaling=scaling,
        )
        self._growth = self._standing(*told(self._trend, busy, unrest))
        if wanted != num_shards:
            await self._step(keeper, num_shards, wanted)

    async def _step(self, keeper: EpochKeeper, num_shards: int, wanted: int) -> None:
        busy = self._growth.busy
        try:
            await keeper.scale(wanted, only_at_rest=True)
        except (UnrestError, ValueError) as error:
            self._growth = self._standing(GrowthState.WAITS, str(error))
            return
        share = "" if busy is None else f" ({busy:.0%} busy)"
        logger.info("the load asks for %d shards, not %d%s", wanted, num_shards, share)
        self._growth = self._standing(GrowthState.WAITS, f"going from {num_shards} to {wanted} shards{share}")

    def _scaling(self) -> ShardScaling | None:
        config, least, most = self._tier.config, self._least(), self._most()
        if most == least:
            return None
        return ShardScaling(
            min_shards=least,
            max_shards=most,
            target_busy=config.shard_busy_target,
            margin=SPARE * config.shard_busy_target,
            up_delay_s=config.shard_up_delay_s,
            down_delay_s=config.shard_down_delay_s,
        )

    def _least(self) -> int:
        by_hand = self._memory.state.least_shards
        return self._tier.config.shards if by_hand is None else by_hand

    def _most(self) -> int:
        """Nobody's bound where the operator has asked for more."""
        if self._tier.config.most_shards == self._tier.config.shards:
            return self._least()
        return max(self._tier.config.most_shards, self._least())

    def _standing(self, state: GrowthState, why: str) -> Growth:
        return Growth(state=state, least=self._least(), most=self._most(), busy=self._busy.mean, why=why)


def window_s(config: ServiceConfig) -> float:
    return min(max(config.shard_up_delay_s, MIN_WINDOW_S), max(config.shard_down_delay_s, MIN_WINDOW_S), MAX_WINDOW_S)
