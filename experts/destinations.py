"""Which live copy of each expert a dispatch asks. Pure.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from experts.placement import ShardId
from experts.row_plan import Indices


def choose_shards(copies: Mapping[int, Sequence[ShardId]], *, offset: int) -> dict[int, ShardId]:
    """expert -> the shard that gets all its rows, for experts that have at least one copy.

    All rows of an expert go to one copy: while an expert's cost is the reading of its weights, splitting its rows
    only costs. Experts without a choice are counted first; then each expert takes the copy whose shard has the
    fewest experts of this dispatch so far. offset turns ties, so that lanes prefer different copies.
    """
    chosen = {expert: shards[0] for expert, shards in copies.items() if len(shards) == 1}
    if len(chosen) == len(copies):
        return chosen
    busy = Counter(chosen.values())
    for expert, shards in copies.items():
        if len(shards) > 1:
            turn = (expert + offset) % len(shards)
            turned = (*shards[turn:], *shards[:turn])
            chosen[expert] = min(turned, key=lambda shard: busy[shard])
            busy[chosen[expert]] += 1
    return chosen


class LayerDestinations:
    """Where the rows of one layer go as long as no other shard is lost: made once, asked at every dispatch.

    Shards are numbers in here: places in shard_ids. ``missing`` stands behind them all, for experts of which no copy
    lives, and ``unplaced`` behind that, for experts that are placed nowhere.
    """

    def __init__(self, copies: Mapping[int, Sequence[ShardId]], shard_ids: Sequence[ShardId], *, offset: int) -> None:
        """copies: of every expert that is placed, its living shards. offset: see ``choose_shards``."""
        self.num_experts = 1 + max(copies, default=-1)
        self.missing, self.unplaced = len(shard_ids), len(shard_ids) + 1
        self._copies = copies
        self._offset = offset
        self._number = {shard_id: number for number, shard_id in enumerate(shard_ids)}
        self._has_choice = any(len(shards) > 1 for shards in copies.values())
        self._shard_of_E = np.full(self.num_experts, self.unplaced)
        self._shard_of_E[list(copies)] = self.missing
        self._order_E = self._order({expert: shards for expert, shards in copies.items() if len(shards) == 1})

    def order(self, experts_R: Indices) -> Indices:
        """order_E of a dispatch of these experts, for ``plan_rows``: shard by shard, within a shard ascending.

        order_E // num_experts is the number of the shard. Raises IndexError for an expert that is out of range.
        """
        if not self._has_choice:
            return self._order_E
        asked = np.unique(experts_R).tolist()
        return self._order({expert: self._copies.get(expert, ()) for expert in asked})

    def _order(self, copies: Mapping[int, Sequence[ShardId]]) -> Indices:
        shard_of_E = self._shard_of_E.copy()
        for expert, shard_id in choose_shards(copies, offset=self._offset).items():
            shard_of_E[expert] = self._number[shard_id]
        return shard_of_E * self.num_experts + np.arange(self.num_experts)
