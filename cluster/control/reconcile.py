"""What the controller should do next, decided from what it knows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.config import ServiceConfig
from experts.placement import ShardId

# What may change from one start of the application to the next without touching the shards.
KEYS_OF_FRONT = frozenset(
    {
        "gateways", "routers", "max_routers", "router_kv_target", "router_seat_target", "router_waiting_target",
        "router_up_delay_s", "router_down_delay_s", "router_prefix_gap", "http_host", "http_port", "grpc_port",
        "max_model_len", "max_num_batched_tokens",
        "max_num_seqs", "max_queued_requests", "num_kv_blocks", "block_size", "seed", "max_logprobs", "max_choices",
        "max_request_bytes", "stream_interval_ms", "on_missing_expert", "expert_wait_s", "lane_timeout_s",
        "lane_silence_s", "lane_transport", "micro_batches", "resubmit_timeout_s", "router_threads",
        "gateway_num_cpus", "router_num_cpus", "log_format", "log_level", "access_log", "slow_request_s",
    }
)  # fmt: skip


def shard_ids(count: int, incarnation: str) -> tuple[ShardId, ...]:
    """Names of the shards of one start; incarnation is fresh for each, so that no name is ever used twice."""
    return tuple(ShardId(f"shard-{index}-{incarnation}") for index in range(count))


def lineage(shard_id: ShardId) -> str:
    """What a shard and those that replace it have in common."""
    return shard_id.rpartition("-")[0]


def successor(shard_id: ShardId, incarnation: str) -> ShardId:
    """The name of the shard that replaces this one."""
    return ShardId(f"{lineage(shard_id)}-{incarnation}")


def further_shards(known: Collection[ShardId], count: int, incarnation: str) -> tuple[ShardId, ...]:
    """Names of count more shards, of lineages that are free."""
    taken = {lineage(shard_id) for shard_id in known}
    names = (ShardId(f"shard-{index}-{incarnation}") for index in itertools.count())
    return tuple(itertools.islice((name for name in names if lineage(name) not in taken), count))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    adopt: tuple[ShardId, ...]
    create: tuple[ShardId, ...]


def plan_shards(*, desired: Sequence[ShardId], living: Collection[ShardId]) -> ShardPlan:
    """At a start that an earlier controller may have begun: shards that live are adopted, the others created."""
    return ShardPlan(
        adopt=tuple(shard for shard in desired if shard in living),
        create=tuple(shard for shard in desired if shard not in living),
    )


def shard_changes(running: ServiceConfig, wanted: ServiceConfig, served_model: str) -> tuple[str, ...]:
    """The keys in which two configurations need different shards. served_model: may have taken the place of what
    running says; to ask for that is no change, either."""
    old, new = running.model_dump(), wanted.model_dump()
    if new["model"] == served_model:
        old["model"] = served_model
    return tuple(key for key in sorted(old) if key not in KEYS_OF_FRONT and old[key] != new[key])


class AppWatch:
    """Tells when the application has been gone from Serve for long enough to remove what belongs to it."""

    def __init__(self, *, gone_after_s: float) -> None:
        self._gone_after_s = gone_after_s
        self._absent_since_s: float | None = None

    def note(self, *, present: bool | None, now_s: float) -> bool:
        """True when it is time. present: None when Serve could not be asked, which proves nothing either way."""
        if present:
            self._absent_since_s = None
        elif present is False and self._absent_since_s is None:
            self._absent_since_s = now_s
        return (
            present is False and self._absent_since_s is not None and now_s - self._absent_since_s >= self._gone_after_s
        )
