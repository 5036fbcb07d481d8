"""Where the rows of an epoch go as long as no other shard is lost.

Shapes: T tokens, D model.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import torch

from experts.destinations import LayerDestinations, choose_shards
from experts.epoch import Epoch
from experts.peer import Peer
from experts.placement import ShardId, Slot


class LaneRoutes:
    """Of one epoch and one lane. peers are those that live, as the lane keeps them; ``forget`` tells of a change."""

    def __init__(self, epoch: Epoch, peers: Mapping[ShardId, Peer], *, lane_id: str) -> None:
        self.shard_ids = tuple(epoch.placement.slots_by_shard)
        self._epoch = epoch
        self._peers = peers
        self._copy_offset = zlib.crc32(lane_id.encode())
        # By layer, filled as layers are asked for.
        self._destinations: dict[int, LayerDestinations] = {}

    def forget(self) -> None:
        """Another shard lives, or one less."""
        self._destinations.clear()

    def of_layer(self, layer: int) -> LayerDestinations:
        known = self._destinations.get(layer)
        if known is None:
            slots = [slot for slot in self._epoch.placement.slots if slot.layer == layer]
            copies = {slot.expert: self._live_copies(slot) for slot in slots}
            known = LayerDestinations(copies, self.shard_ids, offset=self._copy_offset)
            self._destinations[layer] = known
        return known

    def choose(self, layer: int, experts: Collection[int]) -> dict[int, ShardId]:
        """expert -> a living shard, for those that have one."""
        copies = {expert: self._live_copies(Slot(layer, expert)) for expert in experts}
        return choose_shards(copies, offset=self._copy_offset)

    def not_placed(self, layer: int, expert: int) -> ValueError:
        return ValueError(f"expert {expert} of layer {layer} is not placed in epoch {self._epoch.number}")

    def check(self, num_rows: int, x_TD: torch.Tensor) -> None:
        """Raises ValueError for rows that the shards would not take."""
        hidden_size, dtype = x_TD.shape[1], x_TD.dtype
        for peer in self._peers.values():
            terms = peer.link.terms
            if terms.hidden_size != hidden_size or peer.dtype is not dtype:
                raise ValueError(
                    f"rows are {hidden_size} x {str(dtype).removeprefix('torch.')}, "
                    f"the shards have {terms.hidden_size} x {terms.dtype}"
                )
            if num_rows > terms.max_rows:
                raise ValueError(f"{num_rows} rows at once, the shards take at most {terms.max_rows}")

    def _live_copies(self, slot: Slot) -> list[ShardId]:
        return [shard_id for shard_id in self._epoch.placement.shards_of(slot) if shard_id in self._peers]
