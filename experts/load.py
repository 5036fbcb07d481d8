"""How many rows each expert has computed: what balancing and `status` look at."""

from __future__ import annotations

from collections.abc import Iterable

from experts.placement import Slot


class ExpertLoad:
    """Counts rows per slot. One thread counts, another may add slots, any thread may read.

    The table of counters is replaced whole, so a reader never meets a dict that is growing; a slot that has gone
    keeps its counter, so that numbers only grow.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._rows: dict[Slot, list[int]] = {}
        self.add_slots(slots)

    def add_slots(self, slots: Iterable[Slot]) -> None:
        """Counts these, too; those that are counted already go on."""
        known = self._rows
        self._rows = {slot: known.get(slot) or [0] for slot in sorted({*known, *slots})}

    def add(self, slot: Slot, num_rows: int) -> None:
        self._rows[slot][0] += num_rows

    def snapshot(self) -> list[tuple[int, int, int]]:
        """``(layer, expert, rows)`` of every slot since the start, sorted; slots without rows included."""
        return [(slot.layer, slot.expert, counter[0]) for slot, counter in self._rows.items()]
