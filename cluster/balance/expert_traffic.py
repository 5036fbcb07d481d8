"""What was asked of each expert in a stretch of time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from experts.placement import Slot


class SlotTraffic(NamedTuple):
    """rows: routed rows computed. activations: how often the expert was computed, each time reading its weights."""

    rows: int
    activations: int

    def plus(self, other: SlotTraffic) -> SlotTraffic:
        return SlotTraffic(self.rows + other.rows, self.activations + other.activations)

    def minus(self, other: SlotTraffic) -> SlotTraffic:
        return SlotTraffic(self.rows - other.rows, self.activations - other.activations)


NO_TRAFFIC = SlotTraffic(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTraffic:
    """Of all shards together, over span_s seconds. Slots that are not named had none.

    Raises ValueError for traffic in no time.
    """

    span_s: float
    by_slot: Mapping[Slot, SlotTraffic]

    def __post_init__(self) -> None:
        if self.by_slot and not self.span_s > 0:
            raise ValueError(f"span_s must be positive, got {self.span_s}")

    def of(self, slot: Slot) -> SlotTraffic:
        return self.by_slot.get(slot, NO_TRAFFIC)
