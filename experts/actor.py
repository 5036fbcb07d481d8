"""The Ray actor around a shard: control calls only, never a row of a tensor. It only forwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray

from experts.epoch import Epoch, ShardAddress
from experts.shard_spec import ShardSpec


class ExpertShardActor:
    """A plain class; whoever creates it wraps it with ``ray.remote`` and chooses name, place and resources.

    Loads its slots, listens on its node's address on a port the system chooses, and computes in a thread of its
    own, so control calls may come at any time. One call at a time is enough (max_concurrency 1).
    """

    def __init__(self, spec: ShardSpec) -> None:
        """Returns once the shard has loaded and listens. Raises as ``load_shard`` and ``ShardServer`` do."""
        # Here, because they load torch, which a controller that only creates shards does without.
        from experts.server import ShardServer
        from experts.shard_loader import load_shard
        from experts.transport.waiting import wait_policy

        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._node_id = ray.get_runtime_context().get_node_id()
        self._shard = load_shard(spec)
        self._server = ShardServer(
            self._shard,
            secret=spec.secret,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            num_threads=spec.num_threads,
            wait=wait_policy(spec.lane_spin_us),
        )
        self._server.start()

    def address(self) -> ShardAddress:
        return self._server.address(self._node_id)

    def serve_epoch(self, epoch: Mapping[str, Any]) -> None:
        """epoch: ``Epoch.to_dict()``. Raises ValueError as ``Shard.serve_epoch`` does."""
        self._shard.serve_epoch(Epoch.from_dict(epoch))

    def stats(self) -> dict[str, Any]:
        """Who and where this is, what it holds and what it did. Raises RuntimeError once its service has failed."""
        if self._server.error is not None:
            raise RuntimeError(f"the service loop of {self._spec.shard_id} failed: {self._server.error}")
        server = self._server.stats()
        return {
            "pid": os.getpid(),
            "node": self._node_id,
            "slots": [list(slot) for slot in self._shard.slots],
            "load": self._shard.load.snapshot(),
            "progress": server.progress,
            "busy_s": server.busy_s,
            "num_lanes": server.num_lanes,
            "lanes": server.lanes,
            "refused": server.refused,
            "num_refused_requests": server.num_refused_requests,
            "epochs": list(self._shard.epochs),
            "num_bytes": self._shard.num_bytes,
        }

    def drain(self, timeout_s: float = 30.0) -> None:
        """Takes no new lanes, answers what has arrived, closes; returns at once."""
        self._server.drain(timeout_s)

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Whether the service has ended within timeout_s; without one it waits as long as the drain lasts."""
        return self._server.wait_closed(timeout_s)
