"""Which live copy of each expert a dispatch asks. Pure.

Shapes: T tokens, K top-k, E experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experts.placement import ShardId
from experts.row_plan import ExpertOrder, RankPart
from experts.row_split import MIN_PART_ROWS, split_rows


def choose_shards(copies: Mapping[int, Sequence[ShardId]], *, offset: int) -> dict[int, ShardId]:
    """expert -> the shard that gets all its rows, for experts that have at least one copy.

    While an expert's cost is the reading of its weights, splitting its rows only costs; for many rows there is
    ``split_rows``. Experts without a choice are counted first; then each expert takes the copy whose shard has the
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


@dataclass(frozen=True, slots=True)
class ShardOrder(ExpertOrder):
    """shards: the number of the shard that each rank's expert goes to; ascending."""

    shards: Sequence[int]


class LayerDestinations:
    """Where the rows of one layer go as long as no other shard is lost: made once, asked at every dispatch.

    Shards are numbers in here: places in shard_ids. ``missing`` stands behind them all, for experts of which no copy
    lives, and ``unplaced`` behind that, for experts that are placed nowhere.
    """

    def __init__(self, copies: Mapping[int, Sequence[ShardId]], shard_ids: Sequence[ShardId], *, offset: int) -> None:
        """copies: of every expert that is placed, its living shards. offset: see ``choose_shards``."""
        self.missing, self.unplaced = len(shard_ids), len(shard_ids) + 1
        self._copies = copies
        self._offset = offset
        self._number = {shard_id: number for number, shard_id in enumerate(shard_ids)}
        self._num_experts = 1 + max(copies, default=-1)
        self._fixed = None if any(len(shards) > 1 for shards in copies.values()) else self._order(copies)

    def order(self, topk_ids_TK: torch.Tensor) -> ShardOrder:
        """Shard by shard, within a shard by ascending expert. Raises IndexError for an expert above all others."""
        if self._fixed is not None:
            return self._fixed
        rows = Counter(topk_ids_TK.flatten().tolist())
        copies = {expert: self._copies.get(expert, ()) for expert in sorted(rows)}
        if any(num_rows >= 2 * MIN_PART_ROWS and len(copies[expert]) > 1 for expert, num_rows in rows.items()):
            return self._split_order(rows, copies)
        return self._order(copies)

    def _split_order(self, rows: Mapping[int, int], copies: Mapping[int, Sequence[ShardId]]) -> ShardOrder:
        parts = split_rows(rows, copies, offset=self._offset)
        nowhere = {expert: self.missing if expert in self._copies else self.unplaced for expert in rows}
        placed = sorted(
            (self._number[part.shard_id], expert, part.num_rows) for expert in parts for part in parts[expert]
        )
        placed += sorted((nowhere[expert], expert, rows[expert]) for expert in rows.keys() - parts.keys())
        ranks: dict[int, list[RankPart]] = {}
        for rank, (_shard, expert, num_rows) in enumerate(placed):
            ranks.setdefault(expert, []).append(RankPart(rank, num_rows))
        rank_E = np.zeros(self._num_experts, dtype=np.int64)
        for expert, of_expert in ranks.items():
            rank_E[expert] = of_expert[0].rank
        return ShardOrder(
            rank_E,
            [expert for _shard, expert, _num_rows in placed],
            [shard for shard, _expert, _num_rows in placed],
            parts={expert: of_expert for expert, of_expert in ranks.items() if len(of_expert) > 1},
        )

    def _order(self, copies: Mapping[int, Sequence[ShardId]]) -> ShardOrder:
        chosen = choose_shards(copies, offset=self._offset)
        shard_of_E = [self.unplaced] * self._num_experts
        for expert in self._copies:
            shard_of_E[expert] = self._number[chosen[expert]] if expert in chosen else self.missing
        experts = sorted(range(self._num_experts), key=shard_of_E.__getitem__)
        rank_E = np.empty(self._num_experts, dtype=np.int64)
        rank_E[experts] = np.arange(self._num_experts)
        return ShardOrder(rank_E, experts, [shard_of_E[expert] for expert in experts])
