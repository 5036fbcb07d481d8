"""When the requests of an open-loop load arrive: at random, whatever has become of the ones before."""

from __future__ import annotations

import random


def poisson_arrivals(*, rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start, ascending, of so many arrivals at this mean rate per second; the first is not at 0.

    Raises ValueError for a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"rate must be positive, got {rate}")
    rng = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times
