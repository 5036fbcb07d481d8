"""The Ray actor around a shard: control calls only, never a row of a tensor. It only forwards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray

from experts.epoch import Epoch, ShardAddress
from experts.leaving_signal import LeavingSignal
from experts.logs import configure_logging
from experts.process_memory import resident_bytes
from experts.shard_spec import ShardSpec


class ExpertShardActor:
    """A plain class; whoever creates it wraps it with ``ray.remote`` and chooses name, place and resources.

    Loads its slots, listens on its node's address on a port the system chooses, and computes in a thread of its
    own, so control calls may come at any time. Some of them wait: give it a max_concurrency of a few calls.
    """

    def __init__(self, spec: ShardSpec) -> None:
        """Returns once the shard has loaded and listens. Raises as ``load_shard`` and ``ShardServer`` do."""
        # Here, because they load torch, which a controller that only creates shards does without.
        from experts.server import ShardServer
        from experts.shard_control import ShardControl
        from experts.shard_loader import load_more, load_shard, num_free_bytes, num_free_slots
        from experts.speed_probe import measure_speed
        from experts.transport.waiting import wait_policy

        configure_logging(spec.log, process=spec.shard_id)
        self._spec = spec
        self._node_id = ray.get_runtime_context().get_node_id()
        self._shard = load_shard(spec)
        self._control = ShardControl(self._shard, partial(load_more, spec))
        self._speed = measure_speed(self._shard, flops_per_row=spec.shape.flops_per_row)
        self._num_free_slots = partial(num_free_slots, spec)
        self._num_free_bytes = partial(num_free_bytes, spec)
        self._server = ShardServer(
            self._shard,
            secret=spec.secret,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            num_threads=spec.num_threads,
            wait=wait_policy(spec.lane_spin_us),
        )
        self._server.start()
        self._leaving = LeavingSignal()

    def address(self) -> ShardAddress:
        return self._server.address(self._node_id)

    def prepare(self, term: int, epoch: Mapping[str, Any], model: str) -> None:
        """epoch: ``Epoch.to_dict()``; model: whose weights its version is. Returns once the shard serves it. Raises as
        ``ShardControl.prepare`` does."""
        self._control.prepare(term, Epoch.from_dict(epoch), model)

    def retire(self, term: int, number: int) -> None:
        """See ``ShardControl.retire``."""
        self._control.retire(term, number)

    def stats(self) -> dict[str, Any]:
        """Who and where this is, what it holds and what it did. Raises RuntimeError once its service has failed."""
        if self._server.error is not None:
            raise RuntimeError(f"the service loop of {self._spec.shard_id} failed: {self._server.error}")
        server = self._server.stats()
        return {
            "pid": os.getpid(),
            "node": self._node_id,
            "slots": [list(slot) for slot in sorted({each.slot for each in self._shard.slots})],
            "num_slots_by_version": Counter(each.weights_version for each in self._shard.slots),
            "load": self._shard.load.snapshot(),
            "progress": server.progress,
            "busy_s": server.busy_s,
            "num_lanes": server.num_lanes,
            "lanes": server.lanes,
            "refused": server.refused,
            "num_refused_requests": server.num_refused_requests,
            "epochs": list(self._shard.epochs),
            "weights_versions": self._shard.weights_versions,
            "num_bytes": self._shard.num_bytes,
            "resident_bytes": resident_bytes(),
            "activations": self._shard.load.activations(),
            "speed": self._speed,
            "memory_pool": self._memory_pool(),
            "num_free_slots": self._num_free_slots(),
            "num_free_bytes": self._num_free_bytes(),
            "num_loaded": self._control.num_loaded,
            "is_leaving": self._leaving.has_come,
        }

    def drain(self, timeout_s: float = 30.0) -> None:
        """Takes no new lanes, answers what has arrived, closes; returns at once."""
        self._server.drain(timeout_s)

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Whether the service has ended within timeout_s; without one it waits as long as the drain lasts."""
        return self._server.wait_closed(timeout_s)

    def _memory_pool(self) -> str:
        """Shards that name the same one fill the same memory."""
        if self._spec.device == "cpu":
            return self._node_id
        return f"{self._node_id}/gpu-{','.join(map(str, ray.get_gpu_ids()))}"
