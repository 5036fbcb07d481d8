"""Where routers knock: a shard's listeners, and the lanes behind them that have not proved themselves yet."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from experts.server_limits import ServerLimits
from experts.transport.base import LaneEnd, Listener
from experts.transport.waiting import READ, Poller

_LOG = logging.getLogger(__name__)

# How long the shard leaves its listeners alone when the system gives it no further socket.
_DEAF_S = 0.5


class Doors:
    """Belongs to the service's thread. refused is the service's count of those sent away, by reason."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        *,
        poller: Poller,
        limits: ServerLimits,
        refused: Counter[str],
        on_lane: Callable[[LaneEnd], bool],
    ) -> None:
        """on_lane gets whoever comes in and says whether to let them stay."""
        self._listeners = list(listeners)
        self._poller = poller
        self._limits = limits
        self._refused = refused
        self._on_lane = on_lane
        self._num_accepted = 0
        self._deaf_until: float | None = None
        self._knocked_at: dict[LaneEnd, float] = {}

    def open(self) -> None:
        for listener in self._listeners:
            self._poller.add(listener, READ, partial(self._accept, listener))

    def overdue(self) -> list[LaneEnd]:
        """Those that have taken too long to prove themselves. To be called now and then: it also ends deafness."""
        now = time.monotonic()
        if self._deaf_until is not None and now > self._deaf_until:
            self._deaf_until = None
            self.open()
        if not self._knocked_at:
            return []
        self._knocked_at = {lane: at for lane, at in self._knocked_at.items() if lane.lane_id is None}
        return [lane for lane, at in self._knocked_at.items() if at < now - self._limits.opening_s]

    def forget(self, lane: LaneEnd) -> None:
        self._knocked_at.pop(lane, None)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: Listener, _events: int) -> None:
        self._num_accepted += 1
        try:
            lane = listener.accept(self._num_accepted)
        except OSError as error:
            self._turn_deaf(error)
            return
        if lane is not None and self._on_lane(lane):
            self._knocked_at[lane] = time.monotonic()

    def _turn_deaf(self, error: OSError) -> None:
        """Out of file descriptors, mostly. The listener would stay ready and keep the loop spinning."""
        _LOG.warning("no lane can be taken for now: %s", error)
        self._refused["no socket"] += 1
        for listener in self._listeners:
            self._poller.remove(listener)
        self._deaf_until = time.monotonic() + _DEAF_S
