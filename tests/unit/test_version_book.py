"""Who has which version of the weights, by members' last words, and what another version would take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.control.member_report import MemberReport
from cluster.control.membership import Member, MemberId, MemberKind, MemberState
from cluster.control.shard_fleet import ShardReport
from cluster.control.shard_work import ShardWork
from cluster.control.version_book import VersionBook
from experts.placement import ShardId

ROUTER = Member(member_id=MemberId("r1"), kind=MemberKind.ROUTER, pid=1, node_id="n1", state=MemberState.READY)
GATEWAY = replace(ROUTER, member_id=MemberId("g1"), kind=MemberKind.GATEWAY)


def book(*members: Member) -> VersionBook:
    return VersionBook(lambda kind: [member for member in members if member.kind is kind])


def shard_report(memory_pool: str, num_free_bytes: int) -> ShardReport:
    work = ShardWork(by_slot={}, busy_s=0.0, speed=None)
    return ShardReport(
        pid=1, node_id="n1", load=(), epochs={}, memory_pool=memory_pool, num_free_slots=0, num_loaded=0, work=work,
        num_free_bytes=num_free_bytes,
    )  # fmt: skip


def test_a_gateway_is_behind_until_it_tells_that_it_has_nothing_of_the_version() -> None:
    silent, dead = replace(GATEWAY, member_id=MemberId("g2")), replace(GATEWAY, state=MemberState.DEAD)
    made = book(GATEWAY, silent)
    assert made.gateways_behind(1) == ("g1", "g2"), "who has told nothing may have requests of it"
    made.note(GATEWAY.member_id, MemberReport(weights_versions=frozenset({1, 2})))
    made.note(silent.member_id, MemberReport(weights_versions=frozenset({2})))
    assert made.gateways_behind(1) == ("g1",)
    assert book(dead).gateways_behind(1) == ()
    suspect = book(replace(GATEWAY, state=MemberState.SUSPECT))
    assert suspect.gateways_behind(1) == ("g1",), "it may wake and submit again"


def test_only_ready_routers_count_and_each_tells_what_its_replica_failed_at() -> None:
    suspect = replace(ROUTER, member_id=MemberId("r2"), state=MemberState.SUSPECT)
    made = book(ROUTER, suspect)
    for member in (ROUTER, suspect):
        made.note(member.member_id, MemberReport(weights_version=1, replica="a", failed_versions={2: "no memory"}))
    assert made.routers(1) == {"r1": "a"}
    assert made.routers(2) == {}
    assert made.failure(2) == "the replica of r1: no memory"
    assert made.failure(3) is None
    made.forget(ROUTER.member_id)
    assert (made.routers(1), made.failure(2)) == ({}, None)


def test_shards_need_their_slots_again_and_routers_what_they_have_and_the_least_free_counts() -> None:
    made = book(ROUTER)
    slots = {ShardId("s1"): (1, 2, 3), ShardId("s2"): (4,)}
    with pytest.raises(ValueError, match="nothing is known of s1 yet"):
        made.rooms(slots, 10)
    made.note_shard(ShardId("s1"), shard_report("n1", 500))
    made.note_shard(ShardId("s2"), shard_report("n1/gpu-0", 30))
    made.note(ROUTER.member_id, MemberReport(weights_version=1))
    with pytest.raises(ValueError, match="nothing is known of r1 yet"):
        made.rooms(slots, 10)
    made.note(ROUTER.member_id, MemberReport(weights_version=1, resident_bytes=70, num_free_bytes=400))
    host, gpu = made.rooms(slots, 10)
    assert (host.members, host.needed_bytes, host.free_bytes) == (("s1", "r1"), 30 + 70, 400)
    assert (gpu.memory, gpu.members, gpu.needed_bytes, gpu.free_bytes) == ("n1/gpu-0", ("s2",), 10, 30)
