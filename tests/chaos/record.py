"""What was seen of streams and of faults while they ran."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class StreamRecord:
    """Written by the thread that reads the stream. Times are of one monotonic clock.

    arrivals_s: of each message. num_finishes: messages that say that the stream is over. error: what the client raised
    instead of an orderly end.
    """

    request_id: str
    ask: int
    opened_s: float
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    num_finishes: int = 0
    is_degraded: bool = False
    error: str | None = None
    ended_s: float | None = None

    def moved_on_since(self, at_s: float) -> bool:
        return self.ended_s is not None or (bool(self.arrivals_s) and self.arrivals_s[-1] > at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Injury:
    """A fault that did fire. victims: member ids. hit: request ids of the live streams that had to do with the victim;
    num_open: of all live ones."""

    scenario: str
    victims: tuple[str, ...]
    at_s: float
    healed_s: float
    hit: tuple[str, ...]
    num_open: int
    longest_pause_s: float

    @property
    def sentence(self) -> str:
        victims = ", ".join(self.victims) or "all connections"
        return (
            f"{self.scenario} of {victims}: hit {len(self.hit)} of {self.num_open} streams, "
            f"longest pause {self.longest_pause_s:.2f} s, whole after {self.healed_s - self.at_s:.1f} s"
        )
