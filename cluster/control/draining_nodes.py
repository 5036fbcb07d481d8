"""The machines that are to go soon: whoever lives there is shown as draining, and shards there are moved away."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from cluster.control.expert_tier import ExpertTier
from cluster.control.membership import Member, MemberState
from cluster.control.outside import Nodes

logger = logging.getLogger("arriero.controller")

LOOK_S = 1.0


class MustMoveError(Exception):
    """This controller's own node is to go: Ray is to start it again on another one, in a new term."""


class DrainingNodes:
    """All methods belong to one event loop. What is known stays known while Ray does not answer."""

    def __init__(self, nodes: Nodes, tier: ExpertTier, *, my_node_id: str) -> None:
        self._my_node_id = my_node_id
        self._nodes = nodes
        self._tier = tier
        self._ids: frozenset[str] = frozenset()

    @property
    def ids(self) -> list[str]:
        return sorted(self._ids)

    def shown(self, member: Member) -> Member:
        """The member as the view shows it."""
        is_leaving = member.node_id in self._ids and member.state is MemberState.READY
        return replace(member, state=MemberState.DRAINING) if is_leaving else member

    async def watch_for_ever(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Raises MustMoveError where there is another node to move to."""
        found = await self._nodes.draining()
        if found is not None and found != self._ids:
            for node_id in sorted(found - self._ids):
                logger.warning("node %s is to go: what lives there is moved away", node_id)
            self._ids = found
        if self._my_node_id in self._ids and await self._nodes.are_there_others(self._ids):
            raise MustMoveError(f"node {self._my_node_id} is to go")
        if self._tier.keeper is not None:
            self._tier.keeper.note_draining(self._ids)
