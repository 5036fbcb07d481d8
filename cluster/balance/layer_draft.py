"""One layer of a placement that is being thought about: who holds what, and how busy that makes the shards. Pure.

Shapes: E experts of the layer, S shards.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.balance.busy_time import Bools, Floats, Ints, share_out

Cell = tuple[int, int]
"""A copy, as the positions of its expert and its shard in the layer's arrays."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerDraft:
    """busy_ES: what each expert would cost each shard as a whole. initial_ES: copies where the thinking began.

    splittable_E: experts with so many rows at a time that their copies work on them together. load_ES: what each
    copy costs its shard; busy_S: what all of them do. Seconds per second. added_S: slots that each shard would load.
    max_s and mean_s: of busy_S.
    """

    layer: int
    experts: tuple[int, ...]
    busy_ES: Floats
    splittable_E: Bools
    initial_ES: Bools
    held_ES: Bools
    shares_ES: Floats
    # Filled by __post_init__: every step asks for them.
    load_ES: Floats = field(init=False)
    busy_S: Floats = field(init=False)
    added_S: Ints = field(init=False)
    max_s: float = field(init=False)
    mean_s: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "load_ES", self.shares_ES * self.busy_ES)
        object.__setattr__(self, "busy_S", self.load_ES.sum(axis=0))
        object.__setattr__(self, "added_S", (self.held_ES & ~self.initial_ES).sum(axis=0))
        object.__setattr__(self, "max_s", float(self.busy_S.max()))
        object.__setattr__(self, "mean_s", float(self.busy_S.mean()))

    @classmethod
    def begin(
        cls, *, layer: int, experts: tuple[int, ...], busy_ES: Floats, splittable_E: Bools, held_ES: Bools
    ) -> LayerDraft:
        return cls(
            layer=layer,
            experts=experts,
            busy_ES=busy_ES,
            splittable_E=splittable_E,
            initial_ES=held_ES,
            held_ES=held_ES,
            shares_ES=share_out(busy_ES, held_ES),
        )

    def changed(self, *, add: Collection[Cell] = (), remove: Collection[Cell] = ()) -> LayerDraft:
        """The same layer with other copies, its traffic shared out anew."""
        held_ES, shares_ES = self.held_ES.copy(), self.shares_ES.copy()
        for cells, is_held in ((add, True), (remove, False)):
            for expert, shard in cells:
                held_ES[expert, shard] = is_held
        experts = sorted({expert for expert, _shard in (*add, *remove)})
        shares_ES[experts] = held_ES[experts] / held_ES[experts].sum(axis=1, keepdims=True)
        touched_S = np.any(held_ES[experts] | self.held_ES[experts], axis=0).reshape(-1)
        return replace(self, held_ES=held_ES, shares_ES=share_out(self.busy_ES, held_ES, (shares_ES, touched_S)))

    def dropped(self, expert: int, shard: int) -> LayerDraft:
        """The same layer as if this copy had not been there in the beginning."""
        initial_ES = self.initial_ES.copy()
        initial_ES[expert, shard] = False
        return replace(self.changed(remove=[(expert, shard)]), initial_ES=initial_ES)

    @property
    def added(self) -> Bools:
        """[E, S]"""
        return self.held_ES & ~self.initial_ES

    @property
    def removed(self) -> Bools:
        """[E, S]"""
        return self.initial_ES & ~self.held_ES

    def has_changed(self, expert: int) -> bool:
        return not np.array_equal(self.held_ES[expert], self.initial_ES[expert])
