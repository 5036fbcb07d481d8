"""Shards as Ray actors: detached, named, each in a detached placement group of its own.

Actor and group carry the same name, which begins with the application's: two applications can share a cluster,
and a controller that is reborn finds what the one before it has made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.control.shard_fleet import ShardDied, ShardError, ShardRefused, ShardReport, ShardUnreachable
from cluster.control.shard_work import ShardWork
from cluster.metrics.member_snapshots import shard_snapshot
from experts.actor import ExpertShardActor
from experts.epoch import Epoch, ShardAddress
from experts.placement import ShardId
from experts.shard_spec import ShardSpec

logger = logging.getLogger("arriero.controller")

NAMESPACE = "arriero"
PLACING_POLL_S = 1.0
REMOVE_TIMEOUT_S = 10.0
# A preparation and a drain may take long; nobody shall take the shard for silent meanwhile.
SHARD_CALLS_AT_A_TIME = 8
# A shard computes in threads that wait for their next tile; they must not burn the cores of the others meanwhile.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


class RayShardPool:
    """See cluster.control.shard_fleet.ShardPool. Ray's blocking calls run in threads."""

    def __init__(self, *, app_name: str, num_cpus: float, num_gpus: float) -> None:
        self._app_name = app_name
        self._resources = {"CPU": num_cpus, "GPU": num_gpus}
        self._handles: dict[ShardId, ActorHandle[Any]] = {}

    async def living(self, shard_ids: Collection[ShardId]) -> set[ShardId]:
        found = await asyncio.gather(*(self._answers(shard_id) for shard_id in shard_ids))
        return {shard_id for shard_id, answers in zip(shard_ids, found, strict=True) if answers}

    async def create(self, spec: ShardSpec) -> None:
        """The actor waits for its group by itself; we wait for the group, so that a cluster that is full is
        told from a shard that does not load."""
        group = await asyncio.to_thread(self._create, spec)
        while not await asyncio.to_thread(group.wait, PLACING_POLL_S):
            logger.info("%s: waiting for %s", spec.shard_id, self._resources)

    async def address(self, shard_id: ShardId) -> ShardAddress:
        address: ShardAddress = await self._ask(shard_id, "address")
        return address

    async def prepare(self, shard_id: ShardId, term: int, epoch: Epoch, model: str) -> None:
        await self._ask(shard_id, "prepare", term, epoch.to_dict(), model)

    async def retire(self, shard_id: ShardId, term: int, number: int) -> None:
        await self._ask(shard_id, "retire", term, number)

    async def report(self, shard_id: ShardId) -> ShardReport:
        stats = await self._ask(shard_id, "stats")
        metrics = shard_snapshot(
            load=stats["load"],
            busy_s=stats["busy_s"],
            num_lanes=stats["num_lanes"],
            refused_lanes=stats["refused"],
            num_refused_requests=stats["num_refused_requests"],
            resident_bytes=stats["resident_bytes"],
        )
        return ShardReport(
            pid=stats["pid"],
            node_id=stats["node"],
            load=stats["load"],
            epochs=stats["weights_versions"],
            memory_pool=stats["memory_pool"],
            num_free_slots=stats["num_free_slots"],
            num_loaded=stats["num_loaded"],
            num_free_bytes=stats["num_free_bytes"],
            is_leaving=stats["is_leaving"],
            work=ShardWork.from_stats(stats),
            metrics=metrics,
        )

    async def remove(self, shard_id: ShardId, *, drain_timeout_s: float) -> None:
        if drain_timeout_s > 0:
            await self._drain(shard_id, drain_timeout_s)
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                await asyncio.to_thread(self._remove, shard_id)
        except (RayError, TimeoutError) as error:
            logger.error("%s could not be removed: %s", shard_id, error)
        self._handles.pop(shard_id, None)

    def _create(self, spec: ShardSpec) -> PlacementGroup:
        name = self._name(spec.shard_id)
        bundle = {resource: amount for resource, amount in self._resources.items() if amount}
        group = self._find_group(spec.shard_id) or placement_group([bundle], name=name, lifetime="detached")
        actor_class: Any = ray.remote(ExpertShardActor)
        shard = actor_class.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            max_concurrency=SHARD_CALLS_AT_A_TIME,
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources["GPU"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
            runtime_env={"env_vars": {**QUIET_THREADS, "OMP_NUM_THREADS": str(spec.num_threads)}},
        )
        self._handles[spec.shard_id] = shard.remote(spec)
        return group

    def _remove(self, shard_id: ShardId) -> None:
        handle = self._find(shard_id)
        if handle is not None:
            ray.kill(handle, no_restart=True)
        group = self._find_group(shard_id)
        if group is not None:
            remove_placement_group(group)

    async def _drain(self, shard_id: ShardId, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._ask(shard_id, "drain", timeout_s)
                await self._ask(shard_id, "wait_closed", timeout_s)
        except (ShardError, TimeoutError) as error:
            logger.warning("%s did not drain: %s", shard_id, error)

    async def _answers(self, shard_id: ShardId) -> bool:
        try:
            await self._ask(shard_id, "stats")
        except ShardError:
            return False
        return True

    async def _ask(self, shard_id: ShardId, method: str, *arguments: Any) -> Any:
        handle = await asyncio.to_thread(self._find, shard_id)
        if handle is None:
            raise ShardDied("its actor does not exist")
        try:
            return await getattr(handle, method).remote(*arguments)
        except ActorDiedError as error:
            raise ShardDied(reason_of(error)) from None
        except ActorUnavailableError as error:
            raise ShardUnreachable(reason_of(error)) from None
        except RayTaskError as error:
            raise ShardRefused(f"{method}: {reason_of(error)}") from None

    def _find(self, shard_id: ShardId) -> ActorHandle[Any] | None:
        if shard_id not in self._handles:
            try:
                self._handles[shard_id] = ray.get_actor(self._name(shard_id), namespace=NAMESPACE)
            except ValueError:
                return None
        return self._handles[shard_id]

    def _find_group(self, shard_id: ShardId) -> PlacementGroup | None:
        """By Ray's table: groups are named within the namespace of whoever made them."""
        for group_id, entry in placement_group_table().items():
            if entry["name"] == self._name(shard_id) and entry["state"] != "REMOVED":
                return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
        return None

    def _name(self, shard_id: ShardId) -> str:
        return f"{self._app_name}:{shard_id}"


def reason_of(error: Exception) -> str:
    """Ray's errors carry whole tracebacks; the last line is the one that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
