"""Keeps the expert tier whole once it has started: looks at what is known, decides (epoch_plan.py), acts, remembers.

Everything that may take long runs as a task of its own, so that the next loss is met at once. What must outlive
this controller is in the memory before anybody hears of it: a number before it is prepared, a commit before it is
offered, a shard's name before the shard is made.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.control.background_tasks import BackgroundTasks
from cluster.control.backoff import Backoff
from cluster.control.desired_state import Memory, target_of
from cluster.control.epoch_plan import (
    Abort,
    Action,
    Commit,
    EndMovement,
    Prepare,
    Remove,
    Replace,
    Retire,
    decide,
)
from cluster.control.epoch_rest import is_same, unrest
from cluster.control.epoch_view import LEASE_S, EpochView, Preparation
from cluster.control.membership import MemberId, MemberState
from cluster.control.movement import Movement
from cluster.control.movement_plan import watched
from cluster.control.reconcile import further_shards
from cluster.control.resize import check_count, resize
from cluster.control.router_leases import RouterLeases
from cluster.control.shard_acts import ShardActs
from cluster.control.shard_fleet import ShardDied, ShardError, ShardPool, ShardReport
from cluster.control.shard_records import ShardRecords
from experts.epoch import Epoch
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.shard_spec import ShardSpec

logger = logging.getLogger("arriero.controller")

# An epoch for the links' sake alone: at most one in this time, for a link that breaks at once would ask for more.
REJOIN_PAUSE_S = 5.0


class UnrestError(RuntimeError):
    """A change that could wait must wait; the message says for what."""


class EpochKeeper:
    """Made for a tier that has an epoch in force. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        memory: Memory,
        pool: ShardPool,
        make_spec: Callable[[ShardId, tuple[Slot, ...]], ShardSpec],
        clock: Callable[[], float],
        timeout_s: float,
        stall_s: float,
        suspect_after_s: float,
        on_news: Callable[[], None],
        on_death: Callable[[ShardId, str], None],
    ) -> None:
        """timeout_s: for placing and loading. stall_s: how long a movement may stand still. on_news: something has
        changed, so ``act`` should be called soon. on_death hears of each shard that is lost, once, and why."""
        self._memory = memory
        self._pool = pool
        self._clock = clock
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._on_news = on_news
        self._on_death = on_death
        self._shards = ShardRecords(suspect_after_s=suspect_after_s)
        self._routers = RouterLeases()
        self._preparing: Preparation | None = None
        self._movement: Movement | None = None
        self._preparations = Backoff()
        self._began_s = clock()
        self._committed_s = float("-inf")
        self._tasks = BackgroundTasks(on_end=on_news)
        self._acts = ShardActs(
            memory=memory,
            pool=pool,
            make_spec=make_spec,
            clock=clock,
            timeout_s=timeout_s,
            shards=self._shards,
            tasks=self._tasks,
            note_death=self.note_death,
        )
        self._acting = asyncio.Lock()
        self._stopped = False
        self._take_over()

    # What becomes known

    @property
    def shards_to_look_at(self) -> tuple[ShardId, ...]:
        return self._shards.up()

    def note_report(self, shard_id: ShardId, report: ShardReport) -> None:
        self._shards.note_report(shard_id, report, self._clock())

    def note_death(self, shard_id: ShardId, reason: str, *, rests_until_s: float = 0.0) -> None:
        if self._stopped:
            return
        if self._shards.note_death(shard_id, rests_until_s=rests_until_s):
            self._on_death(shard_id, reason)
            self._on_news()

    def note_draining(self, node_ids: frozenset[str]) -> None:
        """These nodes are to go: what lives there is moved away while it serves."""
        self._shards.note_draining(node_ids)

    def note_router(self, router_id: MemberId, lanes: Mapping[str, Any]) -> None:
        known = self._routers.get(router_id)
        if not self._routers.note(router_id, lanes, self._clock()):
            return
        for shard_id, reason in lanes["lost"].items():
            if known is None or shard_id not in known.masked:
                logger.warning("%s does without %s: %s", router_id, shard_id, reason)
        self._on_news()

    def forget_router(self, router_id: MemberId) -> None:
        self._routers.forget(router_id)
        self._on_news()

    def offer(self, router_id: MemberId) -> dict[str, Any]:
        """What the router is to do about epochs; see router.lane_state.EpochOffer."""
        state, router = self._memory.state, self._routers.get(router_id)
        assert state.epoch is not None
        will_fail = self._preparing is None or self._preparing.failure is not None
        preparing = None if will_fail else state.preparing
        # The one in force first: who waits for it shall not wait for the next one, too.
        lags = router is not None and router.epoch < state.epoch["number"]
        next_epoch = state.epoch if lags else preparing
        has_it = next_epoch is None or router is None or router.prepared == next_epoch["number"]
        return {
            "in_force": state.epoch["number"],
            "preparing": None if preparing is None else preparing["number"],
            "prepare": None if has_it else next_epoch,
        }

    def is_wanted(self, shard_id: ShardId) -> bool:
        """Whether the shard is to stay."""
        return shard_id in self._memory.state.target

    def unrest(self) -> str | None:
        """Why a movement cannot begin now; None when it can."""
        if self._movement is not None and self._movement.is_open:
            return f"{self._movement.movement_id} is under way"
        return unrest(self._view())

    def _reason_to_wait(self) -> str | None:
        return "the service is being removed" if self._stopped else self.unrest()

    @property
    def movement(self) -> Movement | None:
        """The last one that this controller has begun, under way or over."""
        return self._movement

    # What is done about it

    async def scale(self, num_shards: int, *, only_at_rest: bool = False) -> tuple[ShardId, ...]:
        """Wants so many shards from now on, and returns them; ``act`` brings that about. Those that do not serve leave
        first, then the last. Raises ValueError for a number that cannot be, and with only_at_rest UnrestError."""
        async with self._acting:
            if only_at_rest and (reason := self._reason_to_wait()) is not None:
                raise UnrestError(reason)
            target = target_of(self._memory.state.target)
            check_count(target, num_shards)
            views = self._shards.views(self._clock())
            known = sorted(target.slots_by_shard, key=lambda shard: views[shard].state is not MemberState.READY)
            further = further_shards(views, max(0, num_shards - len(known)), secrets.token_hex(3))
            wanted = resize(target, [*known[:num_shards], *further])
            logger.info("scaling from %d to %d shards", len(known), num_shards)
            await self._memory.update(
                lambda state: {"target": dict(wanted.slots_by_shard), "shard_ids": (*state.shard_ids, *further)}
            )
            for shard_id in further:
                self._shards.add(shard_id)
        self._on_news()
        return tuple(wanted.slots_by_shard)

    async def move(self, placements: Sequence[ExpertPlacement]) -> Movement:
        """Begins to take up these placements one after the other, the first of which is in force; ``act`` goes on with
        that. Raises UnrestError."""
        async with self._acting:
            reason = self._reason_to_wait()
            if reason is None and not is_same(self._view().placement, placements[0]):
                reason = "the shards have changed meanwhile"
            if reason is not None:
                raise UnrestError(reason)
            name = f"rebalance-{secrets.token_hex(3)}"
            movement = Movement.begin(name, placements, stall_s=self._stall_s, now_s=self._clock())
            logger.info("%s: %d stages", movement.movement_id, movement.num_stages)
            self._movement = movement
        self._on_news()
        return movement

    async def act(self) -> None:
        """One round: decides, and begins or does what was decided."""
        async with self._acting:
            if self._stopped:
                return
            self._acts.load_what_is_named()
            self._movement = watched(self._view())
            for action in decide(self._view()):
                await self._do(action)

    async def stop(self) -> None:
        """Returns when nothing is under way any more."""
        self._stopped = True
        async with self._acting:
            await self._tasks.stop()

    def _take_over(self) -> None:
        """Knows the shards that the memory names. An epoch that was in preparation is given up by the first act: no
        router can have adopted it, for a commit is remembered before it is offered."""
        epochs = [Epoch.from_dict(plain) for plain in (self._memory.state.epoch, self._memory.state.preparing) if plain]
        addresses = {address.shard_id: address for epoch in epochs for address in epoch.shards}
        for shard_id in map(ShardId, self._memory.state.shard_ids):
            self._shards.add(shard_id, addresses.get(shard_id))
        if len(epochs) > 1:
            reborn = "the controller that prepared it has gone"
            self._preparing = Preparation(
                number=epochs[1].number, placement=epochs[1].placement, is_repair=True, failure=reborn
            )

    def _view(self) -> EpochView:
        state, now_s = self._memory.state, self._clock()
        assert state.epoch is not None
        epoch = Epoch.from_dict(state.epoch)
        return EpochView(
            now_s=now_s,
            number=epoch.number,
            placement=epoch.placement,
            target=target_of(state.target),
            shards=self._shards.views(now_s),
            routers=self._routers.views(),
            preparing=self._preparing,
            settled=now_s - self._began_s >= LEASE_S,
            may_prepare=self._preparations.is_over(now_s),
            may_rejoin=now_s - self._committed_s >= REJOIN_PAUSE_S,
            movement=self._movement,
        )

    async def _do(self, action: Action) -> None:
        match action:
            case Replace(shard_id=shard_id):
                await self._acts.replace(shard_id)
            case Prepare():
                await self._prepare(action)
            case Commit(number=number):
                await self._commit(number)
            case Abort():
                await self._abort(action)
            case Retire(shard_id=shard_id, number=number):
                self._acts.begin_retiring(shard_id, number)
            case Remove(shard_id=shard_id):
                self._acts.begin_removing(shard_id)
            case EndMovement(failure=failure):
                self._end_movement(failure)

    # Epochs

    async def _prepare(self, action: Prepare) -> None:
        number, placement = self._memory.state.last_epoch + 1, action.placement
        addresses = [self._shards.address_of(shard_id) for shard_id in placement.slots_by_shard]
        assert self._memory.state.epoch is not None
        epoch = Epoch(
            number=number,
            weights_version=self._memory.state.epoch["weights_version"],
            shards=tuple(address for address in addresses if address is not None),
            placement=placement,
        )
        await self._memory.change(preparing=epoch.to_dict(), last_epoch=number)
        why = ", to make good a loss" if action.is_repair else ", to balance" if action.is_move else ""
        logger.info("epoch %d: preparing%s", number, why)
        self._preparing = Preparation(
            number=number, placement=placement, is_repair=action.is_repair, is_move=action.is_move
        )
        for shard_id in placement.slots_by_shard:
            self._tasks.begin(("prepare", shard_id, number), partial(self._prepare_shard, shard_id, epoch))

    async def _prepare_shard(self, shard_id: ShardId, epoch: Epoch) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.prepare(shard_id, self._memory.state.term, epoch)
        except ShardDied as error:
            self.note_death(shard_id, str(error))
        except (ShardError, TimeoutError) as error:
            self._fail(epoch.number, f"{shard_id}: {error or f'not prepared within {self._timeout_s:g} s'}")
        else:
            self._shards.note_serves(shard_id, epoch.number)
            if self._preparing is not None and self._preparing.number == epoch.number:
                self._preparing = replace(self._preparing, ready=self._preparing.ready | {shard_id})

    def _fail(self, number: int, reason: str) -> None:
        if self._preparing is not None and self._preparing.number == number:
            self._preparing = replace(self._preparing, failure=reason)

    async def _commit(self, number: int) -> None:
        assert self._memory.state.preparing is not None
        assert self._preparing is not None
        # What moved is what should be from now on; until now nothing had changed, so giving up cost nothing.
        moved = {"target": dict(self._preparing.placement.slots_by_shard)} if self._preparing.is_move else {}
        await self._memory.change(epoch=self._memory.state.preparing, preparing=None, **moved)
        if moved and self._movement is not None:
            self._movement = self._movement.taken_up()
        self._preparing = None
        self._committed_s = self._clock()
        self._preparations.succeed()
        self._acts.forgive()
        logger.info("epoch %d: in force", number)
        self._on_news()

    async def _abort(self, abort: Abort) -> None:
        assert self._preparing is not None
        members, is_move = self._preparing.placement.slots_by_shard, self._preparing.is_move
        self._preparing = None
        logger.warning("epoch %d: given up: %s", abort.number, abort.reason)
        if is_move:
            self._end_movement(abort.reason)
        await self._memory.change(preparing=None)
        if not abort.try_again_now:
            self._preparations.fail(self._clock())
        for shard_id in members:
            # Also those that still load for it and do not serve it yet.
            if shard_id in self._shards.up():
                self._acts.begin_retiring(shard_id, abort.number)
        self._on_news()

    def _end_movement(self, failure: str | None) -> None:
        assert self._movement is not None
        self._movement = self._movement.ended(failure)
        name, num_stages = self._movement.movement_id, self._movement.num_stages
        if failure is None:
            logger.info("%s: done, %d stages", name, num_stages)
        else:
            logger.warning(
                "%s: given up after %d of %d stages: %s", name, self._movement.num_taken_up, num_stages, failure
            )
