"""What a shard computes next: tiles cut from the requests that wait, small ones served between large ones.

A tile has a leader: by turns the request with the fewest rows left and the one that has waited longest, so a short
decode message waits for one tile of a long prefill at most, and the prefill for one short message. Rows that
other requests have waiting for the same expert join the leader's in one matmul. Pure: no sockets, no weights.

Shapes: R routed rows, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from experts.placement import WeightSlot
from experts.shard_speed import TILE_ROWS
from experts.transport.base import LaneEnd, RowRequest


class ExpertTile(NamedTuple):
    """Rows of one slot: views of the waiting requests' rows, which the results are to overwrite."""

    slot: WeightSlot
    parts_RD: list[torch.Tensor]


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    request: RowRequest
    lane: LaneEnd
    arrival: int
    # Rows not yet handed out: expert -> (start, stop) in request.x_RD.
    spans: dict[int, tuple[int, int]]
    is_whole: bool = True

    @property
    def weights(self) -> tuple[int, int]:
        """Weights version and layer: rows of others are not for the same experts."""
        who = self.request.header.identity
        return who.weights_version, who.layer

    @property
    def rows_left(self) -> int:
        return sum(stop - start for start, stop in self.spans.values())

    def cut(self, expert: int, max_rows: int) -> torch.Tensor:
        """Hands out up to max_rows of the rows left for expert; max_rows is at least 1."""
        self.is_whole = False
        start, stop = self.spans[expert]
        end = min(stop, start + max_rows)
        if end < stop:
            # In its place, so that the next tile finds this expert's weights still in the cache.
            self.spans[expert] = (end, stop)
        else:
            del self.spans[expert]
        return self.request.x_RD[start:end]


class TileQueue:
    """Requests of all lanes. Take a tile, compute it, pop what is finished, take the next."""

    def __init__(self, tile_rows: int = TILE_ROWS) -> None:
        self._tile_rows = tile_rows
        self._waiting: list[_Waiting] = []
        self._arrivals = count()
        self._oldest_leads = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def slots(self) -> set[WeightSlot]:
        """Those of which rows wait."""
        return {WeightSlot(*waiting.weights, expert) for waiting in self._waiting for expert in waiting.spans}

    def add(self, lane: LaneEnd, request: RowRequest) -> None:
        spans: dict[int, tuple[int, int]] = {}
        start = request.first_row
        for expert, rows in request.rows_per_expert:
            spans[expert] = (start, start + rows)
            start += rows
        self._waiting.append(_Waiting(request=request, lane=lane, arrival=next(self._arrivals), spans=spans))

    def drop(self, lane: LaneEnd) -> None:
        """Forgets what a dead lane still wanted."""
        self._waiting = [waiting for waiting in self._waiting if waiting.lane is not lane]

    def pop_whole(self) -> tuple[LaneEnd, RowRequest] | None:
        """Removes and returns the request that waits, if it is the only one, untouched and no larger than a tile."""
        if len(self._waiting) != 1:
            return None
        [waiting] = self._waiting
        if not waiting.is_whole or waiting.request.header.num_rows > self._tile_rows:
            return None
        self._waiting.clear()
        return waiting.lane, waiting.request

    def take(self) -> list[ExpertTile]:
        """The next tile: up to tile_rows rows of the leader, each expert with the rows that join. Never empty."""
        leader = self._next_leader()
        tiles: list[ExpertTile] = []
        budget = self._tile_rows
        while budget > 0 and leader.spans:
            expert = next(iter(leader.spans))
            part_RD = leader.cut(expert, budget)
            budget -= part_RD.shape[0]
            parts_RD = [part_RD, *self._joining(leader, expert, self._tile_rows - part_RD.shape[0])]
            tiles.append(ExpertTile(WeightSlot(*leader.weights, expert), parts_RD))
        return tiles

    def pop_finished(self) -> list[tuple[LaneEnd, RowRequest]]:
        """Removes and returns the requests all of whose rows were handed out."""
        finished = [(waiting.lane, waiting.request) for waiting in self._waiting if not waiting.spans]
        self._waiting = [waiting for waiting in self._waiting if waiting.spans]
        return finished

    def _next_leader(self) -> _Waiting:
        self._oldest_leads = not self._oldest_leads
        if self._oldest_leads:
            return self._waiting[0]
        return min(self._waiting, key=lambda waiting: (waiting.rows_left, waiting.arrival))

    def _joining(self, leader: _Waiting, expert: int, room: int) -> list[torch.Tensor]:
        parts_RD: list[torch.Tensor] = []
        for other in self._waiting:
            if room > 0 and other is not leader and other.weights == leader.weights and expert in other.spans:
                parts_RD.append(other.cut(expert, room))
                room -= parts_RD[-1].shape[0]
        return parts_RD
