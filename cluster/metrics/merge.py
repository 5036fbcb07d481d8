"""From the numbers of single processes to those of the service. Pure.

gateway   {prompt_tokens: 5}   --+
gateway   {prompt_tokens: 7}   --+-->  prompt_tokens 5 + 7 + departed 100
departed  {prompt_tokens: 100} --+
router-a  {num_requests_running: 2}  -->  num_requests_running{member="router-a"} 2
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.metrics.definitions import METRICS, Kind
from cluster.metrics.snapshot import Snapshot, add_up

_SUMMED = tuple(metric for metric in METRICS if not metric.per_member)
_PER_MEMBER = tuple(metric for metric in METRICS if metric.per_member)
# What a process leaves behind when it goes.
LASTING = tuple(metric for metric in _SUMMED if metric.kind is not Kind.GAUGE)


class ServiceNumbers(msgspec.Struct):
    """living: of each process that lives, by its member id. departed: LASTING metrics of those that are gone."""

    living: dict[str, Snapshot]
    departed: Snapshot


def with_departed(departed: Snapshot, gone: Snapshot) -> Snapshot:
    """Departed totals that count one process more."""
    return add_up([departed, gone], LASTING)


def merge(numbers: ServiceNumbers) -> Snapshot:
    """Sums, and beside them one series per member (its id is the first label) of the metrics that are kept apart."""
    merged = add_up([numbers.departed, *numbers.living.values()], _SUMMED)
    merged.numbers |= _by_member(numbers.living)
    return merged


def _by_member(living: Mapping[str, Snapshot]) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for metric in _PER_MEMBER:
        for member_id, snapshot in living.items():
            for labels, value in snapshot.numbers.get(metric.name, {}).items():
                found.setdefault(metric.name, {})[member_id, *labels] = value
    return found
