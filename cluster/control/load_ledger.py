"""How often each expert has been asked for, summed over members that come and go. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
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
        return [(slot.layer, slot.expert, tokens) for slot, tokens in sorted(self._sums().items()) if tokens]

    def imbalance(self) -> dict[int, float]:
        """(max - mean) / mean of the experts' tokens, by layer, of layers that were asked for."""
        by_layer: defaultdict[int, list[int]] = defaultdict(list)
        for slot, tokens in sorted(self._sums().items()):
            by_layer[slot.layer].append(tokens)
        return {layer: max(tokens) * len(tokens) / sum(tokens) - 1 for layer, tokens in by_layer.items() if any(tokens)}

    def _sums(self) -> Counter[Slot]:
        """Of every slot that a member holds or held, 0 included."""
        sums = Counter(self._departed)
        for counter in self._by_member.values():
            sums.update(counter)
        return sums
