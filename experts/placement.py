"""Which shard holds which expert: slots, placements and the first placement of an epoch. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple, NewType

ShardId = NewType("ShardId", str)


class Slot(NamedTuple):
    """One expert's weights in one MoE layer: decoder-layer number and logical expert number, both from 0."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlacement:
    """The slots of every shard. A slot may live on several shards (copies), at most once on each.

    A shard without slots is allowed: it is a member that has nothing to serve yet.
    Raises ValueError if a shard lists a slot twice.
    """

    slots_by_shard: Mapping[ShardId, tuple[Slot, ...]]
    # The inverse of slots_by_shard, filled by __post_init__ because every dispatch asks it.
    _shards_by_slot: Mapping[Slot, tuple[ShardId, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shards_by_slot: dict[Slot, tuple[ShardId, ...]] = {}
        for shard_id, slots in self.slots_by_shard.items():
            if len(set(slots)) != len(slots):
                raise ValueError(f"slots_by_shard[{shard_id!r}] names a slot twice: {slots}")
            for slot in slots:
                shards_by_slot[slot] = (*shards_by_slot.get(slot, ()), shard_id)
        object.__setattr__(self, "_shards_by_slot", shards_by_slot)

    def shards_of(self, slot: Slot) -> tuple[ShardId, ...]:
        """The shards that hold a copy, in the order of slots_by_shard; empty when there is none."""
        return self._shards_by_slot.get(slot, ())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot that has at least one copy, sorted."""
        return tuple(sorted(self._shards_by_slot))


def place(
    *, moe_layers: Sequence[int], num_experts: int, shard_ids: Sequence[ShardId], copies: int = 1
) -> ExpertPlacement:
    """Deals the slots of all layers, copy by copy, to the shards in turn.

    Any run of consecutive deals is spread evenly, so counts differ by at most one per layer and in total, for
    any number of shards; and because the copies of a slot are dealt one after the other they lie on different
    shards as long as there are that many.

    Raises ValueError for no shards, doubled ids or layers, no experts, or copies outside 1..number of shards.
    """
    _check(moe_layers, num_experts, shard_ids, copies)
    slots_by_shard: dict[ShardId, list[Slot]] = {shard_id: [] for shard_id in shard_ids}
    deals = product(moe_layers, range(num_experts), range(copies))
    for turn, (layer, expert, _copy) in enumerate(deals):
        slots_by_shard[shard_ids[turn % len(shard_ids)]].append(Slot(layer, expert))
    return ExpertPlacement(slots_by_shard={shard: tuple(slots) for shard, slots in slots_by_shard.items()})


def _check(moe_layers: Sequence[int], num_experts: int, shard_ids: Sequence[ShardId], copies: int) -> None:
    if not shard_ids:
        raise ValueError("shard_ids is empty: a placement needs at least one shard")
    if len(set(shard_ids)) != len(shard_ids):
        raise ValueError(f"shard_ids must be distinct, got {list(shard_ids)}")
    if len(set(moe_layers)) != len(moe_layers):
        raise ValueError(f"moe_layers must be distinct, got {list(moe_layers)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 1 <= copies <= len(shard_ids):
        raise ValueError(f"copies must be between 1 and the number of shards ({len(shard_ids)}), got {copies}")
