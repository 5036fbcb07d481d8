from dataclasses import replace

from cluster.control.load_ledger import LoadLedger
from cluster.control.membership import Member, MemberId, MemberKind, Membership, MemberState

ROUTER = Member(member_id=MemberId("router-1"), kind=MemberKind.ROUTER, pid=7, node_id="n", state=MemberState.READY)


def membership() -> Membership:
    return Membership(suspect_after_s=2.0, forget_dead_after_s=60.0)


def states(members: Membership, now_s: float) -> list[MemberState]:
    return [member.state for member in members.of_kind(MemberKind.ROUTER, now_s)]


def test_a_silent_member_is_suspect_until_it_speaks_again() -> None:
    members = membership()
    members.report(ROUTER, 0.0)
    assert states(members, 2.0) == [MemberState.READY]
    assert states(members, 2.1) == [MemberState.SUSPECT]
    assert members.num_ready(MemberKind.ROUTER, 2.1) == 0
    members.report(ROUTER, 3.0)
    assert states(members, 3.5) == [MemberState.READY]


def test_a_member_that_starts_is_never_suspect() -> None:
    members = membership()
    members.report(replace(ROUTER, state=MemberState.STARTING), 0.0)
    assert states(members, 1000.0) == [MemberState.STARTING]


def test_the_dead_do_not_come_back() -> None:
    members = membership()
    members.report(ROUTER, 0.0)
    members.mark_dead(ROUTER.member_id, 1.0)
    assert members.report(ROUTER, 1.5) is False
    assert states(members, 1.5) == [MemberState.DEAD]


def test_the_dead_are_shown_for_a_while_from_their_death_on() -> None:
    members = membership()
    members.report(ROUTER, 0.0)
    members.mark_dead(ROUTER.member_id, 10.0)
    members.mark_dead(ROUTER.member_id, 50.0)
    assert members.forget_old_dead(69.0) == ()
    assert members.forget_old_dead(71.0) == (ROUTER.member_id,)
    assert ROUTER.member_id not in members


def test_a_member_that_leaves_is_gone_at_once() -> None:
    members = membership()
    members.report(ROUTER, 0.0)
    members.leave(ROUTER.member_id)
    members.leave(ROUTER.member_id)
    assert states(members, 0.0) == []


def test_an_unknown_member_cannot_die() -> None:
    members = membership()
    members.mark_dead(ROUTER.member_id, 0.0)
    assert ROUTER.member_id not in members


def test_load_is_summed_over_the_living_and_the_departed() -> None:
    ledger = LoadLedger()
    ledger.report(MemberId("a"), [(1, 0, 5), (3, 2, 1)])
    ledger.report(MemberId("b"), [(1, 0, 2)])
    ledger.report(MemberId("a"), [(1, 0, 6), (3, 2, 1), (5, 1, 0)])
    assert ledger.totals() == [(1, 0, 8), (3, 2, 1)]
    ledger.close(MemberId("a"))
    ledger.close(MemberId("a"))
    assert ledger.totals() == [(1, 0, 8), (3, 2, 1)]
    ledger.report(MemberId("c"), [(1, 0, 1)])
    assert ledger.totals() == [(1, 0, 9), (3, 2, 1)]
