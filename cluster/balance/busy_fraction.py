"""How busy each shard has been lately, by its own clock. Pure."""

from __future__ import annotations

from collections import deque

from experts.placement import ShardId

_NUM_POINTS = 10


class BusyFraction:
    """Shards report for how many seconds they have computed since they started; this knows which part of about the
    last window_s seconds that was."""

    def __init__(self, window_s: float) -> None:
        """Raises ValueError for a window that is not positive."""
        if not window_s > 0:
            raise ValueError(f"window_s must be positive, got {window_s}")
        self._spacing_s = window_s / _NUM_POINTS
        # (when, busy seconds until then), at least spacing_s apart.
        self._points: dict[ShardId, deque[tuple[float, float]]] = {}
        self._last: dict[ShardId, tuple[float, float]] = {}

    def report(self, shard_id: ShardId, busy_s: float, now_s: float) -> None:
        points = self._points.setdefault(shard_id, deque(maxlen=_NUM_POINTS))
        if not points or now_s - points[-1][0] >= self._spacing_s:
            points.append((now_s, busy_s))
        self._last[shard_id] = now_s, busy_s

    def forget(self, shard_id: ShardId) -> None:
        self._points.pop(shard_id, None)
        self._last.pop(shard_id, None)

    def of(self, shard_id: ShardId) -> float | None:
        """0 to 1; None before the second report."""
        if shard_id not in self._last:
            return None
        (begin_s, busy_before_s), (end_s, busy_s) = self._points[shard_id][0], self._last[shard_id]
        return (busy_s - busy_before_s) / (end_s - begin_s) if end_s > begin_s else None

    @property
    def mean(self) -> float | None:
        """Over all shards; None as long as one is not known."""
        fractions = [self.of(shard_id) for shard_id in self._last]
        known = [fraction for fraction in fractions if fraction is not None]
        return sum(known) / len(known) if known and len(known) == len(fractions) else None
