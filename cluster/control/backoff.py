"""How long to leave something alone that has failed: one second, then twice as long each time, to half a minute."""

from __future__ import annotations

FIRST_S = 1.0
LONGEST_S = 30.0


class Backoff:
    def __init__(self) -> None:
        self._num_failures = 0
        self._until_s = float("-inf")

    def fail(self, now_s: float) -> float:
        """Returns until when to wait."""
        self._until_s = now_s + min(LONGEST_S, FIRST_S * 2.0 ** min(self._num_failures, 30))
        self._num_failures += 1
        return self._until_s

    def succeed(self) -> None:
        self._num_failures = 0
        self._until_s = float("-inf")

    def is_over(self, now_s: float) -> bool:
        return now_s >= self._until_s
