"""The model of how long shards are busy. Pure.

An activation reads the expert's weights and computes its rows, and takes the longer of the two:

    seconds = activations / span * max(slot_bytes / bytes_per_s, rows per activation * flops_per_row / flops_per_s)

per second of the span. With few rows only activations count (memory-bound), with many only rows do (compute-bound).
The maximum is taken for each expert, not over their sum, because a shard computes one after the other.

What an expert costs is shared by its copies. Dispatchers even shards out (experts/destinations.py), so its shares
are taken to be those that do: each expert loads its copies up to a common level, where that is above what they
have to do anyway.

Shapes: E experts of a layer, S shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.balance.expert_traffic import ExpertTraffic, SlotTraffic
from cluster.balance.fleet import Fleet
from experts.placement import Slot
from experts.row_split import MIN_PART_ROWS
from experts.shard_speed import ShardSpeed

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Sharing out ends when no expert moves more than this part of the mean.
_TOLERANCE = 1e-3
_MAX_SWEEPS = 50


def busy_s(traffic: SlotTraffic, span_s: float, fleet: Fleet, speed: ShardSpeed) -> float:
    """Seconds per second that a shard would be busy if it got all the traffic of this expert."""
    if traffic.activations == 0:
        return 0.0
    read_s = fleet.slot_bytes / speed.bytes_per_s
    compute_s = traffic.rows / traffic.activations * fleet.flops_per_row / speed.flops_per_s
    return traffic.activations * max(read_s, compute_s) / span_s


def is_splittable(traffic: SlotTraffic) -> bool:
    """Whether dispatchers split the expert's rows over its copies: then each has enough to do."""
    return traffic.activations > 0 and traffic.rows >= 2 * MIN_PART_ROWS * traffic.activations


def samples_of(traffic: SlotTraffic) -> int:
    """How many events, each as good as chance, its cost is the sum of: rows where they count, else activations."""
    return traffic.rows if is_splittable(traffic) else traffic.activations


def busy_of_layer(traffic: ExpertTraffic, layer: int, experts: Sequence[int], fleet: Fleet) -> Floats:
    """busy_s as [E, S]: of each expert on each shard of the fleet."""
    slots = [traffic.of(Slot(layer, expert)) for expert in experts]
    by_speed = {
        speed: [busy_s(slot, traffic.span_s, fleet, speed) for slot in slots]
        for speed in {shard.speed for shard in fleet.shards}
    }
    return np.array([by_speed[shard.speed] for shard in fleet.shards], dtype=np.float64).T.reshape(len(slots), -1)


def share_out(busy_ES: Floats, held_ES: Bools, start: tuple[Floats, Bools] | None = None) -> Floats:
    """shares_ES: which part of each expert's traffic each copy gets; adds up to 1 for experts that are held.

    Experts take turns to even out the shards that hold them, until that changes nothing any more. start: shares_ES to
    begin with, and [S] the shards that are not even yet; by default equal shares, and all.
    """
    num_copies_E = held_ES.sum(axis=1)
    if start is None:
        start = held_ES / np.maximum(num_copies_E, 1)[:, None], np.ones(held_ES.shape[1], dtype=np.bool_)
    shares_ES, uneven_S = start[0].copy(), start[1]
    copied_E = (num_copies_E > 1) & (busy_ES.max(axis=1, initial=0.0) > 0)
    experts: dict[int, _Shared] = {}
    busy_S: list[float] = (shares_ES * busy_ES).sum(axis=0).tolist()
    tolerance = _TOLERANCE * sum(busy_S) / max(1, len(busy_S))
    for _ in range(_MAX_SWEEPS):
        before = np.array(busy_S)
        for index in np.flatnonzero(copied_E & held_ES[:, uneven_S].any(axis=1)).tolist():
            if index not in experts:
                experts[index] = _Shared(index, busy_ES, held_ES, shares_ES)
            experts[index].even_out(busy_S)
        uneven_S = np.abs(busy_S - before) > tolerance
        if not uneven_S.any():
            break
    for index, expert in experts.items():
        shares_ES[index, expert.shards] = expert.shares
    return shares_ES


class _Shared:
    """An expert with copies on several shards, in plain numbers: they are few and looked at often."""

    __slots__ = ("costs", "shards", "shares")

    def __init__(self, index: int, busy_ES: Floats, held_ES: Bools, shares_ES: Floats) -> None:
        self.shards: list[int] = np.flatnonzero(held_ES[index]).tolist()
        self.costs: list[float] = busy_ES[index, self.shards].tolist()
        self.shares: list[float] = shares_ES[index, self.shards].tolist()

    def even_out(self, busy_S: list[float]) -> None:
        """Changes shares, and what they cost in busy_S, so that the shards come out even."""
        costs = self.costs
        rest = [
            busy_S[shard] - share * cost for shard, share, cost in zip(self.shards, self.shares, costs, strict=True)
        ]
        self.shares = _shares_to_level(rest, costs)
        for shard, base, share, cost in zip(self.shards, rest, self.shares, costs, strict=True):
            busy_S[shard] = base + share * cost


def _shares_to_level(rest: list[float], costs: list[float]) -> list[float]:
    """Shares that add up to 1 and bring shards that are busy for rest, and for costs with the whole expert, to one
    level; those above it get nothing."""
    if len(rest) == 2:
        first = min(1.0, max(0.0, (rest[1] - rest[0] + costs[1]) / (costs[0] + costs[1])))
        return [first, 1 - first]
    order = sorted(range(len(rest)), key=rest.__getitem__)
    speed, filled, level = 0.0, 1.0, 0.0
    for turn, index in enumerate(order):
        speed += 1 / costs[index]
        filled += rest[index] / costs[index]
        level = filled / speed
        if turn + 1 == len(order) or level <= rest[order[turn + 1]]:
            break
    return [max(0.0, (level - base) / cost) for base, cost in zip(rest, costs, strict=True)]
