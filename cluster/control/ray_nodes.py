"""What Ray says about the machines of the cluster."""

from __future__ import annotations

import asyncio

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError


class RayNodes:
    """Asks the GCS. ray.util.state tells the same, but needs the dashboard."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._gcs: GcsClient | None = None

    async def draining(self) -> frozenset[str] | None:
        """See cluster.control.outside.Nodes."""
        try:
            return await asyncio.to_thread(self._draining)
        except (RayError, TimeoutError):
            return None

    async def are_there_others(self, node_ids: frozenset[str]) -> bool:
        """See cluster.control.outside.Nodes."""
        try:
            async with asyncio.timeout(self._timeout_s):
                nodes = await asyncio.to_thread(ray.nodes)
        except (RayError, TimeoutError):
            return False
        return any(node["Alive"] and node["NodeID"] not in node_ids for node in nodes)

    def _draining(self) -> frozenset[str]:
        if self._gcs is None:
            self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        return frozenset(self._gcs.get_draining_nodes(timeout=self._timeout_s))
