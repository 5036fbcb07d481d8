"""A placement that is being thought about: its layers, and the room that is left for loading. Pure.

Additions come before removals, so what is added takes room that removals have not yet given back. Only copies
beyond min_copies can make room: they may be dropped before anything is loaded.

Shapes: E experts of a layer, S shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.balance.busy_time import Floats, Ints, busy_of_layer, is_splittable
from cluster.balance.expert_traffic import ExpertTraffic
from cluster.balance.fleet import Fleet
from cluster.balance.layer_draft import LayerDraft
from cluster.balance.plan import PlacedSlot, Prediction, Stage
from cluster.balance.steps import Surroundings, best_step
from experts.placement import ExpertPlacement, ShardId, Slot

# By how much of its mean a layer may get slower when it gives up a copy.
_HARMLESS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spare:
    """A copy that can be done without; positions in the arrays of its layer."""

    layer: int
    expert: int
    shard: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draft:
    """Copies on shards that are not in the fleet do not exist for a draft. room_S: slots that each shard can still
    load; below 0 when it holds more than it has memory for. busy_S: of all layers together. wait_s: see Prediction."""

    shard_ids: tuple[ShardId, ...]
    node_S: Ints
    room_S: Ints
    layers: Mapping[int, LayerDraft]
    busy_S: Floats
    wait_s: float
    num_added: int
    min_copies: int
    # Per shard, the least useful first.
    spares: tuple[tuple[_Spare, ...], ...] = ()
    dropped: tuple[_Spare, ...] = field(default=())

    @classmethod
    def begin(cls, placement: ExpertPlacement, traffic: ExpertTraffic, fleet: Fleet, *, min_copies: int) -> Draft:
        nodes = sorted({shard.node_id for shard in fleet.shards})
        held = {shard: len(placement.slots_of(shard)) for shard in fleet.shard_ids}
        layers = _layers(placement, traffic, fleet)
        draft = cls(
            shard_ids=fleet.shard_ids,
            node_S=np.array([nodes.index(shard.node_id) for shard in fleet.shards], dtype=np.int64),
            room_S=np.array([fleet.max_slots[shard] - held[shard] for shard in fleet.shard_ids], dtype=np.int64),
            layers=layers,
            busy_S=np.array([layer.busy_S for layer in layers.values()]).sum(axis=0),
            wait_s=sum(layer.max_s for layer in layers.values()),
            num_added=0,
            min_copies=min_copies,
        )
        return replace(draft, spares=draft._find_spares())

    @property
    def prediction(self) -> Prediction:
        busy_by_layer = {layer: tuple(draft.busy_S.tolist()) for layer, draft in self.layers.items()}
        return Prediction(shard_ids=self.shard_ids, busy_by_layer=busy_by_layer)

    def improved(self, layer: int) -> Draft | None:
        """With the best next change to this layer; None when there is none."""
        draft = self
        while True:
            can_take_S = (draft.room_S > 0) | np.array([bool(spares) for spares in draft.spares])
            step = best_step(
                draft.layers[layer], Surroundings(can_take_S=can_take_S, node_S=self.node_S, busy_S=draft.busy_S)
            )
            if step is None:
                return None
            full = [shard for _expert, shard in step.add if draft.room_S[shard] < 1]
            if not full:
                return draft._with_layer(draft.layers[layer].changed(add=step.add, remove=step.remove))
            draft = draft._with_room(full[0])

    def stages(self) -> tuple[Stage, ...]:
        """From the placement at the beginning to this one."""
        dropped = tuple(sorted(self._placed(spare.layer, spare.expert, spare.shard) for spare in self.dropped))
        additions, removals = list[PlacedSlot](), list[PlacedSlot]()
        for layer, draft in self.layers.items():
            for cells_ES, placed in ((draft.added, additions), (draft.removed, removals)):
                placed += [self._placed(layer, *cell) for cell in np.argwhere(cells_ES).tolist()]
        stages = (
            Stage(additions=(), removals=dropped),
            Stage(additions=tuple(sorted(additions)), removals=tuple(sorted(removals))),
        )
        return tuple(stage for stage in stages if stage.additions or stage.removals)

    def _with_layer(self, new: LayerDraft) -> Draft:
        old = self.layers[new.layer]
        return replace(
            self,
            layers={**self.layers, new.layer: new},
            room_S=self.room_S + old.added_S - new.added_S,
            busy_S=self.busy_S + new.busy_S - old.busy_S,
            wait_s=self.wait_s + new.max_s - old.max_s,
            num_added=self.num_added + int((new.added_S - old.added_S).sum()),
        )

    def _with_room(self, shard: int) -> Draft:
        """With the least useful spare of the shard dropped that harms nobody, and without those before it. Where
        there is none: with no spares of the shard left. An expert gives up one copy at most."""
        poorer = {(spare.layer, spare.expert) for spare in self.dropped}
        for turn, spare in enumerate(self.spares[shard]):
            left = self.spares[shard][turn + 1 :]
            spares = (*self.spares[:shard], left, *self.spares[shard + 1 :])
            layer = self.layers[spare.layer]
            if (spare.layer, spare.expert) in poorer or layer.has_changed(spare.expert):
                continue
            without = layer.dropped(spare.expert, spare.shard)
            if without.max_s <= layer.max_s + _HARMLESS * layer.mean_s:
                room_S = self.room_S + (np.arange(len(self.shard_ids)) == shard)
                dropped = (*self.dropped, spare)
                return replace(self, spares=spares, dropped=dropped, room_S=room_S)._with_layer(without)
        return replace(self, spares=(*self.spares[:shard], (), *self.spares[shard + 1 :]))

    def _find_spares(self) -> tuple[tuple[_Spare, ...], ...]:
        found = [(load_s, spare) for layer in self.layers.values() for load_s, spare in self._spares_of(layer)]
        found.sort(key=lambda entry: (entry[0], entry[1].layer, entry[1].expert))
        return tuple(
            tuple(spare for _load_s, spare in found if spare.shard == shard) for shard in range(len(self.shard_ids))
        )

    def _spares_of(self, layer: LayerDraft) -> Iterator[tuple[float, _Spare]]:
        for expert in np.flatnonzero(layer.held_ES.sum(axis=1) > self.min_copies).tolist():
            shards = np.flatnonzero(layer.held_ES[expert]).tolist()
            for shard in shards:
                nodes = {int(self.node_S[other]) for other in shards if other != shard}
                if len(nodes) >= min(self.min_copies, len({int(self.node_S[other]) for other in shards})):
                    load_s = float(layer.load_ES[expert, shard])
                    yield load_s, _Spare(layer=layer.layer, expert=expert, shard=shard)

    def _placed(self, layer: int, expert: int, shard: int) -> PlacedSlot:
        return PlacedSlot(self.shard_ids[shard], Slot(layer, self.layers[layer].experts[expert]))


def _layers(placement: ExpertPlacement, traffic: ExpertTraffic, fleet: Fleet) -> dict[int, LayerDraft]:
    held: dict[Slot, list[int]] = {}
    for index, shard in enumerate(fleet.shard_ids):
        for slot in placement.slots_of(shard):
            held.setdefault(slot, []).append(index)
    experts_by_layer: dict[int, list[int]] = {}
    for slot in sorted(held):
        experts_by_layer.setdefault(slot.layer, []).append(slot.expert)
    layers: dict[int, LayerDraft] = {}
    for layer, experts in experts_by_layer.items():
        held_ES = np.zeros((len(experts), len(fleet.shards)), dtype=np.bool_)
        for row, expert in enumerate(experts):
            held_ES[row, held[Slot(layer, expert)]] = True
        layers[layer] = LayerDraft.begin(
            layer=layer,
            experts=tuple(experts),
            busy_ES=busy_of_layer(traffic, layer, experts, fleet),
            splittable_E=np.array([is_splittable(traffic.of(Slot(layer, expert))) for expert in experts]),
            held_ES=held_ES,
        )
    return layers
