"""Sequences that wait for an expert which no living shard has (policy ``wait``): parked until another epoch is there.

A parked sequence is as it was before the step that missed the expert, so that trying again is all there is to do.
Its time runs from the first miss to the next token it computes: an epoch that does not help gives it none anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.sequence import Sequence


@dataclass(slots=True, kw_only=True)
class _Stay:
    """reason: who was missed, as of the last miss."""

    since_s: float
    reason: str


class Parking:
    def __init__(self, *, max_wait_s: float, clock: Callable[[], float]) -> None:
        """clock is in seconds."""
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._stays: dict[Sequence, _Stay] = {}
        self._num_parked = 0

    @property
    def num_parked(self) -> int:
        return self._num_parked

    @property
    def has_overdue(self) -> bool:
        return any(self._is_overdue(sequence, stay) for sequence, stay in self._stays.items())

    def park(self, sequence: Sequence, reason: str) -> None:
        """The sequence has missed an expert in this step and is to be left alone."""
        stay = self._stays.setdefault(sequence, _Stay(since_s=self._clock(), reason=reason))
        stay.reason = reason
        self._set(sequence, parked=True)

    def resume_all(self) -> None:
        """What was missing may be there: everyone may try again."""
        for sequence in self._stays:
            self._set(sequence, parked=False)

    def leave(self, sequence: Sequence) -> None:
        """The sequence has moved on, or has ended. One that never waited is no error."""
        if self._stays.pop(sequence, None) is not None:
            self._set(sequence, parked=False)

    def overdue(self) -> list[tuple[Sequence, str]]:
        """Parked sequences whose time is over, each with whom it waited for."""
        return [(sequence, stay.reason) for sequence, stay in self._stays.items() if self._is_overdue(sequence, stay)]

    def _is_overdue(self, sequence: Sequence, stay: _Stay) -> bool:
        return sequence.parked and self._clock() - stay.since_s >= self._max_wait_s

    def _set(self, sequence: Sequence, *, parked: bool) -> None:
        self._num_parked += parked - sequence.parked
        sequence.parked = parked
