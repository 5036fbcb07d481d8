"""Which rows of a region are in use. Pure."""

from __future__ import annotations

from bisect import bisect_left


class RowSpace:
    """Hands out runs of rows, always the lowest that fit: what is used often stays small, and warm in the cache."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        # Sorted and disjoint.
        self._runs: list[tuple[int, int]] = []

    @property
    def end(self) -> int:
        """Behind the last row in use; 0 when all are free."""
        return self._runs[-1][1] if self._runs else 0

    def take(self, num_rows: int) -> int | None:
        """The first of num_rows (at least 1) rows, from now on in use; None when there is no such run."""
        start = 0
        for index, (run_start, run_stop) in enumerate(self._runs):
            if run_start - start >= num_rows:
                self._runs.insert(index, (start, start + num_rows))
                return start
            start = run_stop
        if self._num_rows - start < num_rows:
            return None
        self._runs.append((start, start + num_rows))
        return start

    def give_back(self, start: int) -> None:
        """The run that ``take`` returned start for is free again."""
        index = bisect_left(self._runs, (start,))
        assert self._runs[index][0] == start, f"no run starts at {start}: {self._runs}"
        del self._runs[index]
