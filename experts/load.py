"""How many rows each expert has computed: what balancing and `status` look at."""

from __future__ import annotations

from collections.abc import Iterable

from experts.placement import Slot


class ExpertLoad:
    """Counts rows per slot. One thread adds, any thread may read.

    The slots are fixed at construction, so a reader never meets a dict that is growing.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._rows = dict.fromkeys(sorted(slots), 0)

    def add(self, slot: Slot, num_rows: int) -> None:
        self._rows[slot] += num_rows

    def snapshot(self) -> list[tuple[int, int, int]]:
        """``(layer, expert, rows)`` of every slot since the start, sorted; slots without rows included."""
        return [(slot.layer, slot.expert, rows) for slot, rows in self._rows.items()]
