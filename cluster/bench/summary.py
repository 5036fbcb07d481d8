"""Many measurements as few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy has it. Raises ValueError for no values or a percent outside
    0..100."""
    if not values:
        raise ValueError("values is empty: nothing was measured")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The columns that every timed row has, in milliseconds. Raises ValueError for no values."""
    percents = {"p50_ms": 50, "p10_ms": 10, "p90_ms": 90, "min_ms": 0}
    return {name: round(percentile(seconds, percent) * 1e3, 4) for name, percent in percents.items()}
