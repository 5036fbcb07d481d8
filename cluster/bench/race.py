"""Contestants that take turns, so that the moods of the machine hit all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

from cluster.bench.child import ChildError
from cluster.bench.contestant import Contestant, Timing
from cluster.bench.rows import Row


class NumberedAct(Protocol):
    def __call__(self, contestant: Contestant, /, *, number: int) -> Timing: ...


class Race:
    """absences: a row for each contestant that could not start or that failed and has left the race."""

    def __init__(self) -> None:
        self.absences: list[Row] = []
        self.versions: dict[str, str] = {}
        self._contestants: list[Contestant] = []
        self._first = 0

    def join(self, name: str, start: Callable[[], Contestant]) -> None:
        """Starts the contestant and puts it to sleep. One that cannot start is told in a row."""
        try:
            contestant = start()
        except (ChildError, OSError) as error:
            self.miss(name, str(error))
            return
        contestant.pause()
        self.versions[name] = contestant.version
        self._contestants.append(contestant)

    def miss(self, name: str, reason: str) -> None:
        print(f"arriero bench: without {name}: {reason}", file=sys.stderr)
        self.absences.append({"bench": "engine", "contestant": name, "absent": reason})

    def each(self, act: Callable[[Contestant], Timing]) -> list[tuple[Contestant, Timing]]:
        """Everyone acts, one after the other, all others stopped; who begins changes from call to call."""
        self._first += 1
        start = self._first % max(1, len(self._contestants))
        results = []
        for contestant in [*self._contestants[start:], *self._contestants[:start]]:
            try:
                with contestant.awake():
                    results.append((contestant, act(contestant)))
            except ChildError as error:
                self._contestants.remove(contestant)
                self.miss(contestant.name, str(error))
        return results

    def rounds(self, count: int, act: NumberedAct) -> list[tuple[Contestant, Timing]]:
        """``act(contestant, number=round)`` of everyone ``count`` times, added up, in the order of joining."""
        timings = {contestant.name: Timing() for contestant in self._contestants}
        for index in range(count):
            for contestant, timing in self.each(partial(act, number=index)):
                timings[contestant.name].add(timing)
        return [(contestant, timings[contestant.name]) for contestant in self._contestants]
