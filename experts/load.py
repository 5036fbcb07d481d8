"""How much each expert has computed: what balancing and `status` look at."""

from __future__ import annotations

from collections.abc import Iterable

from experts.placement import Slot


class ExpertLoad:
    """Counts rows and activations per slot. One thread counts, another may add slots, any thread may read.

    An activation is one computation with at least one row: it reads the expert's weights, however few the rows. The
    table of counters is replaced whole, so a reader never meets a dict that is growing; a slot that has gone keeps its
    counters, so that numbers only grow.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        # Rows and activations of each slot.
        self._counters: dict[Slot, list[int]] = {}
        self.add_slots(slots)

    def add_slots(self, slots: Iterable[Slot]) -> None:
        """Counts these, too; those that are counted already go on."""
        known = self._counters
        self._counters = {slot: known.get(slot) or [0, 0] for slot in sorted({*known, *slots})}

    def add(self, slot: Slot, num_rows: int) -> None:
        """One computation of num_rows rows at once."""
        counter = self._counters[slot]
        counter[0] += num_rows
        counter[1] += num_rows > 0

    def snapshot(self) -> list[tuple[int, int, int]]:
        """``(layer, expert, rows)`` of every slot since the start, sorted; slots without rows included."""
        return [(slot.layer, slot.expert, counter[0]) for slot, counter in self._counters.items()]

    def activations(self) -> list[tuple[int, int, int]]:
        """``(layer, expert, activations)``, as ``snapshot`` lists rows."""
        return [(slot.layer, slot.expert, counter[1]) for slot, counter in self._counters.items()]
