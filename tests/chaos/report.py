"""What a run of scenarios comes to: a table for people, JSON for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from holdings import Holdings

from chaos.arena import Outcome

HEADER = ("FAULT", "FIRED", "STREAMS HIT", "PAUSE MEDIAN", "P99", "MAX", "WHOLE MEDIAN", "STREAMS", "LOST", "WRONG")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each scenario; the longest pause of a stream is of each fault, its quantiles over faults."""
    names = list(dict.fromkeys(outcome.scenario.name for outcome in outcomes))
    rows = [_row(name, [outcome for outcome in outcomes if outcome.scenario.name == name]) for name in names]
    return _align([HEADER, *rows])


def memory_table(start: Mapping[str, Holdings], end: Mapping[str, Holdings]) -> str:
    """Of all processes that were there at either moment, in order of their names."""
    rows = [("PROCESS", "MIB AT START", "AT END", "DESCRIPTORS AT START", "AT END")]
    for name in sorted(start.keys() | end.keys()):
        both = (start.get(name), end.get(name))
        memory = tuple("-" if each is None else f"{each.memory_bytes / 2**20:.0f}" for each in both)
        fds = tuple("-" if each is None else str(each.num_fds) for each in both)
        rows.append((name, *memory, *fds))
    return _align(rows)


def to_json(
    outcomes: Sequence[Outcome], held: Sequence[tuple[float, Mapping[str, Holdings]]], **about: Any
) -> dict[str, Any]:
    """held: seconds since the start, and what processes held then, between scenarios."""
    return {
        **about,
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "held": [{"at_s": at_s, **{name: asdict(each) for name, each in some.items()}} for at_s, some in held],
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share q of all does not exceed. Raises IndexError for none."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def _row(name: str, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    injuries = [injury for outcome in outcomes for injury in outcome.injuries]
    pauses = [injury.longest_pause_s for injury in injuries]
    times = [injury.healed_s - injury.at_s for injury in injuries]
    shown = [f"{quantile(pauses, q):.2f} s" if pauses else "-" for q in (0.5, 0.99, 1.0)]
    counts = (sum(outcome.num_streams for outcome in outcomes), _num("lost", outcomes), _num("wrong", outcomes))
    hit = str(sum(len(injury.hit) for injury in injuries))
    whole = f"{quantile(times, 0.5):.1f} s" if times else "-"
    return (name, str(len(injuries)), hit, *shown, whole, *map(str, counts))


def _num(field: str, outcomes: Sequence[Outcome]) -> int:
    return sum(len(getattr(outcome, field)) for outcome in outcomes)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
