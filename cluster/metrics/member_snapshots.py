"""What routers, shards and the controller know of themselves, as snapshots of their metrics. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from cluster.control.growth import Growth, GrowthState
from cluster.control.membership import Member, MemberKind, MemberState
from cluster.metrics import definitions as metrics
from cluster.metrics.snapshot import Snapshot
from router.messages import EngineStats

ExpertTokens = tuple[int, int, int]


def router_snapshot(stats: EngineStats, *, step_s: float, resident_bytes: int) -> Snapshot:
    """step_s: how long the step under way has taken, 0 between steps."""
    snapshot = Snapshot()
    snapshot.put(metrics.REQUESTS_RUNNING, stats.num_running)
    snapshot.put(metrics.REQUESTS_WAITING, stats.num_waiting)
    snapshot.put(metrics.WAITING_TOKENS, stats.num_waiting_tokens)
    snapshot.put(metrics.KV_CACHE_USAGE, _fullest(stats.num_free_blocks, stats.num_blocks))
    snapshot.put(metrics.PREEMPTIONS, stats.num_preemptions)
    snapshot.put(metrics.PREFIX_CACHE_QUERIES, stats.num_prompt_tokens)
    snapshot.put(metrics.PREFIX_CACHE_HITS, stats.num_cached_tokens)
    snapshot.put(metrics.ENGINE_STEPS, stats.num_steps)
    snapshot.put(metrics.DEGRADED_TOKENS, stats.num_degraded_tokens)
    snapshot.put(metrics.LOST_SHARDS, len(stats.lost_shards))
    snapshot.put(metrics.STEP_SECONDS, step_s)
    snapshot.put(metrics.RESIDENT_MEMORY, resident_bytes)
    if stats.expert_load:
        snapshot.put(metrics.EXPERT_ROWS, _num_rows(stats.expert_load))
    return snapshot


def shard_snapshot(
    *,
    load: Iterable[ExpertTokens],
    busy_s: float,
    num_lanes: int,
    refused_lanes: Mapping[str, int],
    num_refused_requests: int,
    resident_bytes: int,
) -> Snapshot:
    """As ExpertShardActor.stats says it."""
    snapshot = Snapshot()
    snapshot.put(metrics.EXPERT_ROWS, _num_rows(load))
    snapshot.put(metrics.SHARD_BUSY_SECONDS, busy_s)
    snapshot.put(metrics.SHARD_LANES, num_lanes)
    for reason, num_lanes_refused in refused_lanes.items():
        snapshot.put(metrics.REFUSED_LANES, num_lanes_refused, reason)
    snapshot.put(metrics.REFUSED_ROWS, num_refused_requests)
    snapshot.put(metrics.RESIDENT_MEMORY, resident_bytes)
    return snapshot


def controller_snapshot(
    *, epoch: int, members: Iterable[Member], imbalance: Mapping[int, float], growth: Growth, resident_bytes: int
) -> Snapshot:
    """imbalance: by layer."""
    snapshot = Snapshot()
    snapshot.put(metrics.EPOCH, epoch)
    counts = Counter((member.kind, member.state) for member in members)
    for kind in MemberKind:
        for state in MemberState:
            snapshot.put(metrics.MEMBERS, counts[kind, state], kind, state)
    for growth_state in GrowthState:
        snapshot.put(metrics.SHARD_GROWTH, int(growth_state is growth.state), growth_state)
    if growth.busy is not None:
        snapshot.put(metrics.SHARD_BUSY_FRACTION, growth.busy)
    for layer, value in imbalance.items():
        snapshot.put(metrics.EXPERT_LOAD_IMBALANCE, value, str(layer))
    snapshot.put(metrics.RESIDENT_MEMORY, resident_bytes)
    return snapshot


def _fullest(num_free: Mapping[str, int], num_blocks: Mapping[str, int]) -> float:
    return max((1 - num_free[group] / total for group, total in num_blocks.items() if total), default=0.0)


def _num_rows(load: Iterable[ExpertTokens]) -> int:
    return sum(num_rows for _layer, _expert, num_rows in load)
