"""How many expert shards there should be, by how busy they are. Pure: time comes in as an argument, in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScaling:
    """target_busy: the part of the time that shards should be busy, on average over all of them. One more shard when
    they were busier for up_delay_s without a break; one less when for down_delay_s those that remain would not have
    been busier than target_busy less margin. Raises ValueError for what makes no sense.
    """

    min_shards: int
    max_shards: int
    target_busy: float = 0.6
    margin: float = 0.1
    up_delay_s: float = 30.0
    down_delay_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_shards <= self.max_shards:
            raise ValueError(f"min_shards must be between 1 and max_shards ({self.max_shards}), got {self.min_shards}")
        if not 0 < self.margin < self.target_busy < 1:
            raise ValueError(
                f"target_busy must be between margin and 1, and margin above 0, "
                f"got {self.target_busy} and {self.margin}"
            )
        for name in ("up_delay_s", "down_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Since when the shards have been too busy, or not busy enough; at most one of the two. Begin with none."""

    too_busy_since_s: float | None = None
    too_idle_since_s: float | None = None


def desired_shards(
    *, num_shards: int, num_ready: int, busy: float | None, trend: Trend, now_s: float, scaling: ShardScaling
) -> tuple[int, Trend]:
    """The number of shards there should be, at most one more or less than num_shards, and the trend for the next look.

    num_shards: as decided before; num_ready: of these that serve. While they differ the last step is still under way
    and nothing else is decided. busy: 0 to 1, the mean over shards; None when it is not known, which proves nothing
    and ends a trend.
    """
    if num_ready != num_shards:
        return num_shards, Trend()
    if num_shards < scaling.min_shards:
        return num_shards + 1, Trend()
    if num_shards > scaling.max_shards:
        return num_shards - 1, Trend()
    trend = _continued(trend, num_shards, busy, now_s, scaling)
    if _has_lasted(trend.too_busy_since_s, scaling.up_delay_s, now_s):
        return num_shards + 1, Trend()
    if _has_lasted(trend.too_idle_since_s, scaling.down_delay_s, now_s):
        return num_shards - 1, Trend()
    return num_shards, trend


def _continued(trend: Trend, num_shards: int, busy: float | None, now_s: float, scaling: ShardScaling) -> Trend:
    """A step that the bounds forbid is no trend."""
    if busy is None:
        return Trend()
    if busy > scaling.target_busy and num_shards < scaling.max_shards:
        return Trend(too_busy_since_s=now_s if trend.too_busy_since_s is None else trend.too_busy_since_s)
    if num_shards > scaling.min_shards and busy * num_shards / (num_shards - 1) <= scaling.target_busy - scaling.margin:
        return Trend(too_idle_since_s=now_s if trend.too_idle_since_s is None else trend.too_idle_since_s)
    return Trend()


def _has_lasted(since_s: float | None, delay_s: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s >= delay_s
