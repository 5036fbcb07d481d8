"""Whether epochs are at rest, so that a change that could wait may begin. Pure."""

from __future__ import annotations

from cluster.control.epoch_view import EpochView
from cluster.control.membership import MemberState
from experts.placement import ExpertPlacement, ShardId


def unrest(view: EpochView) -> str | None:
    """Why a change that could wait must wait. None when all is well: every shard serves the epoch in force and no
    other, that is as it should be, and routers use it and all of its shards."""
    if view.preparing is not None:
        return "the next epoch is being prepared"
    wanted = dict.fromkeys([*view.target.slots_by_shard, *view.placement.slots_by_shard])
    unwell = [shard for shard in wanted if not view.is_ready(shard) or shard in view.masked]
    if unwell:
        return f"not ready: {', '.join(unwell)}"
    if not is_same(view.target, view.placement):
        return "the shards do not hold yet what they should"
    if last_change_goes_on(view):
        return f"epoch {view.number} has not been taken up by all shards and routers yet"
    return None


def is_same(one: ExpertPlacement, other: ExpertPlacement) -> bool:
    """Whether the same shards hold the same slots, in any order."""

    def contents(placement: ExpertPlacement) -> dict[ShardId, frozenset[object]]:
        return {shard: frozenset(slots) for shard, slots in placement.slots_by_shard.items()}

    return contents(one) == contents(other)


def last_change_goes_on(view: EpochView) -> bool:
    """A shard serves another epoch than the one in force, or a router has not come over to it."""
    served = (shard.epochs for shard in view.shards.values() if shard.state is MemberState.READY)
    return any(epochs - {view.number} for epochs in served) or bool(view.epochs_in_use - {view.number})
