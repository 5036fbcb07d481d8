"""Asks every shard of the service how it is, every heartbeat, and tells the keeper and the membership."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from cluster.control.expert_tier import ExpertTier
from cluster.control.membership import Member, MemberId, MemberKind, Membership, MemberState
from cluster.control.shard_fleet import ShardDied, ShardPool, ShardRefused, ShardReport, ShardUnreachable
from experts.placement import ShardId


class ShardWatch:
    """All methods belong to one event loop."""

    def __init__(
        self,
        *,
        tier: ExpertTier,
        pool: ShardPool,
        membership: Membership,
        clock: Callable[[], float],
        timeout_s: float,
        on_report: Callable[[ShardId, ShardReport], None],
        on_leave: Callable[[MemberId], None],
    ) -> None:
        """timeout_s: for one answer. on_leave hears of shards that are members and no longer named."""
        self._tier = tier
        self._pool = pool
        self._membership = membership
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_report = on_report
        self._on_leave = on_leave
        self._looks: dict[MemberId, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """A look at each living shard, where the last one has ended: one that is silent holds up no other."""
        wanted = [MemberId(shard_id) for shard_id in self._tier.shard_ids]
        for shard in self._shards():
            if shard.member_id not in wanted and shard.state is not MemberState.DEAD:
                self._on_leave(shard.member_id)
        for member_id in wanted:
            if member_id not in self._membership:
                self._membership.report(_new_shard(member_id), self._clock())
        for shard in self._shards():
            if shard.state is not MemberState.DEAD and shard.member_id not in self._looks:
                self._looks[shard.member_id] = asyncio.create_task(self._look_at(shard))

    async def look_at_all(self) -> None:
        self.begin()
        await asyncio.gather(*self._looks.values())

    def _shards(self) -> tuple[Member, ...]:
        return self._membership.of_kind(MemberKind.SHARD, self._clock())

    async def _look_at(self, shard: Member) -> None:
        try:
            await self._ask(shard)
        finally:
            del self._looks[shard.member_id]

    async def _ask(self, shard: Member) -> None:
        keeper, shard_id = self._tier.keeper, ShardId(shard.member_id)
        if keeper is None or shard_id not in keeper.shards_to_look_at:
            # It loads; whoever waits for that tells of one that cannot.
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                report = await self._pool.report(shard_id)
        except (TimeoutError, ShardUnreachable):
            return
        except (ShardDied, ShardRefused) as error:
            keeper.note_death(shard_id, str(error))
            return
        keeper.note_report(shard_id, report)
        state = MemberState.READY if keeper.is_wanted(shard_id) else MemberState.DRAINING
        seen = replace(shard, pid=report.pid, node_id=report.node_id, state=state)
        if self._membership.report(seen, self._clock()):
            self._on_report(shard_id, report)


def _new_shard(member_id: MemberId) -> Member:
    return Member(member_id=member_id, kind=MemberKind.SHARD, pid=0, node_id="", state=MemberState.STARTING)
