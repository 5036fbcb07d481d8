"""What to do next about epochs, decided from what is known. Pure; the keeper acts and asks again.

    in force N --prepare--> N and N+1 served --commit--> routers move to N+1 --retire--> in force N+1
                                  |
                                abort: the number is spent, N stays in force

At most two epochs live at a time, so one change waits for the end of the one before it. Numbers only grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.control.epoch_rest import is_same, last_change_goes_on
from cluster.control.epoch_view import EpochView, Preparation
from cluster.control.membership import MemberState
from cluster.control.movement_plan import has_come_about, next_stage, reason_to_give_up
from cluster.control.next_placement import next_placement
from experts.placement import ExpertPlacement, ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """The shard is dead or must leave: another process, under another name, is to hold what it should hold."""

    shard_id: ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Have the shards of this placement load what they lack and serve it under a new number. is_move: a stage of the
    movement, which becomes the target when it comes into force."""

    placement: ExpertPlacement
    is_repair: bool
    is_move: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """From now on routers adopt the epoch."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """try_again_now: what went wrong was a loss that the next plan knows of; else it would only fail again."""

    number: int
    reason: str
    try_again_now: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Nobody uses this epoch any more: the shard refuses it and frees what only it needed."""

    shard_id: ShardId
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """No epoch needs the shard."""

    shard_id: ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class EndMovement:
    """The movement has come about, or does not go on for this reason."""

    failure: str | None


Action = Replace | Prepare | Commit | Abort | Retire | Remove | EndMovement


def decide(view: EpochView) -> tuple[Action, ...]:
    """Everything that can be done now; the same view gives the same answer. Repeating an action does no harm."""
    return (
        *_replacements(view),
        *_of_preparation(view),
        *_end_of_movement(view),
        *_retirements(view),
        *_removals(view),
    )


def _replacements(view: EpochView) -> Iterator[Action]:
    if not view.leads:
        return
    for shard_id in view.target.slots_by_shard:
        known = view.shards.get(shard_id)
        if known is None or (known.state is MemberState.DEAD and not known.rests):
            yield Replace(shard_id=shard_id)
        elif known.state is MemberState.READY and known.must_leave:
            # It serves until the other one does.
            yield Replace(shard_id=shard_id)


def _of_preparation(view: EpochView) -> Iterator[Action]:
    preparing = view.preparing
    if preparing is None:
        yield from _next_epoch(view)
    elif (abort := _abort(view, preparing)) is not None:
        yield abort
    elif _is_prepared(view, preparing):
        yield Commit(number=preparing.number)


def _next_epoch(view: EpochView) -> Iterator[Action]:
    if not view.may_prepare or last_change_goes_on(view):
        return
    placement = next_placement(view)
    if placement is None:
        return
    if not is_same(placement, view.placement):
        yield Prepare(placement=placement, is_repair=_has_lost(view))
    elif view.may_rejoin and _wants_to_rejoin(view):
        yield Prepare(placement=placement, is_repair=True)
    elif (stage := next_stage(view)) is not None:
        yield Prepare(placement=stage, is_repair=False, is_move=True)


def _end_of_movement(view: EpochView) -> Iterator[Action]:
    """With a stage in preparation its abort is the end."""
    if view.preparing is not None and view.preparing.is_move:
        return
    failure = reason_to_give_up(view)
    if failure is not None or has_come_about(view):
        yield EndMovement(failure=failure)


def _has_lost(view: EpochView) -> bool:
    """The epoch in force has a shard that routers cannot use."""
    members = view.placement.slots_by_shard
    return any(not view.is_ready(shard) or shard in view.masked for shard in members)


def _wants_to_rejoin(view: EpochView) -> bool:
    """A shard answers that a router does without, or that has missed the epoch: a new epoch gives it new links."""
    return any(_is_back(view, shard_id) for shard_id in view.placement.slots_by_shard)


def _is_back(view: EpochView, shard_id: ShardId) -> bool:
    """It must have answered since the router gave it up: a shard that has just died still looks ready."""
    if not view.is_ready(shard_id):
        return False
    shard = view.shards[shard_id]
    using = (router for router in view.leased if router.epoch == view.number)
    given_up = any(shard_id in router.masked and shard.seen_s > router.masked_s for router in using)
    return given_up or view.number not in shard.epochs


def _abort(view: EpochView, preparing: Preparation) -> Abort | None:
    number = preparing.number
    if preparing.failure is not None:
        return Abort(number=number, reason=preparing.failure, try_again_now=False)
    if preparing.is_move and (reason := reason_to_give_up(view)) is not None:
        return Abort(number=number, reason=reason, try_again_now=True)
    for shard_id in _needed(view, preparing):
        if view.state(shard_id) is MemberState.DEAD:
            return Abort(number=number, reason=f"{shard_id} died", try_again_now=True)
        if view.state(shard_id) is MemberState.SUSPECT and _must_load(view, preparing, shard_id):
            return Abort(number=number, reason=f"{shard_id} does not answer", try_again_now=True)
    if not preparing.is_repair:
        unreachable = {shard for router in view.leased if router.prepared == number for shard in router.unreachable}
        if unreachable:
            return Abort(number=number, reason=f"a router cannot reach {min(unreachable)}", try_again_now=False)
    return None


def _needed(view: EpochView, preparing: Preparation) -> Iterator[ShardId]:
    """A planned change also gives way when the epoch in force loses a shard: the repair comes first."""
    yield from preparing.placement.slots_by_shard
    if not preparing.is_repair:
        yield from view.placement.slots_by_shard


def _must_load(view: EpochView, preparing: Preparation, shard_id: ShardId) -> bool:
    new = preparing.placement.slots_by_shard.get(shard_id, ())
    return shard_id not in preparing.ready and not set(new) <= set(view.placement.slots_by_shard.get(shard_id, ()))


def _is_prepared(view: EpochView, preparing: Preparation) -> bool:
    """All ready shards serve it and all routers with a lease have their links. A suspect is not waited for."""
    members = preparing.placement.slots_by_shard
    if any(view.is_ready(shard) and shard not in preparing.ready for shard in members):
        return False
    return all(preparing.number in (router.prepared, router.epoch) for router in view.leased)


def _retirements(view: EpochView) -> Iterator[Action]:
    preparing = set() if view.preparing is None else {view.preparing.number}
    # A router may have come further than its last report tells, to any epoch that was in force since.
    oldest_in_use = min(view.epochs_in_use, default=view.number)
    for shard_id, shard in view.shards.items():
        if shard.state is MemberState.READY:
            for number in sorted(shard.epochs - {view.number} - preparing):
                if oldest_in_use <= number < view.number:
                    continue
                # A number above the one in force was never committed, whoever has not reported yet.
                if view.settled or number > view.number:
                    yield Retire(shard_id=shard_id, number=number)


def _removals(view: EpochView) -> Iterator[Action]:
    if not view.leads:
        return
    preparing = () if view.preparing is None else view.preparing.placement.slots_by_shard
    for shard_id, shard in view.shards.items():
        if shard_id in view.target.slots_by_shard:
            continue
        is_member = (
            shard_id in view.placement.slots_by_shard or shard_id in preparing or shard_id in view.used_elsewhere
        )
        is_used = is_member or not view.settled or bool(shard.epochs & view.epochs_in_use)
        if shard.state is MemberState.DEAD or not is_used:
            yield Remove(shard_id=shard_id)
