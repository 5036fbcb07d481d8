"""Where slots live in the next epoch: as in the target where its shards are ready, else wherever a copy is, else on
survivors with room. Pure.

    target    a: 1 2   b: 3 4   c: 5 6
    in force  a: 1 2   b: 3 4   x: 5 6       x died, c is to take its place and still loads
    next      a: 1 2 5   b: 3 4 6            c is not ready: its slots go where there is room
    then      a: 1 2   b: 3 4   c: 5 6       c is ready
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.control.epoch_view import EpochView
from cluster.control.membership import MemberState
from experts.placement import ExpertPlacement, ShardId, Slot


def next_placement(view: EpochView) -> ExpertPlacement | None:
    """The best placement that ready shards can serve now, every slot placed; None when a slot has no home yet.

    What is well placed stays: a copy moves only when its shard leaves or its target is ready. A slot that still has
    a living copy gets no emergency copy. A shard that must leave keeps its slots until the one in its place is ready,
    or, where that takes long, until others that have room hold them. A suspect keeps its slots, and others take them
    over only when routers do without it: it may just be slow to tell.
    """
    draft = _Draft(view)
    draft.take_target()
    draft.keep_copies()
    for slot in draft.orphans():
        if not draft.find_home(slot) and not draft.keep_pressed(slot) and not draft.has_suspect(slot):
            return None
    return draft.placement()


class _Draft:
    def __init__(self, view: EpochView) -> None:
        self._view = view
        self._slots: dict[ShardId, list[Slot]] = {}
        self._room = _room_by_pool(view)

    def take_target(self) -> None:
        """Ready shards get what they should have; suspects keep what they serve."""
        in_force = self._view.placement.slots_by_shard
        for shard_id, slots in self._view.target.slots_by_shard.items():
            state = self._view.state(shard_id)
            if state is MemberState.READY:
                self._slots[shard_id] = list(slots)
            elif state is MemberState.SUSPECT and shard_id in in_force:
                self._slots[shard_id] = list(in_force[shard_id])

    def keep_copies(self) -> None:
        """Copies of the epoch in force stand in for those of target shards that are not ready."""
        for slot in self._view.target.slots:
            num_wanted = len(self._view.target.shards_of(slot))
            spare = [shard for shard in self._view.placement.shards_of(slot) if self._can_keep(shard, slot)]
            for shard_id in spare[: max(0, num_wanted - self._num_living(slot))]:
                self._slots.setdefault(shard_id, []).append(slot)

    def orphans(self) -> list[Slot]:
        """Slots without a copy that routers can reach."""
        return [slot for slot in self._view.target.slots if self._num_living(slot) == 0]

    def find_home(self, slot: Slot) -> bool:
        """Gives the slot to the ready shard with the fewest slots that has room."""
        ready = [shard for shard in self._members() if self._view.is_ready(shard)]
        roomy = [shard for shard in ready if self._room.get(self._pool(shard), 0) > 0]
        roomy = [shard for shard in roomy if not self._view.shards[shard].must_leave] or self._last_resort(slot, roomy)
        if not roomy:
            return False
        home = min(roomy, key=lambda shard: len(self._slots.get(shard, ())))
        self._slots.setdefault(home, []).append(slot)
        self._room[self._pool(home)] -= 1
        return True

    def keep_pressed(self, slot: Slot) -> bool:
        """Leaves the slot where it is, on a shard that should go."""
        holders = [shard for shard in self._view.placement.shards_of(slot) if self._view.is_ready(shard)]
        for shard_id in holders[:1]:
            self._slots.setdefault(shard_id, []).append(slot)
        return bool(holders)

    def has_suspect(self, slot: Slot) -> bool:
        return any(slot in self._slots[shard_id] for shard_id in self._slots)

    def _last_resort(self, slot: Slot, leaving: list[ShardId]) -> list[ShardId]:
        """Shards that must leave take over only what would else be lost."""
        is_held = any(self._view.is_ready(shard) for shard in self._view.placement.shards_of(slot))
        return [] if is_held else leaving

    def placement(self) -> ExpertPlacement:
        return ExpertPlacement(slots_by_shard={shard: tuple(sorted(slots)) for shard, slots in self._slots.items()})

    def _members(self) -> Iterable[ShardId]:
        """Those of the next epoch first, then those that only the present one has."""
        return dict.fromkeys([*self._slots, *self._view.placement.slots_by_shard])

    def _can_keep(self, shard_id: ShardId, slot: Slot) -> bool:
        if not self._view.is_ready(shard_id) or self._view.shards[shard_id].is_pressed:
            return False
        return slot not in self._slots.get(shard_id, ())

    def _num_living(self, slot: Slot) -> int:
        holders = [shard for shard, slots in self._slots.items() if slot in slots]
        return sum(self._is_living(shard) for shard in holders)

    def _is_living(self, shard_id: ShardId) -> bool:
        return self._view.is_ready(shard_id) or shard_id not in self._view.masked

    def _pool(self, shard_id: ShardId) -> str:
        return self._view.shards[shard_id].memory_pool


def _room_by_pool(view: EpochView) -> dict[str, int]:
    """Shards that share a memory each report what is free of all of it."""
    room: dict[str, int] = {}
    for shard in view.shards.values():
        if shard.state is MemberState.READY:
            known = room.get(shard.memory_pool, shard.num_free_slots)
            room[shard.memory_pool] = min(known, shard.num_free_slots)
    return room
