"""What a shard's service bears, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """max_rows: of one request. max_unanswered: requests of one lane before the shard stops reading it."""

    max_rows: int = 1 << 16
    max_lanes: int = 1024
    max_unanswered: int = 8
    opening_s: float = 5.0
    dead_after_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """progress ticks once per tile. lanes: how many are open, by transport, those that have not proved themselves
    yet included. refused counts lanes closed for what they sent, by kind of error."""

    progress: int
    busy_s: float
    lanes: dict[str, int]
    refused: dict[str, int]
    num_refused_requests: int

    @property
    def num_lanes(self) -> int:
        return sum(self.lanes.values())
