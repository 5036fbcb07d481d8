"""Whether a router's cached prefix is worth its load. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def prefix_choice(
    *, num_cached: Mapping[str, int], loads: Mapping[str, int], num_blocks: int, max_gap: float
) -> Sequence[str]:
    """The routers with the longest cached prefix among those that may have the request; none without such a prefix.

    num_cached: blocks of this prompt that each router has, of num_blocks; loads: their requests. One that has the whole
    prompt may have max_gap more requests than the least busy one, one that has a part of it that part of max_gap: what
    all prompts begin with gathers nothing.
    """
    least = min(loads.values(), default=0)
    worth = {
        router: cached
        for router, cached in num_cached.items()
        if cached and loads[router] - least <= max_gap * cached / num_blocks
    }
    longest = max(worth.values(), default=0)
    return [router for router, cached in worth.items() if cached == longest]
