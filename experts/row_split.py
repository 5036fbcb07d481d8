"""Which copies of each expert a dispatch asks, and for how many rows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experts.placement import ShardId

# Fewer rows than this cost a shard the reading of the weights, whether they are few or fewer (measured on CPUs, where
# computing 10 to 20 rows takes as long as reading the weights once).
MIN_PART_ROWS = 32


class RowPart(NamedTuple):
    """num_rows of an expert's rows go to shard_id; the parts of an expert follow one another."""

    shard_id: ShardId
    num_rows: int


def split_rows(
    rows: Mapping[int, int], copies: Mapping[int, Sequence[ShardId]], *, offset: int, min_part_rows: int = MIN_PART_ROWS
) -> dict[int, tuple[RowPart, ...]]:
    """expert -> who computes its rows, for experts that have a copy. rows: of each expert, at least one.

    An expert with few rows costs the reading of its weights, wherever that is done, so all of them go to one copy:
    splitting would only cost. One with at least two parts of min_part_rows costs what it has rows, and is split so
    that its shards come out even. Experts without a choice are counted first, then those with few rows in turn to
    the copy whose shard has the least to do, then those with many. offset turns ties, so that lanes prefer different
    copies.
    """
    load: dict[ShardId, int] = {}
    parts: dict[int, tuple[RowPart, ...]] = {}
    for expert in sorted(rows, key=lambda expert: _rank(expert, rows[expert], copies[expert], min_part_rows)):
        shards = copies[expert]
        if not shards:
            continue
        turn = (expert + offset) % len(shards)
        turned = (*shards[turn:], *shards[:turn])
        at_most = max(1, rows[expert] // min_part_rows)
        emptiest = sorted(turned, key=lambda shard: load.get(shard, 0))[:at_most]
        parts[expert] = _level(rows[expert], emptiest, load, min_part_rows)
        for part in parts[expert]:
            load[part.shard_id] = load.get(part.shard_id, 0) + max(part.num_rows, min_part_rows)
    return parts


def _rank(expert: int, num_rows: int, shards: Sequence[ShardId], min_part_rows: int) -> tuple[bool, bool]:
    return len(shards) > 1, num_rows >= 2 * min_part_rows


def _level(
    num_rows: int, emptiest: Sequence[ShardId], load: Mapping[ShardId, int], min_part_rows: int
) -> tuple[RowPart, ...]:
    """Fills the shards up to one level. emptiest: by what they have to do already, least first. A shard that would
    get less than min_part_rows gets none."""
    for count in range(len(emptiest), 0, -1):
        shards = emptiest[:count]
        total = num_rows + sum(load.get(shard, 0) for shard in shards)
        levels = [total * (index + 1) // count - total * index // count for index in range(count)]
        shares = [level - load.get(shard, 0) for level, shard in zip(levels, shards, strict=True)]
        if count == 1 or min(shares) >= min_part_rows:
            return tuple(RowPart(shard, share) for shard, share in zip(shards, shares, strict=True))
    raise AssertionError("a shard by itself always takes all rows")
