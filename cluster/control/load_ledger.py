"""How often each expert has been asked for, summed over members that come and go. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cluster.control.membership import MemberId
from experts.placement import Slot


class LoadLedger:
    """Members report counters that only grow; those of a member that is gone still count."""

    def __init__(self) -> None:
        self._by_member: dict[MemberId, Counter[Slot]] = {}
        self._departed: Counter[Slot] = Counter()

    def report(self, member_id: MemberId, load: Iterable[tuple[int, int, int]]) -> None:
        """load: (layer, expert, tokens) since the member started; replaces its previous report."""
        self._by_member[member_id] = Counter({Slot(layer, expert): tokens for layer, expert, tokens in load})

    def close(self, member_id: MemberId) -> None:
        """The member reports no more."""
        self._departed.update(self._by_member.pop(member_id, Counter()))

    def totals(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of every expert that was asked for, sorted by layer and expert."""
        sums = Counter(self._departed)
        for counter in self._by_member.values():
            sums.update(counter)
        return [(slot.layer, slot.expert, tokens) for slot, tokens in sorted(sums.items()) if tokens]
