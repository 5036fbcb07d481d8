"""What the control plane acts on, as protocols: Serve, Ray's actors and nodes, its memory, the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.control.desired_state import Store
from cluster.control.shard_fleet import ShardPool


class Apps(Protocol):
    async def is_present(self, app_name: str) -> bool | None:
        """Whether Serve has the application; None when Serve does not answer."""
        ...


class Probe(Protocol):
    async def has_died(self, process: Any) -> bool:
        """Whether the process behind a member's handle has ended; False when that cannot be told in time."""
        ...


class Nodes(Protocol):
    async def draining(self) -> frozenset[str] | None:
        """Ray's ids of the nodes that are to go soon; None when Ray does not answer."""
        ...

    async def are_there_others(self, node_ids: frozenset[str]) -> bool:
        """Whether nodes live that are none of these; False when Ray does not answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What the control plane acts on."""

    store: Store
    apps: Apps
    pool: ShardPool
    probe: Probe
    nodes: Nodes
    clock: Callable[[], float] = time.monotonic
