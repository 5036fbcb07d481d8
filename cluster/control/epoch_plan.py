"""What to do next about epochs, decided from what is known. Pure; the keeper acts and asks again.

    in force N --prepare--> N and N+1 served --commit--> routers move to N+1 --retire--> in force N+1
                                  |
                                abort: the number is spent, N stays in force

At most two epochs live at a time, so one change waits for the end of the one before it. Numbers only grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.control.epoch_view import EpochView, Preparation
from cluster.control.membership import MemberState
from cluster.control.next_placement import next_placement
from experts.placement import ExpertPlacement, ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """The shard is dead: another process, under another name, is to hold what it should hold."""

    shard_id: ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Have the shards of this placement load what they lack and serve it under a new number."""

    placement: ExpertPlacement
    is_repair: bool


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


Action = Replace | Prepare | Commit | Abort | Retire | Remove


def decide(view: EpochView) -> tuple[Action, ...]:
    """Everything that can be done now; the same view gives the same answer. Repeating an action does no harm."""
    return (*_replacements(view), *_of_preparation(view), *_retirements(view), *_removals(view))


def unrest(view: EpochView) -> str | None:
    """Why a change that could wait must wait. None when all is well: every shard serves the epoch in force and no
    other, that is as it should be, and routers use it and all of its shards."""
    if view.preparing is not None:
        return "the next epoch is being prepared"
    wanted = dict.fromkeys([*view.target.slots_by_shard, *view.placement.slots_by_shard])
    unwell = [shard for shard in wanted if not view.is_ready(shard) or shard in view.masked]
    if unwell:
        return f"not ready: {', '.join(unwell)}"
    if not _is_same(view.target, view.placement):
        return "the shards do not hold yet what they should"
    if _last_change_goes_on(view):
        return f"epoch {view.number} has not been taken up by all shards and routers yet"
    return None


def _replacements(view: EpochView) -> Iterator[Action]:
    for shard_id in view.target.slots_by_shard:
        known = view.shards.get(shard_id)
        if known is None or (known.state is MemberState.DEAD and not known.rests):
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
    if not view.may_prepare or _last_change_goes_on(view):
        return
    placement = next_placement(view)
    if placement is None:
        return
    if not _is_same(placement, view.placement):
        yield Prepare(placement=placement, is_repair=_has_lost(view))
    elif view.may_rejoin and _wants_to_rejoin(view):
        yield Prepare(placement=placement, is_repair=True)


def _is_same(one: ExpertPlacement, other: ExpertPlacement) -> bool:
    def contents(placement: ExpertPlacement) -> dict[ShardId, frozenset[object]]:
        return {shard: frozenset(slots) for shard, slots in placement.slots_by_shard.items()}

    return contents(one) == contents(other)


def _last_change_goes_on(view: EpochView) -> bool:
    """A shard serves another epoch than the one in force, or a router has not come over to it."""
    served = (shard.epochs for shard in view.shards.values() if shard.state is MemberState.READY)
    return any(epochs - {view.number} for epochs in served) or bool(view.epochs_in_use - {view.number})


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
    preparing = () if view.preparing is None else view.preparing.placement.slots_by_shard
    for shard_id, shard in view.shards.items():
        if shard_id in view.target.slots_by_shard:
            continue
        is_member = shard_id in view.placement.slots_by_shard or shard_id in preparing
        is_used = is_member or not view.settled or bool(shard.epochs & view.epochs_in_use)
        if shard.state is MemberState.DEAD or not is_used:
            yield Remove(shard_id=shard_id)
