"""An epoch: one integer that names a membership, a placement and a weights version (design §4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from experts.placement import ExpertPlacement, ShardId, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAddress:
    """Where a shard listens for lanes. shard_id is its identity: a restarted shard has another.

    host_id (experts/transport/host_id.py) and unix_name, of its Unix socket there, are for routers on the same host;
    None where it offers no shm.
    """

    shard_id: ShardId
    node_id: str
    host: str
    port: int
    host_id: str | None = None
    unix_name: str | None = None

    def __str__(self) -> str:
        return f"{self.shard_id} ({self.host}:{self.port})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Numbers only grow and are never reused. Only the controller makes epochs.

    Raises ValueError if the number or version is negative, or the placement names a shard that has no address.
    """

    number: int
    weights_version: int
    shards: tuple[ShardAddress, ...]
    placement: ExpertPlacement

    def __post_init__(self) -> None:
        if self.number < 0 or self.weights_version < 0:
            raise ValueError(f"number {self.number} and weights_version {self.weights_version} must be >= 0")
        strangers = set(self.placement.slots_by_shard) - {address.shard_id for address in self.shards}
        if strangers:
            raise ValueError(f"epoch {self.number} places slots on shards without an address: {sorted(strangers)}")

    def address_of(self, shard_id: ShardId) -> ShardAddress:
        """Raises ValueError when the shard is no member of this epoch."""
        for address in self.shards:
            if address.shard_id == shard_id:
                return address
        raise ValueError(f"shard_id {shard_id!r} is not a member of epoch {self.number}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and integers only, for control messages."""
        slots_by_shard = self.placement.slots_by_shard
        return {
            "number": self.number,
            "weights_version": self.weights_version,
            "shards": [asdict(address) for address in self.shards],
            "slots_by_shard": {shard: [list(slot) for slot in slots] for shard, slots in slots_by_shard.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Epoch:
        """The inverse of to_dict. Raises KeyError for a missing key, ValueError for values that do not fit."""
        slots_by_shard = {
            ShardId(shard): tuple(Slot(layer, expert) for layer, expert in slots)
            for shard, slots in plain["slots_by_shard"].items()
        }
        return cls(
            number=plain["number"],
            weights_version=plain["weights_version"],
            shards=tuple(ShardAddress(**address) for address in plain["shards"]),
            placement=ExpertPlacement(slots_by_shard=slots_by_shard),
        )
