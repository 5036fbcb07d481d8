"""In which order routers are asked to take a request. Plain; router_choice.py is Serve's side of it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from cluster.balance.prefix_choice import prefix_choice
from cluster.front.prefix_index import PrefixIndex, split_keys


class RouterRanks:
    """Belongs to one event loop."""

    def __init__(self, *, max_gap: int, max_blocks: int) -> None:
        """max_gap: see prefix_choice; 0: prefixes do not count. max_blocks: of each router's prefix cache."""
        self._max_gap = max_gap
        self._index = PrefixIndex(max_blocks)
        self._loads: dict[str, int] = {}

    def ranks(
        self, loads: Mapping[str, int | None], *, shunned: Collection[str] = (), prefix: bytes = b""
    ) -> list[list[str]]:
        """One router of each rank is asked, the less busy first; the next rank where all of one are full.

        loads: of all routers there are; None where nothing was heard lately, so that the last word counts. prefix: see
        prefix_keys. Those with the longest prefix come first, then two drawn at random; shunned ones only where there
        are no others.
        """
        self._learn(loads)
        eligible = [router for router in loads if router not in shunned] or list(loads)
        pair = random.sample(eligible, min(2, len(eligible)))
        preferred = self._preferred(eligible, split_keys(prefix))
        return [list(preferred), pair] if preferred else [pair]

    def note_routed(self, router: str, prefix: bytes) -> None:
        """The router has taken a request with this prefix."""
        if self._max_gap:
            self._index.note(router, split_keys(prefix))

    def _learn(self, loads: Mapping[str, int | None]) -> None:
        self._index.keep(loads.keys())
        self._loads = {router: self._loads.get(router, 0) if load is None else load for router, load in loads.items()}

    def _preferred(self, eligible: Sequence[str], keys: Sequence[bytes]) -> Sequence[str]:
        if not keys or len(eligible) < 2:
            return []
        return prefix_choice(
            num_cached={router: self._index.num_cached(router, keys) for router in eligible},
            loads={router: self._loads[router] for router in eligible},
            num_blocks=len(keys),
            max_gap=self._max_gap,
        )
