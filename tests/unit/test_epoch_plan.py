"""What is decided about epochs, as tables: what is known on the left, what is done about it on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.control.epoch_plan import Abort, Action, Commit, Prepare, Remove, Replace, Retire, decide
from cluster.control.epoch_view import EpochView, Preparation, RouterView, ShardView
from cluster.control.membership import MemberId, MemberState
from cluster.control.next_placement import next_placement
from experts.placement import ExpertPlacement, ShardId, Slot

A, B, C, X = (ShardId(name) for name in "abcx")
READY, STARTING, SUSPECT, DEAD = MemberState.READY, MemberState.STARTING, MemberState.SUSPECT, MemberState.DEAD
NOW_S = 100.0
ONE, TWO, THREE, FOUR = (Slot(1, expert) for expert in range(4))


def placed(**slots: Sequence[Slot]) -> ExpertPlacement:
    return ExpertPlacement(slots_by_shard={ShardId(name): tuple(held) for name, held in slots.items()})


def shard(state: MemberState = READY, *epochs: int, room: int = 0, pool: str = "host", **fields: Any) -> ShardView:
    return ShardView(
        state=state, epochs=frozenset(epochs), memory_pool=pool, num_free_slots=room, seen_s=NOW_S, **fields
    )


def router(epoch: int, *, lease_s: float = 3.0, **fields: Any) -> RouterView:
    return RouterView(epoch=epoch, lease_until_s=NOW_S + lease_s, **fields)


def view(shards: Mapping[ShardId, ShardView], *routers: RouterView, **fields: Any) -> EpochView:
    """Epoch 5 places two slots on each of a and b."""
    known: dict[str, Any] = {
        "now_s": NOW_S,
        "number": 5,
        "placement": placed(a=[ONE, TWO], b=[THREE, FOUR]),
        "target": placed(a=[ONE, TWO], b=[THREE, FOUR]),
        "shards": shards,
        "routers": {MemberId(f"router-{index}"): each for index, each in enumerate(routers)},
    }
    return EpochView(**known | fields)


WELL = {A: shard(READY, 5), B: shard(READY, 5)}
SIX = Preparation(number=6, placement=placed(a=[ONE, TWO], b=[THREE, FOUR]), is_repair=False, ready=frozenset({A, B}))
BOTH = {A: shard(READY, 5, 6), B: shard(READY, 5, 6)}
GROWN = placed(a=[ONE, TWO], c=[THREE, FOUR])


def test_where_all_is_well_nothing_is_done() -> None:
    assert decide(view(WELL, router(5))) == ()


@pytest.mark.parametrize(
    ("known", "actions"),
    [
        ({A: shard(READY, 5), B: shard(DEAD)}, (Replace(shard_id=B),)),
        ({A: shard(READY, 5)}, (Replace(shard_id=B),)),
        ({A: shard(READY, 5), B: shard(SUSPECT, 5)}, ()),
        ({A: shard(READY, 5), B: shard(DEAD, rests=True)}, ()),
        ({}, (Replace(shard_id=A), Replace(shard_id=B))),
        ({A: shard(READY, 5), B: shard(READY, 5, must_leave=True)}, (Replace(shard_id=B),)),
        ({A: shard(READY, 5), B: shard(SUSPECT, 5, must_leave=True)}, ()),
    ],
    ids=["dead", "never made", "suspect", "died before it served", "all", "must leave", "may have left already"],
)
def test_who_is_dead_is_replaced_and_who_is_silent_is_not(
    known: Mapping[ShardId, ShardView], actions: tuple[Action, ...]
) -> None:
    assert decide(view(known, router(5))) == actions


def test_until_the_replacement_is_ready_survivors_with_room_take_over() -> None:
    target = placed(a=[ONE, TWO], c=[THREE, FOUR])
    lost = view({A: shard(READY, 5, room=2), C: shard(STARTING)}, router(5), target=target)
    assert decide(lost) == (Prepare(placement=placed(a=[ONE, TWO, THREE, FOUR]), is_repair=True),)
    cramped = replace(lost, shards={A: shard(READY, 5, room=1), C: shard(STARTING)})
    assert decide(cramped) == ()
    come = replace(lost, shards={A: shard(READY, 5, room=1), C: shard(READY)})
    assert decide(come) == (Prepare(placement=target, is_repair=True),)


def test_what_a_survivor_has_taken_over_goes_back_when_the_replacement_is_ready() -> None:
    target = placed(a=[ONE, TWO], c=[THREE, FOUR])
    patched = placed(a=[ONE, TWO, THREE, FOUR])
    loading = {A: shard(READY, 5), C: shard(STARTING)}
    assert decide(view(loading, router(5), placement=patched, target=target)) == ()
    ready = {A: shard(READY, 5), C: shard(READY)}
    planned = decide(view(ready, router(5), placement=patched, target=target))
    assert planned == (Prepare(placement=target, is_repair=False),)


def test_a_shard_that_must_leave_serves_until_the_one_in_its_place_is_ready_and_is_removed_after_it() -> None:
    target = placed(a=[ONE, TWO], c=[THREE, FOUR])
    leaving = {A: shard(READY, 5, room=9), B: shard(READY, 5, must_leave=True), C: shard(STARTING)}
    assert decide(view(leaving, router(5), target=target)) == ()
    come = view(leaving | {C: shard(READY)}, router(5), target=target)
    assert decide(come) == (Prepare(placement=target, is_repair=False),)
    gone_over = {A: shard(READY, 6), B: shard(READY, must_leave=True), C: shard(READY, 6)}
    assert decide(view(gone_over, router(6), number=6, placement=target, target=target)) == (Remove(shard_id=B),)


def test_where_the_one_in_its_place_takes_long_others_with_room_take_over_what_a_leaving_shard_holds() -> None:
    target = placed(a=[ONE, TWO], c=[THREE, FOUR])
    pressed = shard(READY, 5, room=9, pool="old", must_leave=True, is_pressed=True)
    shards = {A: shard(READY, 5, room=2), B: pressed, C: shard(STARTING)}
    taken = placed(a=[ONE, TWO, THREE, FOUR])
    assert decide(view(shards, router(5), target=target)) == (Prepare(placement=taken, is_repair=False),)
    cramped = view(shards | {A: shard(READY, 5, room=1)}, router(5), target=target)
    found = next_placement(cramped)
    assert found == placed(a=[ONE, TWO, THREE], b=[FOUR]), "as much as fits; the rest stays"
    full = view(shards | {A: shard(READY, 5)}, router(5), target=target)
    assert decide(full) == ()


def test_what_a_lost_shard_held_goes_to_one_that_must_leave_only_where_there_is_no_other() -> None:
    in_force, target = placed(a=[ONE], b=[TWO, THREE], x=[FOUR]), placed(a=[ONE], b=[TWO, THREE], c=[FOUR])
    leaving = shard(READY, 5, room=9, pool="old", must_leave=True)
    shards = {A: leaving, B: shard(READY, 5, room=1, pool="new"), C: shard(STARTING)}
    found = next_placement(view(shards, placement=in_force, target=target))
    assert found == placed(a=[ONE], b=[TWO, THREE, FOUR])
    shards[B] = shard(READY, 5, pool="new")
    assert next_placement(view(shards, placement=in_force, target=target)) == placed(a=[ONE, FOUR], b=[TWO, THREE])


def test_a_slot_with_a_living_copy_needs_no_home() -> None:
    copied = placed(a=[ONE, TWO], b=[ONE, TWO])
    target = placed(a=[ONE, TWO], c=[ONE, TWO])
    lost = view({A: shard(READY, 5, room=9), C: shard(STARTING)}, placement=copied, target=target)
    assert decide(lost) == (Prepare(placement=placed(a=[ONE, TWO]), is_repair=True),)


def test_shards_on_one_host_share_its_room_and_the_emptiest_is_taken_first() -> None:
    in_force = placed(a=[ONE], b=[], x=[TWO, THREE])
    target = placed(a=[ONE], b=[], c=[TWO, THREE])
    shards = {A: shard(READY, 5, room=2), B: shard(READY, 5, room=2), C: shard(STARTING)}
    found = next_placement(view(shards, placement=in_force, target=target))
    assert found is not None
    assert [len(slots) for slots in found.slots_by_shard.values()] == [2, 1]
    one_left = {A: shard(READY, 5, room=1), B: shard(READY, 5, room=2), C: shard(STARTING)}
    assert next_placement(view(one_left, placement=in_force, target=target)) is None
    apart = {**one_left, B: shard(READY, 5, room=2, pool="another host")}
    assert next_placement(view(apart, placement=in_force, target=target)) is not None


def test_what_a_suspect_holds_alone_is_taken_over_only_when_a_router_does_without_it() -> None:
    silent = {A: shard(READY, 5, room=9), B: shard(SUSPECT, 5)}
    assert decide(view(silent, router(5))) == ()
    taken = placed(a=[ONE, TWO, THREE, FOUR], b=[THREE, FOUR])
    assert decide(view(silent, router(5, masked=frozenset({B})))) == (Prepare(placement=taken, is_repair=True),)
    full = {A: shard(READY, 5), B: shard(SUSPECT, 5)}
    assert decide(view(full, router(5, masked=frozenset({B})))) == ()


@pytest.mark.parametrize(
    ("known", "may_rejoin", "rejoins"),
    [
        (router(5, masked=frozenset({B}), masked_s=NOW_S - 1), True, True),
        (router(5, masked=frozenset({B}), masked_s=NOW_S - 1), False, False),
        (router(5, masked=frozenset({B}), masked_s=NOW_S), True, False),
        (router(4, masked=frozenset({B}), masked_s=NOW_S - 1), True, False),
        (router(5, masked=frozenset({B}), masked_s=NOW_S - 1, lease_s=-1), True, False),
    ],
    ids=["answers again", "too soon", "has not answered since", "in an older epoch", "of a router without lease"],
)
def test_a_shard_that_answers_again_rejoins_by_a_new_epoch(known: RouterView, may_rejoin: bool, rejoins: bool) -> None:
    again = view(WELL, known, may_rejoin=may_rejoin)
    # The older epoch of another router is not this test's matter.
    prepares = [action for action in decide(again) if isinstance(action, Prepare)]
    assert prepares == ([Prepare(placement=again.placement, is_repair=True)] if rejoins else [])


def test_a_shard_that_slept_through_an_epoch_first_loses_the_old_one_and_then_rejoins() -> None:
    woken = {A: shard(READY, 5), B: shard(READY, 3)}
    assert decide(view(woken, router(5))) == (Retire(shard_id=B, number=3),)
    cleared = {A: shard(READY, 5), B: shard(READY)}
    assert decide(view(cleared, router(5))) == (Prepare(placement=view(WELL).placement, is_repair=True),)


@pytest.mark.parametrize(
    ("routers", "changed", "action"),
    [
        ([router(5, prepared=6)], {}, Commit(number=6)),
        ([router(5, prepared=6), router(6)], {}, Commit(number=6)),
        ([], {}, Commit(number=6)),
        ([router(5, prepared=6), router(5)], {}, None),
        ([router(5, prepared=6), router(5, lease_s=-1)], {}, Commit(number=6)),
        ([router(5, prepared=6)], {"ready": frozenset({A})}, None),
        ([router(5, prepared=6)], {"failure": "b: no memory"}, "b: no memory"),
        ([router(5, prepared=6, unreachable=frozenset({B}))], {}, "a router cannot reach b"),
        ([router(5, prepared=6, unreachable=frozenset({B}))], {"is_repair": True}, Commit(number=6)),
    ],
    ids=[
        "all prepared", "one has adopted it already", "no router", "a router still connects", "its lease is over",
        "a shard still loads", "a shard cannot load", "unreachable, planned", "unreachable, repair",
    ],
)  # fmt: skip
def test_an_epoch_is_committed_when_shards_and_routers_are_ready(
    routers: list[RouterView], changed: dict[str, Any], action: Commit | str | None
) -> None:
    actions = decide(view(BOTH, *routers, preparing=replace(SIX, **changed)))
    if isinstance(action, str):
        assert actions == (Abort(number=6, reason=action, try_again_now=False),)
    else:
        assert actions == (() if action is None else (action,))


@pytest.mark.parametrize(
    ("changed", "shards", "reason"),
    [
        ({}, {A: shard(READY, 5, 6), B: shard(DEAD)}, "b died"),
        ({"placement": GROWN}, {A: shard(READY, 5), B: shard(DEAD), C: shard(READY)}, "b died"),
        ({"placement": GROWN, "is_repair": True}, {A: shard(READY, 5), B: shard(DEAD), C: shard(READY)}, None),
        ({"placement": GROWN, "is_repair": True}, {A: shard(READY, 5), C: shard(SUSPECT)}, "c does not answer"),
        ({"is_repair": True}, {A: shard(READY, 5), B: shard(SUSPECT, 5)}, None),
    ],
    ids=["a member", "of the epoch in force", "whom it replaces", "a newcomer is silent", "a suspect stays as it is"],
)
def test_a_loss_aborts_an_epoch_in_preparation(
    changed: dict[str, Any], shards: Mapping[ShardId, ShardView], reason: str | None
) -> None:
    preparing = replace(SIX, ready=frozenset({A}), **changed)
    aborts = [action for action in decide(view(shards, preparing=preparing)) if isinstance(action, Abort)]
    assert aborts == ([] if reason is None else [Abort(number=6, reason=reason, try_again_now=True)])


@pytest.mark.parametrize(
    ("routers", "settled", "retired"),
    [
        ([router(6)], True, True),
        ([router(6), router(5)], True, False),
        ([router(6), router(4)], True, False),
        ([router(6), router(5, lease_s=-0.1)], True, True),
        ([], True, True),
        ([], False, False),
    ],
    ids=[
        "all have left",
        "one still uses it",
        "one may have come to it since",
        "its lease is over",
        "no router",
        "routers may not have reported yet",
    ],
)
def test_an_old_epoch_retires_when_nobody_uses_it(routers: list[RouterView], settled: bool, retired: bool) -> None:
    wanted = (Retire(shard_id=A, number=5), Retire(shard_id=B, number=5)) if retired else ()
    assert decide(view(BOTH, *routers, number=6, settled=settled)) == wanted


def test_a_number_that_was_never_committed_retires_even_before_all_have_reported() -> None:
    assert decide(view(BOTH, settled=False)) == (Retire(shard_id=A, number=6), Retire(shard_id=B, number=6))


def test_one_change_waits_for_the_end_of_the_one_before_it() -> None:
    target = placed(a=[ONE], b=[THREE, FOUR], c=[TWO])
    shards = {A: shard(READY, 4, 5), B: shard(READY, 4, 5), C: shard(READY)}
    assert decide(view(shards, router(4), target=target)) == ()
    retired = {A: shard(READY, 5), B: shard(READY, 5), C: shard(READY)}
    assert decide(view(retired, router(5), target=target)) == (Prepare(placement=target, is_repair=False),)
    assert decide(view(retired, router(5), target=target, may_prepare=False)) == ()
    assert decide(view(retired, router(5), router(4), target=target)) == (), "a router has not come over yet"
    assert decide(view(retired, router(5), router(4, lease_s=-1), target=target)) != ()


@pytest.mark.parametrize(
    ("third", "fields", "removed"),
    [
        (shard(READY), {}, True),
        (shard(READY, 4), {}, False),
        (shard(DEAD), {}, True),
        (shard(READY), {"settled": False}, False),
        (shard(READY), {"preparing": replace(SIX, placement=GROWN)}, False),
        (shard(READY), {"used_elsewhere": frozenset({C})}, False),
        (shard(DEAD), {"used_elsewhere": frozenset({C})}, True),
        (shard(DEAD), {"leads": False}, False),
    ],
    ids=[
        "no epoch needs it",
        "an epoch in use needs it",
        "dead",
        "routers may use it",
        "in preparation",
        "another version needs it",
        "another version cannot use it",
        "that is for the served version to say",
    ],
)
def test_a_shard_that_nobody_wants_is_removed_once_no_epoch_needs_it(
    third: ShardView, fields: dict[str, Any], removed: bool
) -> None:
    routers = [router(4)] if 4 in third.epochs else []
    removals = [action for action in decide(view({**WELL, C: third}, *routers, **fields)) if isinstance(action, Remove)]
    assert removals == ([Remove(shard_id=C)] if removed else [])


def test_the_epochs_of_a_version_that_is_not_served_replace_nobody() -> None:
    lost = {A: shard(READY, 5), B: shard(DEAD)}
    assert decide(view(lost, router(5), leads=False)) == ()
    assert decide(view(lost, router(5))) == (Replace(shard_id=B),)


def test_a_version_without_an_epoch_gets_its_first_on_the_target() -> None:
    fresh = {A: shard(READY), B: shard(READY)}
    nothing = {"number": 0, "placement": placed(), "leads": False}
    assert decide(view(fresh, **nothing)) == (
        Prepare(placement=placed(a=[ONE, TWO], b=[THREE, FOUR]), is_repair=False),
    )
    assert decide(view(fresh, **nothing, preparing=SIX)) == (Commit(number=6),), "no router needs to be connected"
