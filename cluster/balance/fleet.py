"""The shards that decisions are about: where they are, what they hold at most, how fast they are. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from experts.placement import ShardId
from experts.shard_speed import ShardSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResources:
    """memory_bytes: for weights of experts, those it holds now included."""

    shard_id: ShardId
    node_id: str
    memory_bytes: int
    speed: ShardSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """slot_bytes and flops_per_row: of one expert, all have the same shape.

    Raises ValueError for no shards, a shard that comes twice, or a size that is not positive.
    """

    shards: tuple[ShardResources, ...]
    slot_bytes: int
    flops_per_row: int

    def __post_init__(self) -> None:
        ids = self.shard_ids
        if not ids:
            raise ValueError("shards is empty: a fleet needs at least one")
        if len(set(ids)) != len(ids):
            raise ValueError(f"shards must be distinct, got {list(ids)}")
        for name in ("slot_bytes", "flops_per_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def shard_ids(self) -> tuple[ShardId, ...]:
        return tuple(shard.shard_id for shard in self.shards)

    @property
    def max_slots(self) -> dict[ShardId, int]:
        """How many slots each shard has memory for."""
        return {shard.shard_id: max(0, shard.memory_bytes) // self.slot_bytes for shard in self.shards}

    @property
    def nodes(self) -> dict[ShardId, str]:
        return {shard.shard_id: shard.node_id for shard in self.shards}
