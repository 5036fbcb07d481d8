"""Keeps the expert tier whole once it has started: looks at what is known, decides (epoch_plan.py), acts, remembers.

Everything that may take long runs as a task of its own, so that the next loss is met at once. While two versions of
the weights are served each has its own line of epochs on the same shards, and the same is done for both.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.control.background_tasks import BackgroundTasks
from cluster.control.desired_state import Memory, target_of
from cluster.control.epoch_line import EpochLine, LineWorld
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
from cluster.control.epoch_view import EpochView
from cluster.control.membership import MemberId, MemberState
from cluster.control.movement import Movement
from cluster.control.movement_plan import watched
from cluster.control.reconcile import further_shards
from cluster.control.resize import check_count, resize
from cluster.control.shard_acts import ShardActs
from cluster.control.shard_fleet import ShardPool, ShardReport
from cluster.control.shard_records import ShardRecords
from cluster.control.weight_lines import lines_of
from experts.epoch import Epoch
from experts.placement import ExpertPlacement, ShardId, Slot
from experts.shard_spec import ShardSpec

logger = logging.getLogger("arriero.controller")


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
        self._clock = clock
        self._stall_s = stall_s
        self._on_news = on_news
        self._on_death = on_death
        self._shards = ShardRecords(suspect_after_s=suspect_after_s)
        self._movement: Movement | None = None
        self._tasks = BackgroundTasks(on_end=on_news)
        self._world = LineWorld(
            memory=memory,
            pool=pool,
            clock=clock,
            timeout_s=timeout_s,
            shards=self._shards,
            tasks=self._tasks,
            note_death=self.note_death,
        )
        self._lines: dict[int, EpochLine] = {}
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

    def note_router(self, router_id: MemberId, weights_version: int, lanes: Mapping[str, Any]) -> None:
        line = self._lines.get(weights_version)
        if line is not None and line.note_router(router_id, lanes):
            self._on_news()

    def forget_router(self, router_id: MemberId) -> None:
        for line in self._lines.values():
            line.forget_router(router_id)
        self._on_news()

    def offer(self, router_id: MemberId, weights_version: int) -> dict[str, Any] | None:
        """See EpochLine.offer. None for a version that is not served."""
        line = self._lines.get(weights_version)
        if line is None or weights_version not in lines_of(self._memory.state):
            return None
        return line.offer(router_id)

    def failure_of(self, weights_version: int) -> str | None:
        """Why shards cannot serve this version; None as far as is known."""
        line = self._lines.get(weights_version)
        return None if line is None else line.failure

    def is_wanted(self, shard_id: ShardId) -> bool:
        """Whether the shard is to stay."""
        return shard_id in self._memory.state.target

    def unrest(self) -> str | None:
        """Why a movement cannot begin now; None when it can."""
        if self._movement is not None and self._movement.is_open:
            return f"{self._movement.movement_id} is under way"
        if self._memory.state.other is not None:
            return f"weights version {self._memory.state.other.weights_version} is served or loaded, too"
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
            views = self._shards.views(self._clock(), self._memory.state.weights_version)
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
        """One round: decides, and begins or does what was decided, for the served version first."""
        async with self._acting:
            if self._stopped:
                return
            self._follow_memory()
            self._acts.load_what_is_named()
            self._movement = watched(self._view())
            for line in [*self._lines.values()]:
                for action in decide(self._view_of(line)):
                    await self._do(line, action)
            for shard_id, number in self._shards.strays(self._lines):
                self._acts.begin_retiring(shard_id, number)

    async def stop(self) -> None:
        """Returns when nothing is under way any more."""
        self._stopped = True
        async with self._acting:
            await self._tasks.stop()

    def _take_over(self) -> None:
        """Knows the shards that the memory names."""
        self._follow_memory()
        lines = lines_of(self._memory.state).values()
        epochs = [Epoch.from_dict(plain) for line in lines for plain in (line.epoch, line.preparing) if plain]
        addresses = {address.shard_id: address for epoch in epochs for address in epoch.shards}
        for shard_id in map(ShardId, self._memory.state.shard_ids):
            self._shards.add(shard_id, addresses.get(shard_id))

    def _follow_memory(self) -> None:
        """A line for each version that there should be, the served one first. Where one is no more, what was prepared
        for it ends."""
        wanted = lines_of(self._memory.state)
        for version in self._lines.keys() - wanted.keys():
            gone = self._lines.pop(version)
            if gone.preparing is not None:
                self._tell_given_up(gone.preparing.number, gone.preparing.placement)
        self._lines = {version: self._lines.get(version) or EpochLine(version, self._world) for version in wanted}

    @property
    def _served(self) -> EpochLine:
        return self._lines[self._memory.state.weights_version]

    def _view(self) -> EpochView:
        return self._view_of(self._served)

    def _view_of(self, line: EpochLine) -> EpochView:
        if line is self._served:
            others = (other.shards_in_use for other in self._lines.values() if other is not line)
            return line.view(leads=True, movement=self._movement, used_elsewhere=frozenset[ShardId]().union(*others))
        # A version that nobody uses yet is loaded while nothing else is under way, and not again where it failed.
        may_begin = line.failure is None and unrest(self._view()) is None
        return line.view(leads=False, may_prepare=line.in_force is not None or may_begin)

    async def _do(self, line: EpochLine, action: Action) -> None:
        match action:
            case Replace(shard_id=shard_id):
                await self._acts.replace(shard_id)
            case Prepare():
                await line.prepare(action)
            case Commit(number=number):
                await self._commit(line, number)
            case Abort():
                await self._abort(line, action)
            case Retire(shard_id=shard_id, number=number):
                self._acts.begin_retiring(shard_id, number)
            case Remove(shard_id=shard_id):
                self._acts.begin_removing(shard_id)
            case EndMovement(failure=failure):
                self._end_movement(failure)

    async def _commit(self, line: EpochLine, number: int) -> None:
        is_move = await line.commit(number)
        if is_move and self._movement is not None:
            self._movement = self._movement.taken_up()
        self._acts.forgive()
        self._on_news()

    async def _abort(self, line: EpochLine, abort: Abort) -> None:
        given_up = await line.abort(abort)
        if given_up.is_move:
            self._end_movement(abort.reason)
        self._tell_given_up(given_up.number, given_up.placement)
        self._on_news()

    def _tell_given_up(self, number: int, placement: ExpertPlacement) -> None:
        for shard_id in placement.slots_by_shard:
            # Also those that still load for it and do not serve it yet.
            if shard_id in self._shards.up():
                self._acts.begin_retiring(shard_id, number)

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
