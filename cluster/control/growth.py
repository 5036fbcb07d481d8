"""How the number of shards stands to the load, as an operator hears it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.balance.autoscaler import Trend


class GrowthState(StrEnum):
    """OFF: the number is the operator's alone. WAITS: another change is under way, or too little is known."""

    OFF = "off"
    STEADY = "steady"
    TOO_BUSY = "too_busy"
    TOO_IDLE = "too_idle"
    WAITS = "waits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How the number of shards stands. busy: None while it is not known."""

    state: GrowthState
    least: int
    most: int
    busy: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As `arriero status --json` prints it; least and most are equal where nothing changes by itself."""
        busy = None if self.busy is None else round(self.busy, 3)
        return {"state": self.state.value, "least": self.least, "most": self.most, "busy": busy, "why": self.why}


def told(trend: Trend, busy: float | None, unrest: str | None) -> tuple[GrowthState, str]:
    """State and reason for an operator."""
    if unrest is not None:
        return GrowthState.WAITS, unrest
    if busy is None:
        return GrowthState.WAITS, "it is not known yet how busy the shards are"
    if trend.too_busy_since_s is not None:
        return GrowthState.TOO_BUSY, "busier than shard_busy_target: one more after shard_up_delay_s"
    if trend.too_idle_since_s is not None:
        return GrowthState.TOO_IDLE, "one fewer would do, with a sixth to spare: it goes after shard_down_delay_s"
    return GrowthState.STEADY, "as many as the load asks for, within bounds"
