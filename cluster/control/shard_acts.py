"""What is done with single shards: they are made and loaded, replaced, removed, and told to retire an epoch.

What may take long runs as a task of its own. A shard's name is in the memory before the shard is made.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cluster.control.background_tasks import BackgroundTasks
from cluster.control.backoff import Backoff
from cluster.control.desired_state import Memory, target_of
from cluster.control.reconcile import lineage, successor
from cluster.control.shard_fleet import ShardDied, ShardError, ShardPool
from cluster.control.shard_records import ShardRecords
from experts.placement import ShardId, Slot
from experts.shard_spec import ShardSpec

logger = logging.getLogger("arriero.controller")

RETIRE_TIMEOUT_S = 10.0


class NoteDeath(Protocol):
    def __call__(self, shard_id: ShardId, reason: str, *, rests_until_s: float = 0.0) -> None: ...


class ShardActs:
    """All methods belong to one event loop."""

    def __init__(
        self,
        *,
        memory: Memory,
        pool: ShardPool,
        make_spec: Callable[[ShardId, tuple[Slot, ...]], ShardSpec],
        clock: Callable[[], float],
        timeout_s: float,
        shards: ShardRecords,
        tasks: BackgroundTasks,
        note_death: NoteDeath,
    ) -> None:
        """timeout_s: for placing and loading. shards: learns what comes of it. note_death hears of each failure."""
        self._memory = memory
        self._pool = pool
        self._make_spec = make_spec
        self._clock = clock
        self._timeout_s = timeout_s
        self._shards = shards
        self._tasks = tasks
        self._note_death = note_death
        self._starts: dict[str, Backoff] = {}

    def load_what_is_named(self) -> None:
        """Shards that the memory names and that have not loaded; creating one that is there does nothing."""
        target = target_of(self._memory.state.target).slots_by_shard
        for shard_id in self._shards.loading():
            if shard_id in target:
                self._tasks.begin(("load", shard_id), partial(self._load, shard_id, target[shard_id]))

    async def _load(self, shard_id: ShardId, slots: tuple[Slot, ...]) -> None:
        backoff = self._starts.setdefault(lineage(shard_id), Backoff())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.create(self._make_spec(shard_id, slots))
                address = await self._pool.address(shard_id)
                report = await self._pool.report(shard_id)
        except (ShardError, TimeoutError) as error:
            reason = str(error) or f"it has not loaded within {self._timeout_s:g} s"
            self._note_death(shard_id, reason, rests_until_s=backoff.fail(self._clock()))
            return
        logger.info("%s has loaded %d slots", shard_id, len(slots))
        self._shards.note_up(shard_id, address)
        self._shards.note_report(shard_id, report, self._clock())

    async def replace(self, dead: ShardId) -> None:
        new = successor(dead, secrets.token_hex(3))
        logger.warning("%s is replaced by %s", dead, new)
        await self._memory.update(
            lambda state: {
                "target": {(new if shard == dead else shard): slots for shard, slots in state.target.items()},
                "shard_ids": (*state.shard_ids, new),
            }
        )
        self._shards.add(new)
        self.load_what_is_named()

    def begin_removing(self, shard_id: ShardId) -> None:
        self._tasks.begin(("remove", shard_id), partial(self._remove, shard_id))

    def begin_retiring(self, shard_id: ShardId, number: int) -> None:
        self._tasks.begin(("retire", shard_id, number), partial(self._retire, shard_id, number))

    def forgive(self) -> None:
        """An epoch has come into force: whoever fails from now on fails for the first time."""
        for backoff in self._starts.values():
            backoff.succeed()

    async def _remove(self, shard_id: ShardId) -> None:
        await self._pool.remove(shard_id, drain_timeout_s=0.0)
        await self._memory.update(
            lambda state: {"shard_ids": tuple(name for name in state.shard_ids if name != shard_id)}
        )
        self._shards.drop(shard_id)
        logger.info("%s is removed", shard_id)

    async def _retire(self, shard_id: ShardId, number: int) -> None:
        try:
            async with asyncio.timeout(RETIRE_TIMEOUT_S):
                await self._pool.retire(shard_id, self._memory.state.term, number)
        except ShardDied as error:
            self._note_death(shard_id, str(error))
        except (ShardError, TimeoutError) as error:
            logger.warning("%s does not retire epoch %d: %s", shard_id, number, error)
        else:
            self._shards.note_retired(shard_id, number)
