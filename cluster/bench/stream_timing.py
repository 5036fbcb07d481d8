"""What a client saw of one streamed answer, and many of them as a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.bench.rows import Row
from cluster.bench.summary import percentile


@dataclass(slots=True, kw_only=True)
class StreamTiming:
    """Seconds of one clock. due_s: when the request was to leave; a client that lags behind makes nothing look better.
    messages: when each came, and how many tokens it brought. error: why the answer is not whole."""

    due_s: float
    sent_s: float = 0.0
    messages: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(count for _at_s, count in self.messages)

    @property
    def time_to_first_s(self) -> float:
        """Of an answer with at least one token."""
        return self.messages[0][0] - self.due_s

    @property
    def time_per_token_s(self) -> float | None:
        """Mean time between two tokens; None where there are less than two."""
        num_later = self.num_tokens - self.messages[0][1]
        return (self.messages[-1][0] - self.messages[0][0]) / num_later if num_later else None

    @property
    def longest_gap_s(self) -> float:
        """Between two messages; 0 for a single one."""
        times = [at_s for at_s, _count in self.messages]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What makes an answer a good one."""

    time_to_first_s: float
    time_per_token_s: float

    def is_met(self, timing: StreamTiming) -> bool:
        if timing.error is not None or not timing.messages:
            return False
        per_token_s = timing.time_per_token_s
        return timing.time_to_first_s <= self.time_to_first_s and (
            per_token_s is None or per_token_s <= self.time_per_token_s
        )


def summarize(timings: Sequence[StreamTiming], goal: Goal) -> Row:
    """Rates are over the time from the first due request to the last message. Raises ValueError for no timings."""
    whole = [timing for timing in timings if timing.error is None and timing.messages]
    ends = [timing.messages[-1][0] for timing in timings if timing.messages]
    begin_s = min(timing.due_s for timing in timings)
    duration_s = max(ends, default=begin_s) - begin_s
    row: Row = {
        "requests": len(timings),
        "errors": len(timings) - len(whole),
        "duration_s": round(duration_s, 3),
        **_spread("ttft", [timing.time_to_first_s for timing in whole]),
        **_spread("tpot", [each for timing in whole if (each := timing.time_per_token_s) is not None]),
        **_spread("longest_gap", [timing.longest_gap_s for timing in whole]),
        "late_p99_ms": round(percentile([timing.sent_s - timing.due_s for timing in timings], 99) * 1e3, 2),
        "num_samples": len(whole),
    }
    if duration_s > 0:
        num_good = sum(goal.is_met(timing) for timing in timings)
        row |= {
            "requests_per_s": round(len(whole) / duration_s, 3),
            "goodput_per_s": round(num_good / duration_s, 3),
            "tokens_per_s": round(sum(timing.num_tokens for timing in timings) / duration_s, 1),
        }
    first_error = next((timing.error for timing in timings if timing.error is not None), None)
    return row if first_error is None else row | {"first_error": first_error}


def _spread(name: str, seconds: Sequence[float]) -> Row:
    if not seconds:
        return {}
    return {f"{name}_p{percent}_ms": round(percentile(seconds, percent) * 1e3, 2) for percent in (50, 90, 99)}
