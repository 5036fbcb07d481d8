"""How fast a shard computes. Free of torch: whoever only plans needs it, too."""

from __future__ import annotations

from dataclasses import dataclass

# Rows of one expert that a shard computes at once. More are cut, and each part reads the weights anew.
TILE_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpeed:
    """What experts of the model's shape reach on a shard: bytes of weights read per second with few rows at once,
    and operations per second with many. Raises ValueError for a rate that is not positive."""

    bytes_per_s: float
    flops_per_s: float

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "flops_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
