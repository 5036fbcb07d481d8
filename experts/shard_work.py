"""What a shard has to compute for its lanes, computed one tile at a time.

Shapes: R routed rows, D model.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from experts.placement import WeightSlot
from experts.shard import Shard
from experts.tiles import TileQueue
from experts.transport.base import LaneEnd, RowRequest


class ShardWork:
    """Belongs to the service's thread; others only read ``progress``, one tick per tile, and ``busy_s``."""

    def __init__(self, shard: Shard, *, after_expert: Callable[[], object]) -> None:
        """after_expert is called whenever an expert's rows are done."""
        self.progress = 0
        self.busy_s = 0.0
        self._shard = shard
        self._after_expert = after_expert
        self._on_cpu = shard.device.type == "cpu"
        self._tiles = TileQueue()

    def __bool__(self) -> bool:
        return bool(self._tiles)

    def add(self, lane: LaneEnd, request: RowRequest) -> None:
        self._tiles.add(lane, request)

    def drop(self, lane: LaneEnd) -> None:
        """Forgets what a dead lane still wanted."""
        self._tiles.drop(lane)

    def compute_tile(self) -> list[tuple[LaneEnd, RowRequest]]:
        """Computes the next tile, of which there must be one; removes and returns the requests that it finishes."""
        started_at = time.monotonic()
        whole = self._tiles.pop_whole()
        if whole is not None:
            finished = [whole]
            self._compute_whole(whole[1])
        else:
            for slot, parts_RD in self._tiles.take():
                self._compute_parts(slot, parts_RD)
            finished = self._tiles.pop_finished()
        self.progress += 1
        self.busy_s += time.monotonic() - started_at
        return finished

    def free_retired(self) -> None:
        """The weights that no epoch needs any more and of which no rows wait."""
        if self._shard.has_retired:
            self._shard.free_retired(in_use=self._tiles.slots)

    def _compute_whole(self, request: RowRequest) -> None:
        """The common case: one small request, and nothing else to do."""
        who, x_RD, start = request.header.identity, request.x_RD, request.first_row
        for expert, num_rows in request.rows_per_expert:
            stop = start + num_rows
            self._compute_rows(WeightSlot(who.weights_version, who.layer, expert), x_RD[start:stop])
            start = stop
            self._after_expert()

    def _compute_parts(self, slot: WeightSlot, parts_RD: list[torch.Tensor]) -> None:
        if len(parts_RD) == 1:
            self._compute_rows(slot, parts_RD[0])
        else:
            x_RD = torch.cat(parts_RD)
            self._compute_rows(slot, x_RD)
            for part_RD, y_RD in zip(parts_RD, torch.split(x_RD, [len(part) for part in parts_RD]), strict=True):
                part_RD.copy_(y_RD)
        self._after_expert()

    def _compute_rows(self, slot: WeightSlot, x_RD: torch.Tensor) -> None:
        y_RD = self._shard.apply_expert(slot, x_RD if self._on_cpu else x_RD.to(self._shard.device))
        if y_RD is not x_RD:
            x_RD.copy_(y_RD)
