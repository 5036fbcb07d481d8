"""What each shard holds when there are more or fewer of them: even counts, as few moves as that takes. Pure.

a: 1 2 3   b: 4 5 6   + c      ->  a: 1 2   b: 4 5   c: 3 6
a: 1 2   b: 3 4   c: 5 6   - c  ->  a: 1 2 5   b: 3 4 6
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experts.placement import ExpertPlacement, ShardId, Slot


def check_count(current: ExpertPlacement, num_shards: int) -> None:
    """Raises ValueError for fewer shards than every slot has copies, or more than there are slots to hold."""
    num_copies = [len(current.shards_of(slot)) for slot in current.slots]
    least, most = min(num_copies, default=1), sum(num_copies)
    if not least <= num_shards <= most:
        raise ValueError(
            f"shards must be between {least}, the copies of an expert, and {most}, the slots there are to hold, "
            f"not {num_shards}"
        )


def resize(current: ExpertPlacement, shard_ids: Sequence[ShardId]) -> ExpertPlacement:
    """As many copies of each slot as now, on these shards and no others. Copies lie on different shards, so of slots
    that a rebalance has given more copies than there will be shards, the rest goes.

    Raises ValueError as check_count does.
    """
    check_count(current, len(shard_ids))
    slots = [slot for slot in current.slots for _ in current.shards_of(slot)[: len(shard_ids)]]
    held = {shard_id: set(current.slots_by_shard.get(shard_id, ())) for shard_id in shard_ids}
    homeless = Counter(slots) - Counter(slot for kept in held.values() for slot in kept)
    for slot in sorted(homeless.elements()):
        held[_emptiest(held, slot)].add(slot)
    _level(held)
    return ExpertPlacement(slots_by_shard={shard: tuple(sorted(kept)) for shard, kept in held.items()})


def _emptiest(held: dict[ShardId, set[Slot]], slot: Slot) -> ShardId:
    """The shard without the slot that has the fewest of its layer, then in all."""
    able = [shard for shard, kept in held.items() if slot not in kept]
    return min(able, key=lambda shard: (_num_of_layer(held[shard], slot.layer), len(held[shard])))


def _level(held: dict[ShardId, set[Slot]]) -> None:
    """Moves slots from the fullest shard to the emptiest until counts differ by one at most."""
    while True:
        fullest = max(held, key=lambda shard: len(held[shard]))
        emptiest = min(held, key=lambda shard: len(held[shard]))
        if len(held[fullest]) - len(held[emptiest]) <= 1:
            return
        movable = sorted(held[fullest] - held[emptiest])
        surplus = Counter(slot.layer for slot in held[fullest])
        surplus.subtract(slot.layer for slot in held[emptiest])
        moved = max(movable, key=lambda slot: surplus[slot.layer])
        held[fullest].remove(moved)
        held[emptiest].add(moved)


def _num_of_layer(slots: set[Slot], layer: int) -> int:
    return sum(slot.layer == layer for slot in slots)
