"""The controller's part in balancing: hears of shards' work, asks what to move, tells, and has it moved."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from cluster.balance.plan import Plan, Refusal
from cluster.balance.rebalance import BalanceGoal
from cluster.control.balancer import BalanceQuestion, Balancer, not_ready
from cluster.control.epoch_keeper import UnrestError
from cluster.control.expert_tier import ExpertTier
from cluster.control.rebalance_answer import answer, progress_answer, refusal_answer
from cluster.control.shard_fleet import ShardReport
from cluster.service_model import resolve
from experts.expert_dtype import ExpertDtype
from experts.placement import ExpertPlacement, ShardId

logger = logging.getLogger("arriero.controller")

# How often to look whether another configuration has come that wants rebalances.
LOOK_S = 10.0


class Rebalancing:
    """All methods belong to one event loop."""

    def __init__(self, tier: ExpertTier, *, num_cores: int, clock: Callable[[], float]) -> None:
        self._tier = tier
        self._num_cores = num_cores
        self._clock = clock
        self._balancer = Balancer()
        self._deciding = asyncio.Lock()

    def note(self, shard_id: ShardId, report: ShardReport) -> None:
        self._balancer.note(shard_id, report, self._clock())

    def forget(self, shard_id: ShardId) -> None:
        self._balancer.forget(shard_id)

    def begin_anew(self) -> None:
        """The shards are others now, maybe of another model: what was asked of the old ones says nothing of them."""
        self._balancer = Balancer()

    async def rebalance(self, *, dry_run: bool) -> dict[str, Any]:
        """What is moved from now on, or what would be; see rebalance_answer.py. One at a time: each takes a thread,
        maybe for a second, and members' reports need threads, too."""
        async with self._deciding:
            question = await self._question()
            if isinstance(question, Refusal):
                return refusal_answer(question)
            outcome, told = await asyncio.to_thread(_decide, question)
            if dry_run or isinstance(outcome, Refusal):
                return told
            return await self._begin(outcome.placements_from(question.placement), told)

    async def repeat_for_ever(self) -> None:
        """Rebalances every rebalance_period_s; not while that is 0."""
        while True:
            period_s = self._tier.config.rebalance_period_s
            await asyncio.sleep(period_s or LOOK_S)
            if period_s:
                refusal = (await self.rebalance(dry_run=False))["refusal"]
                logger.debug("rebalance: %s", "begun" if refusal is None else refusal["sentence"])

    def progress(self, rebalance_id: str) -> dict[str, Any] | None:
        """See rebalance_answer.progress_answer; of the last one for an empty id. None when it is not known (any more),
        so that what it had not yet taken up has been given up."""
        movement = None if self._tier.keeper is None else self._tier.keeper.movement
        if movement is None or rebalance_id not in ("", movement.movement_id):
            return None
        return progress_answer(movement, self._tier.epoch.number)

    async def _begin(self, placements: list[ExpertPlacement], told: dict[str, Any]) -> dict[str, Any]:
        if self._tier.keeper is None:
            return refusal_answer(not_ready("the shards have changed meanwhile"))
        try:
            movement = await self._tier.keeper.move(placements)
        except UnrestError as error:
            return refusal_answer(not_ready(str(error)))
        return {**told, "rebalance_id": movement.movement_id}

    async def _question(self) -> BalanceQuestion | Refusal:
        if not self._tier.is_up:
            return not_ready("the shards are not up yet")
        started = await self._tier.started()
        if started.keeper is None:
            return not_ready("there are no shards: routers hold the experts themselves")
        unrest = started.keeper.unrest()
        if unrest is not None:
            return not_ready(unrest)
        config = self._tier.config
        return self._balancer.question(
            self._tier.epoch,
            started.model.expert_shape,
            dtype=ExpertDtype.chosen(resolve(config, started.model, self._num_cores).dtype, config.expert_dtype),
            goal=BalanceGoal(min_copies=config.copies),
            now_s=self._clock(),
        )


def _decide(question: BalanceQuestion) -> tuple[Plan | Refusal, dict[str, Any]]:
    outcome = question.decide()
    return outcome, answer(question, outcome)
