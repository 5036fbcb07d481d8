"""What routers, shards and the controller say of themselves, as metrics."""

import os

from cluster.control.growth import Growth, GrowthState
from cluster.control.load_ledger import LoadLedger
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.metrics import definitions as metrics
from cluster.metrics.member_snapshots import controller_snapshot, router_snapshot, shard_snapshot
from cluster.metrics.snapshot import Snapshot
from experts.process_memory import resident_bytes
from router.messages import EngineStats

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_waiting_tokens=70,
    num_free_blocks={"global": 75, "local": 10},
    num_blocks={"global": 100, "local": 40},
    num_steps=9,
    num_preemptions=1,
    num_prompt_tokens=50,
    num_generated_tokens=8,
    num_cached_tokens=16,
    num_degraded_tokens=4,
    lost_shards={"shard-1": "gone"},
    expert_load=[(1, 0, 5), (1, 1, 6)],
)


def value(snapshot: Snapshot, metric: metrics.Metric, *labels: str) -> float:
    return snapshot.numbers[metric.name][labels]


def test_a_router_tells_what_its_engine_does() -> None:
    snapshot = router_snapshot(STATS, step_s=1.5, resident_bytes=7)
    told = {metric: value(snapshot, metric) for metric in (*metrics.ROUTER_METRICS, *metrics.SHARED_METRICS)}
    assert told == {
        metrics.REQUESTS_RUNNING: 3,
        metrics.REQUESTS_WAITING: 2,
        metrics.KV_CACHE_USAGE: 0.75,
        metrics.PREEMPTIONS: 1,
        metrics.PREFIX_CACHE_QUERIES: 50,
        metrics.PREFIX_CACHE_HITS: 16,
        metrics.ENGINE_STEPS: 9,
        metrics.DEGRADED_TOKENS: 4,
        metrics.WAITING_TOKENS: 70,
        metrics.LOST_SHARDS: 1,
        metrics.STEP_SECONDS: 1.5,
        metrics.EXPERT_ROWS: 11,
        metrics.RESIDENT_MEMORY: 7,
    }


def test_a_shard_tells_what_it_computed_and_refused() -> None:
    snapshot = shard_snapshot(
        load=[(1, 0, 5), (3, 2, 1)],
        busy_s=2.5,
        num_lanes=2,
        refused_lanes={"too many lanes": 3},
        num_refused_requests=4,
        resident_bytes=7,
    )
    assert value(snapshot, metrics.REFUSED_LANES, "too many lanes") == 3
    told = [
        value(snapshot, metric) for metric in (*metrics.SHARD_METRICS, *metrics.SHARED_METRICS) if not metric.labels
    ]
    assert told == [2.5, 2, 4, 6, 7]


def test_the_controller_counts_members_of_every_kind_and_state() -> None:
    members = [
        Member(member_id=MemberId(str(number)), kind=MemberKind.ROUTER, pid=1, node_id="n", state=state)
        for number, state in enumerate((MemberState.READY, MemberState.READY, MemberState.DEAD))
    ]
    growth = Growth(state=GrowthState.TOO_BUSY, least=1, most=2, busy=0.75)
    snapshot = controller_snapshot(epoch=3, members=members, imbalance={5: 0.25}, growth=growth, resident_bytes=7)
    assert [value(snapshot, metrics.SHARD_GROWTH, state) for state in ("too_busy", "steady")] == [1, 0]
    assert value(snapshot, metrics.SHARD_BUSY_FRACTION) == 0.75
    assert value(snapshot, metrics.EPOCH) == 3
    assert value(snapshot, metrics.MEMBERS, "router", "ready") == 2
    assert value(snapshot, metrics.MEMBERS, "router", "dead") == 1
    assert value(snapshot, metrics.MEMBERS, "shard", "ready") == 0
    assert value(snapshot, metrics.EXPERT_LOAD_IMBALANCE, "5") == 0.25


def test_imbalance_counts_experts_that_nobody_asked_for_and_members_that_are_gone() -> None:
    ledger = LoadLedger()
    ledger.report(MemberId("shard-0"), [(1, 0, 6), (1, 1, 0), (3, 0, 0)])
    ledger.report(MemberId("shard-1"), [(1, 2, 3), (3, 1, 0)])
    ledger.close(MemberId("shard-0"))
    assert ledger.imbalance() == {1: 1.0}


def test_memory_is_that_of_the_process_that_is_asked_for() -> None:
    assert resident_bytes() > 1_000_000
    assert abs(resident_bytes(os.getpid()) - resident_bytes()) < 10_000_000
    assert resident_bytes(2**22 + 1) == 0, "no process has this id"
