"""Which weights versions members have, by their last reports, and what a further one would take. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.control.shard_fleet import ShardReport
from cluster.control.update_room import Need, Room, rooms
from experts.placement import ShardId

Members = Callable[[MemberKind], Iterable[Member]]


class VersionBook:
    """Reports of routers, gateways and shards; members says who there is."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._reports: dict[MemberId, MemberReport] = {}
        self._shards: dict[ShardId, ShardReport] = {}

    def note(self, member_id: MemberId, report: MemberReport) -> None:
        self._reports[member_id] = report

    def note_shard(self, shard_id: ShardId, report: ShardReport) -> None:
        self._shards[shard_id] = report

    def forget(self, member_id: MemberId) -> None:
        self._reports.pop(member_id, None)
        self._shards.pop(ShardId(member_id), None)

    def routers(self, weights_version: int) -> dict[MemberId, str]:
        """The ready ones of this version, each with its replica."""
        return {
            router.member_id: report.replica
            for router, report in self._ready_routers()
            if report.weights_version == weights_version
        }

    def gateways_behind(self, weights_version: int) -> tuple[MemberId, ...]:
        """Those that may have requests of this version. One that has not told anything yet may."""
        living = (each for each in self._members(MemberKind.GATEWAY) if each.state is not MemberState.DEAD)
        return tuple(each.member_id for each in living if self._may_use(each.member_id, weights_version))

    def failure(self, weights_version: int) -> str | None:
        """Why a replica cannot have a router of this version; None as far as is known."""
        for router, report in self._ready_routers():
            if weights_version in report.failed_versions:
                return f"the replica of {router.member_id}: {report.failed_versions[weights_version]}"
        return None

    def rooms(self, slots_by_shard: Mapping[ShardId, Collection[object]], slot_bytes: int) -> tuple[Room, ...]:
        """What a second version takes in each memory: of a shard its slots, of a router what its engine has now.

        Raises ValueError for a member that has not told enough yet.
        """
        needs, free = [], dict[str, list[int]]()
        for shard_id, slots in slots_by_shard.items():
            if shard_id not in self._shards:
                raise ValueError(f"nothing is known of {shard_id} yet")
            shard = self._shards[shard_id]
            needs.append(Need(member=shard_id, memory=shard.memory_pool, num_bytes=len(slots) * slot_bytes))
            free.setdefault(shard.memory_pool, []).append(shard.num_free_bytes)
        for router, report in self._ready_routers():
            if not report.resident_bytes:
                raise ValueError(f"nothing is known of {router.member_id} yet")
            needs.append(Need(member=router.member_id, memory=router.node_id, num_bytes=report.resident_bytes))
            free.setdefault(router.node_id, []).append(report.num_free_bytes)
        return rooms(needs, {memory: min(told) for memory, told in free.items()})

    def _ready_routers(self) -> list[tuple[Member, MemberReport]]:
        routers = (each for each in self._members(MemberKind.ROUTER) if each.state is MemberState.READY)
        known = ((router, self._reports.get(router.member_id)) for router in routers)
        return [(router, report) for router, report in known if report is not None]

    def _may_use(self, member_id: MemberId, weights_version: int) -> bool:
        report = self._reports.get(member_id)
        return report is None or weights_version in report.weights_versions
