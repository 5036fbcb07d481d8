"""``restore``: where experts go whose shard is lost or leaves, and those that have too few copies. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cluster.balance.fleet import Fleet
from cluster.balance.plan import PlacedSlot, Refusal, RefusalReason, Stage
from experts.placement import ExpertPlacement, ShardId, Slot


def restore(current: ExpertPlacement, fleet: Fleet, *, min_copies: int) -> tuple[Stage, ...] | Refusal:
    """What gives every expert of current a copy in the fleet, and min_copies as far as there are shards and room.

    current: the placement in force, shards that are lost or leaving included; the fleet does without them. Nothing
    else moves. Copies lie on different nodes as far as there are nodes with room. No stage when nothing is to be
    done. Refuses (NO_ROOM) when an expert would be left without a copy.
    """
    leaving = [shard for shard in current.slots_by_shard if shard not in fleet.shard_ids]
    homes = _Homes(current, fleet)
    copies = {slot: [shard for shard in current.shards_of(slot) if shard not in leaving] for slot in current.slots}
    additions: list[PlacedSlot] = []
    num_homeless = 0
    for number in range(min(min_copies, len(fleet.shards))):
        for slot in (slot for slot, shards in copies.items() if len(shards) == number):
            home = homes.take(slot, copies[slot])
            if home is None:
                num_homeless += number == 0
                continue
            copies[slot].append(home)
            additions.append(PlacedSlot(home, slot))
    if num_homeless:
        return _no_room(num_homeless, len(current.slots), fleet)
    removals = [PlacedSlot(shard, slot) for shard in leaving for slot in current.slots_by_shard[shard]]
    if not additions and not removals:
        return ()
    return (Stage(additions=tuple(additions), removals=tuple(removals)),)


class _Homes:
    """The room of the fleet's shards, taken one slot at a time."""

    def __init__(self, current: ExpertPlacement, fleet: Fleet) -> None:
        slots_by_shard = {shard: current.slots_of(shard) for shard in fleet.shard_ids}
        self._nodes = fleet.nodes
        self._num_slots = {shard: len(slots) for shard, slots in slots_by_shard.items()}
        self._room = {shard: most - self._num_slots[shard] for shard, most in fleet.max_slots.items()}
        self._of_layer = {shard: Counter(slot.layer for slot in slots) for shard, slots in slots_by_shard.items()}

    def take(self, slot: Slot, holders: Iterable[ShardId]) -> ShardId | None:
        """Another home for the slot: on a node without one if possible, there on the shard with the fewest slots of
        the layer, then in all. None without room."""
        holders = set(holders)
        nodes = {self._nodes[shard] for shard in holders}
        able = [shard for shard, room in self._room.items() if room > 0 and shard not in holders]
        if not able:
            return None
        home = min(
            able,
            key=lambda shard: (self._nodes[shard] in nodes, self._of_layer[shard][slot.layer], self._num_slots[shard]),
        )
        self._room[home] -= 1
        self._num_slots[home] += 1
        self._of_layer[home][slot.layer] += 1
        return home


def _no_room(num_homeless: int, num_slots: int, fleet: Fleet) -> Refusal:
    missing_bytes = num_homeless * fleet.slot_bytes
    return Refusal(
        reason=RefusalReason.NO_ROOM,
        sentence=f"{num_homeless} of {num_slots} experts have no place on {len(fleet.shards)} shards: "
        f"{missing_bytes} bytes are missing",
        missing_bytes=missing_bytes,
    )
