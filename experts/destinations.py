"""Which live copy of each expert a dispatch asks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from experts.placement import ShardId


def choose_shards(copies: Mapping[int, Sequence[ShardId]], *, offset: int) -> dict[int, ShardId]:
    """expert -> the shard that gets all its rows, for experts that have at least one copy.

    All rows of an expert go to one copy: while an expert's cost is the reading of its weights, splitting its rows
    only costs. Experts without a choice are counted first; then each expert takes the copy whose shard has the
    fewest experts of this dispatch so far. offset turns ties, so that lanes prefer different copies.
    """
    chosen = {expert: shards[0] for expert, shards in copies.items() if len(shards) == 1}
    if len(chosen) == len(copies):
        return chosen
    busy = Counter(chosen.values())
    for expert, shards in copies.items():
        if len(shards) > 1:
            turn = (expert + offset) % len(shards)
            turned = (*shards[turn:], *shards[:turn])
            chosen[expert] = min(turned, key=lambda shard: busy[shard])
            busy[chosen[expert]] += 1
    return chosen
