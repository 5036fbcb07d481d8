"""Which shard holds which expert: slots, placements and the first placement of an epoch. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

ShardId = NewType("ShardId", str)


class Slot(NamedTuple):
    """One expert's weights in one MoE layer: decoder-layer number and logical expert number, both from 0."""

    layer: int
    expert: int


class WeightSlot(NamedTuple):
    """A slot as one version of the model fills it: what shards hold and compute with."""

    weights_version: int
    layer: int
    expert: int

    @property
    def slot(self) -> Slot:
        return Slot(self.layer, self.expert)


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

    def slots_of(self, shard_id: ShardId) -> tuple[Slot, ...]:
        """Empty for a shard that is not named."""
        return self.slots_by_shard.get(shard_id, ())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot that has at least one copy, sorted."""
        return tuple(sorted(self._shards_by_slot))


def place(
    *,
    moe_layers: Sequence[int],
    num_experts: int,
    shard_ids: Sequence[ShardId],
    copies: int = 1,
    max_slots: Mapping[ShardId, int] | None = None,
    nodes: Mapping[ShardId, str] | None = None,
) -> ExpertPlacement:
    """The first placement: every expert of every layer on ``copies`` shards, all shards as full as one another.

    max_slots: how many slots a shard has memory for; a shard that is not named has room for all. nodes: where the
    shards are; a shard that is not named is alone on its node. Copies of a slot lie on different nodes as far as
    there are nodes with room. Where nothing is in the way, counts differ by at most one per layer and in total, for
    any number of shards. The same arguments give the same placement.

    Raises ValueError for no shards, doubled ids or layers, no experts, copies outside 1..number of shards, or slots
    that do not fit: the message says how many are too many.
    """
    _check(moe_layers, num_experts, shard_ids, copies)
    slots = [Slot(layer, expert) for layer in moe_layers for expert in range(num_experts)]
    node_of = {shard_id: (nodes or {}).get(shard_id, f"node of {shard_id}") for shard_id in shard_ids}
    deal = _Deal(_quotas(len(slots), copies, max_slots or {}, node_of), node_of, len(slots))
    slots_by_shard: dict[ShardId, list[Slot]] = {shard_id: [] for shard_id in shard_ids}
    for slot in slots:
        for shard_id in deal.next_shards(slot.layer, copies):
            slots_by_shard[shard_id].append(slot)
    return ExpertPlacement(slots_by_shard={shard: tuple(slots) for shard, slots in slots_by_shard.items()})


def _quotas(
    num_slots: int, copies: int, max_slots: Mapping[ShardId, int], node_of: Mapping[ShardId, str]
) -> dict[ShardId, int]:
    """How many slots each shard will hold: one after the other to the shard with the fewest, on a node that can
    still take a slot without holding it twice as long as there is one. No shard can hold a slot twice, so none gets
    more than there are slots; by Gale and Ryser that is enough for the slots to be dealt."""
    room = {shard_id: min(num_slots, max_slots.get(shard_id, num_slots)) for shard_id in node_of}
    too_many = num_slots * copies - sum(room.values())
    if too_many > 0:
        raise ValueError(
            f"max_slots {dict(max_slots)}: {num_slots} slots in {copies} copies are {too_many} more than there is room"
        )
    quotas = dict.fromkeys(node_of, 0)
    on_node: Counter[str] = Counter()
    for _ in range(num_slots * copies):
        with_room = (shard_id for shard_id in quotas if quotas[shard_id] < room[shard_id])
        shard_id = min(with_room, key=lambda shard: (on_node[node_of[shard]] // num_slots, quotas[shard]))
        quotas[shard_id] += 1
        on_node[node_of[shard_id]] += 1
    return quotas


class _Deal:
    """Deals slots, one at a time, so that in the end each shard has got what its quota says."""

    def __init__(self, quotas: Mapping[ShardId, int], node_of: Mapping[ShardId, str], num_slots: int) -> None:
        self._node_of = node_of
        self._slots_left = num_slots
        self._left = dict(quotas)
        self._left_on_node: Counter[str] = Counter()
        for shard_id, quota in quotas.items():
            self._left_on_node[node_of[shard_id]] += quota
        self._layer: int | None = None
        self._left_before_layer = dict(quotas)

    def next_shards(self, layer: int, copies: int) -> list[ShardId]:
        """The shards of the next slot. Slots of a layer come one after the other."""
        if layer != self._layer:
            self._layer, self._left_before_layer = layer, dict(self._left)
        chosen: list[ShardId] = []
        for _ in range(copies):
            candidates = (shard_id for shard_id, left in self._left.items() if left and shard_id not in chosen)
            chosen.append(min(candidates, key=lambda shard: self._rank(shard, chosen)))
        for shard_id in chosen:
            self._left[shard_id] -= 1
            self._left_on_node[self._node_of[shard_id]] -= 1
        self._slots_left -= 1
        return chosen

    def _rank(self, shard: ShardId, chosen: Sequence[ShardId]) -> tuple[bool, bool, bool, float, int]:
        """Smaller comes first. A shard or node that has as much left to take as there are slots must take this one;
        else the layers of a shard come out as even as their sizes let them."""
        node = self._node_of[shard]
        dealt_of_layer = self._left_before_layer[shard] - self._left[shard]
        return (
            self._left[shard] < self._slots_left,
            node in (self._node_of[other] for other in chosen),
            self._left_on_node[node] < self._slots_left,
            (dealt_of_layer + 1) / self._left_before_layer[shard],
            dealt_of_layer,
        )


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
