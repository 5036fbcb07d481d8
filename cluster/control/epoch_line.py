"""The epochs of one weights version: which is in force, which is being prepared, which routers use which.

What must outlive this controller is in the memory before anybody hears of it: a number before it is prepared, a
commit before it is offered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.control.background_tasks import BackgroundTasks
from cluster.control.backoff import Backoff
from cluster.control.desired_state import Memory, target_of
from cluster.control.epoch_plan import Abort, Prepare
from cluster.control.epoch_view import LEASE_S, EpochView, Preparation
from cluster.control.membership import MemberId
from cluster.control.movement import Movement
from cluster.control.router_leases import RouterLeases
from cluster.control.shard_acts import NoteDeath
from cluster.control.shard_fleet import ShardDied, ShardError, ShardPool
from cluster.control.shard_records import ShardRecords
from cluster.control.weight_lines import WeightLine, line_changes, lines_of
from experts.epoch import Epoch
from experts.placement import ExpertPlacement, ShardId

logger = logging.getLogger("arriero.controller")

# An epoch for the links' sake alone: at most one in this time, for a link that breaks at once would ask for more.
REJOIN_PAUSE_S = 5.0
REBORN = "the controller that prepared it has gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineWorld:
    """What all lines of a service act on. timeout_s: for loading what an epoch places."""

    memory: Memory
    pool: ShardPool
    clock: Callable[[], float]
    timeout_s: float
    shards: ShardRecords
    tasks: BackgroundTasks
    note_death: NoteDeath


class EpochLine:
    """Of a version that the memory knows. All methods belong to one event loop."""

    def __init__(self, weights_version: int, world: LineWorld) -> None:
        """An epoch that was in preparation is given up by the first round: no router can have adopted it, for a commit
        is remembered before it is offered."""
        self.weights_version = weights_version
        self._world = world
        self._routers = RouterLeases()
        self._preparing: Preparation | None = None
        self._backoff = Backoff()
        self._began_s = world.clock()
        self._committed_s = float("-inf")
        self.failure: str | None = None
        """Why the last preparation was given up that no loss had ended."""
        if self._line.preparing is not None:
            epoch = Epoch.from_dict(self._line.preparing)
            self._preparing = Preparation(
                number=epoch.number, placement=epoch.placement, is_repair=True, failure=REBORN
            )

    @property
    def _line(self) -> WeightLine:
        return lines_of(self._world.memory.state)[self.weights_version]

    @property
    def in_force(self) -> Epoch | None:
        """None before the first."""
        return None if self._line.epoch is None else Epoch.from_dict(self._line.epoch)

    @property
    def shards_in_use(self) -> frozenset[ShardId]:
        """Those that its epochs need."""
        preparing = () if self._preparing is None else self._preparing.placement.slots_by_shard
        placed = () if self.in_force is None else self.in_force.placement.slots_by_shard
        return frozenset((*placed, *preparing))

    @property
    def preparing(self) -> Preparation | None:
        return self._preparing

    def note_router(self, router_id: MemberId, lanes: Mapping[str, Any]) -> bool:
        """Whether it told news."""
        known = self._routers.get(router_id)
        if not self._routers.note(router_id, lanes, self._world.clock()):
            return False
        for shard_id, reason in lanes["lost"].items():
            if known is None or shard_id not in known.masked:
                logger.warning("%s does without %s: %s", router_id, shard_id, reason)
        return True

    def forget_router(self, router_id: MemberId) -> None:
        self._routers.forget(router_id)

    def offer(self, router_id: MemberId) -> dict[str, Any] | None:
        """What the router is to do about epochs; see router.lane_state.EpochOffer. None before the first epoch."""
        line, router = self._line, self._routers.get(router_id)
        if line.epoch is None:
            return None
        will_fail = self._preparing is None or self._preparing.failure is not None
        preparing = None if will_fail else line.preparing
        # The one in force first: who waits for it shall not wait for the next one, too.
        lags = router is not None and router.epoch < line.epoch["number"]
        next_epoch = line.epoch if lags else preparing
        has_it = next_epoch is None or router is None or router.prepared == next_epoch["number"]
        return {
            "in_force": line.epoch["number"],
            "preparing": None if preparing is None else preparing["number"],
            "prepare": None if has_it else next_epoch,
        }

    def view(
        self,
        *,
        leads: bool,
        movement: Movement | None = None,
        used_elsewhere: frozenset[ShardId] = frozenset(),
        may_prepare: bool = True,
    ) -> EpochView:
        now_s, epoch = self._world.clock(), self.in_force
        return EpochView(
            now_s=now_s,
            number=0 if epoch is None else epoch.number,
            placement=ExpertPlacement(slots_by_shard={}) if epoch is None else epoch.placement,
            target=target_of(self._world.memory.state.target),
            shards=self._world.shards.views(now_s, self.weights_version),
            routers=self._routers.views(),
            preparing=self._preparing,
            settled=now_s - self._began_s >= LEASE_S,
            may_prepare=may_prepare and self._backoff.is_over(now_s),
            may_rejoin=now_s - self._committed_s >= REJOIN_PAUSE_S,
            movement=movement,
            leads=leads,
            used_elsewhere=used_elsewhere,
        )

    async def prepare(self, action: Prepare) -> None:
        memory = self._world.memory
        number, placement = memory.state.last_epoch + 1, action.placement
        addresses = [self._world.shards.address_of(shard_id) for shard_id in placement.slots_by_shard]
        epoch = Epoch(
            number=number,
            weights_version=self.weights_version,
            shards=tuple(address for address in addresses if address is not None),
            placement=placement,
        )
        await self._change(preparing=epoch.to_dict(), last_epoch=number)
        logger.info("epoch %d: preparing%s", number, self._purpose(action))
        self._preparing = Preparation(
            number=number, placement=placement, is_repair=action.is_repair, is_move=action.is_move
        )
        for shard_id in placement.slots_by_shard:
            prepare = partial(self._prepare_shard, shard_id, epoch, self._line.model)
            self._world.tasks.begin(("prepare", shard_id, number), prepare)

    def _purpose(self, action: Prepare) -> str:
        if self._line.epoch is None:
            return f", the first of weights version {self.weights_version}"
        return ", to make good a loss" if action.is_repair else ", to balance" if action.is_move else ""

    async def _prepare_shard(self, shard_id: ShardId, epoch: Epoch, model: str) -> None:
        timeout_s = self._world.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._world.pool.prepare(shard_id, self._world.memory.state.term, epoch, model)
        except ShardDied as error:
            self._world.note_death(shard_id, str(error))
        except (ShardError, TimeoutError) as error:
            self._fail(epoch.number, f"{shard_id}: {error or f'not prepared within {timeout_s:g} s'}")
        else:
            self._world.shards.note_serves(shard_id, epoch.number, self.weights_version)
            if self._preparing is not None and self._preparing.number == epoch.number:
                self._preparing = replace(self._preparing, ready=self._preparing.ready | {shard_id})

    def _fail(self, number: int, reason: str) -> None:
        if self._preparing is not None and self._preparing.number == number:
            self._preparing = replace(self._preparing, failure=reason)

    async def commit(self, number: int) -> bool:
        """Whether that was a stage of a movement. Its placement is then what should be from now on; until now nothing
        had changed, so giving up cost nothing."""
        preparing, line = self._preparing, self._line
        assert preparing is not None
        moved = {"target": dict(preparing.placement.slots_by_shard)} if preparing.is_move else {}
        await self._change(epoch=line.preparing, preparing=None, **moved)
        self._preparing = None
        self._committed_s = self._world.clock()
        self._backoff.succeed()
        logger.info("epoch %d: in force", number)
        return preparing.is_move

    async def abort(self, abort: Abort) -> Preparation:
        """Returns what was given up; its shards must hear of it."""
        given_up = self._preparing
        assert given_up is not None
        self._preparing = None
        logger.warning("epoch %d: given up: %s", abort.number, abort.reason)
        await self._change(preparing=None)
        if not abort.try_again_now:
            self._backoff.fail(self._world.clock())
            self.failure = None if abort.reason == REBORN else abort.reason
        return given_up

    async def _change(self, *, epoch: Any = ..., preparing: Any = ..., **others: Any) -> None:
        own = {name: each for name, each in (("epoch", epoch), ("preparing", preparing)) if each is not ...}
        await self._world.memory.update(lambda state: {**others, **line_changes(state, self.weights_version, **own)})
