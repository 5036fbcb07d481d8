"""What was asked of each expert lately: counters that only grow, made into traffic of the last minutes. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.balance.expert_traffic import NO_TRAFFIC, ExpertTraffic, SlotTraffic
from experts.placement import ShardId, Slot

_NUM_BUCKETS = 10


@dataclass(slots=True, kw_only=True)
class _Bucket:
    begin_s: float
    by_slot: dict[Slot, SlotTraffic] = field(default_factory=dict)


class LoadWindow:
    """Shards report what they have computed since they started; the window knows what was computed in about the last
    window_s seconds. It forgets a tenth of that at a time."""

    def __init__(self, window_s: float) -> None:
        """Raises ValueError for a window that is not positive."""
        if not window_s > 0:
            raise ValueError(f"window_s must be positive, got {window_s}")
        self._bucket_s = window_s / _NUM_BUCKETS
        self._buckets: deque[_Bucket] = deque(maxlen=_NUM_BUCKETS)
        self._last_report: dict[ShardId, Mapping[Slot, SlotTraffic]] = {}

    def report(self, shard_id: ShardId, counters: Mapping[Slot, SlotTraffic], now_s: float) -> None:
        """counters: since the shard's start. Of a shard that was not known before nothing is counted yet: nobody
        knows when that was. A counter that has fallen belongs to a slot that was dropped and loaded anew."""
        before = self._last_report.get(shard_id)
        self._last_report[shard_id] = counters
        if not self._buckets or now_s - self._buckets[-1].begin_s >= self._bucket_s:
            self._buckets.append(_Bucket(begin_s=now_s))
        if before is None:
            return
        by_slot = self._buckets[-1].by_slot
        for slot, counter in counters.items():
            old = before.get(slot, NO_TRAFFIC)
            if counter != old:
                new = counter.minus(old) if counter.rows >= old.rows else counter
                by_slot[slot] = by_slot.get(slot, NO_TRAFFIC).plus(new)

    def forget(self, shard_id: ShardId) -> None:
        """The shard reports no more; what it has computed still counts."""
        self._last_report.pop(shard_id, None)

    def traffic(self, now_s: float) -> ExpertTraffic:
        """Nothing within 0 s before the first report."""
        span_s = now_s - self._buckets[0].begin_s if self._buckets else 0.0
        if span_s <= 0:
            return ExpertTraffic(span_s=0.0, by_slot={})
        by_slot: dict[Slot, SlotTraffic] = {}
        for bucket in self._buckets:
            for slot, traffic in bucket.by_slot.items():
                by_slot[slot] = by_slot.get(slot, NO_TRAFFIC).plus(traffic)
        return ExpertTraffic(span_s=span_s, by_slot=by_slot)
