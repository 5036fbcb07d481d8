"""The service's shards: brought up together, looked at, taken down. Plain: shards are reached through a protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from cluster.control.reconcile import plan_shards
from cluster.control.shard_work import ShardWork
from cluster.metrics.snapshot import Snapshot
from experts.epoch import Epoch, ShardAddress
from experts.placement import ShardId
from experts.shard_spec import ShardSpec

logger = logging.getLogger("arriero.controller")
T = TypeVar("T")


class ShardError(Exception):
    """What a shard was asked for did not come about; the message says why."""


class ShardDied(ShardError):  # noqa: N818 told, not erred
    """The shard's process has ended, or its actor does not exist."""


class ShardUnreachable(ShardError):  # noqa: N818
    """The shard may live, but cannot be spoken to now."""


class ShardRefused(ShardError):  # noqa: N818
    """The shard answered, with an error."""


class StartError(RuntimeError):
    """The service cannot start; the message names the shard, the phase and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What a shard says of itself. load: (layer, expert, tokens) since it started. num_free_slots fit into
    memory_pool, which it may share with others, and of which num_free_bytes are free. num_loaded: slots that it was
    given since it started. epochs: those it serves, each with its weights version. is_leaving: its process was told to
    end."""

    pid: int
    node_id: str
    load: Sequence[tuple[int, int, int]]
    epochs: Mapping[int, int]
    memory_pool: str
    num_free_slots: int
    num_loaded: int
    work: ShardWork
    num_free_bytes: int = 0
    is_leaving: bool = False
    metrics: Snapshot = field(default_factory=Snapshot)


class ShardPool(Protocol):
    """Shards as processes, by id. Every method but remove may raise a ShardError."""

    async def living(self, shard_ids: Collection[ShardId]) -> set[ShardId]: ...

    async def create(self, spec: ShardSpec) -> None:
        """Returns once the shard has a place to live in; it loads by itself."""
        ...

    async def address(self, shard_id: ShardId) -> ShardAddress:
        """Returns once the shard has loaded and listens."""
        ...

    async def prepare(self, shard_id: ShardId, term: int, epoch: Epoch, model: str) -> None:
        """Returns once the shard has loaded what the epoch gives it, of this model, and serves it."""
        ...

    async def retire(self, shard_id: ShardId, term: int, number: int) -> None: ...

    async def report(self, shard_id: ShardId) -> ShardReport: ...

    async def remove(self, shard_id: ShardId, *, drain_timeout_s: float) -> None:
        """Drains and ends the shard and gives its place back. Does nothing where there is none. Never raises."""
        ...


class ShardFleet:
    """Brings shards up as one: either all serve the epoch, or StartError says which could not and why."""

    def __init__(self, pool: ShardPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    async def load(self, specs: Mapping[ShardId, ShardSpec]) -> tuple[ShardAddress, ...]:
        """Adopts the shards that live, creates the others, and waits until every one has loaded."""
        ids = tuple(specs)
        plan = plan_shards(desired=ids, living=await self._pool.living(ids))
        logger.info("shards: adopting %s, creating %s", list(plan.adopt), list(plan.create))
        await self._all(
            self._within(shard_id, "placing", self._pool.create(specs[shard_id])) for shard_id in plan.create
        )
        return await self._all(self._within(shard_id, "loading", self._pool.address(shard_id)) for shard_id in ids)

    async def open(self, epoch: Epoch, shard_ids: Iterable[ShardId], *, term: int, model: str) -> None:
        """Has the shards serve the epoch."""
        await self._all(
            self._within(shard_id, f"opening epoch {epoch.number}", self._pool.prepare(shard_id, term, epoch, model))
            for shard_id in shard_ids
        )

    async def remove(self, shard_ids: Collection[ShardId], *, drain_timeout_s: float) -> None:
        await asyncio.gather(*(self._pool.remove(shard_id, drain_timeout_s=drain_timeout_s) for shard_id in shard_ids))

    async def _within(self, shard_id: ShardId, phase: str, act: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await act
        except TimeoutError:
            raise StartError(f"{shard_id}: {phase} took longer than {self._timeout_s:g} s") from None
        except ShardError as error:
            raise StartError(f"{shard_id}: {phase} failed: {error}") from None

    @staticmethod
    async def _all(acts: Iterable[Awaitable[T]]) -> tuple[T, ...]:
        """Runs all at once; the first failure cancels the others and is raised."""
        tasks = [asyncio.ensure_future(act) for act in acts]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
