"""One line for each request that has ended; under load one for many of them, never none."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.front.generate_call import Origin
from experts.logs import fields

logger = logging.getLogger("arriero.access")

# From more lines in one second on, until a period has fewer than that each second.
MAX_LINES_PER_S = 20
SUMMARY_PERIOD_S = 10.0

AccessLogMode = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessEntry:
    """One request. status: the code that the client saw, OK, or CANCELLED when it left. first_token_s: None when no
    token was sent."""

    origin: Origin
    request_id: str
    status: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    first_token_s: float | None
    total_s: float
    finish_reasons: tuple[str, ...]

    def fields(self) -> dict[str, object]:
        """By the names that they have in the log."""
        return {
            "protocol": self.origin.protocol,
            "method": self.origin.method,
            "request_id": self.request_id or None,
            "status": self.status,
            "finish_reason": ",".join(self.finish_reasons) or None,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
        }


class AccessLog:
    """auto: a line for each request while they are few, else a summary every SUMMARY_PERIOD_S, said beforehand."""

    def __init__(self, mode: AccessLogMode = "auto", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._mode = mode
        self._clock = clock
        self._second_began_s = clock()
        self._num_in_second = 0
        self._summary: _Summary | None = None

    def write(self, entry: AccessEntry) -> None:
        if self._mode == "off":
            return
        self.tick()
        if self._summary is None and self._mode == "auto" and self._is_too_many():
            logger.info("more than %d requests/s: from now on a summary every %g s", MAX_LINES_PER_S, SUMMARY_PERIOD_S)
            self._summary = _Summary(self._clock())
        if self._summary is None:
            logger.info("request", extra=fields(**entry.fields()))
        else:
            self._summary.add(entry)

    def tick(self) -> None:
        """Writes the summary when it is due. To be called about once a second, also without requests."""
        if self._summary is None or self._clock() < self._summary.began_s + SUMMARY_PERIOD_S:
            return
        ended_s = self._clock()
        self._summary.write(ended_s)
        is_calm = self._summary.num_requests <= MAX_LINES_PER_S * (ended_s - self._summary.began_s)
        self._summary = None if is_calm else _Summary(ended_s)
        if is_calm:
            self._second_began_s, self._num_in_second = ended_s, 0
            logger.info("fewer requests again: from now on a line for each")

    def _is_too_many(self) -> bool:
        now = self._clock()
        if now >= self._second_began_s + 1.0:
            self._second_began_s, self._num_in_second = now, 0
        self._num_in_second += 1
        return self._num_in_second > MAX_LINES_PER_S


class _Summary:
    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self._statuses: Counter[str] = Counter()
        self._num_tokens: Counter[str] = Counter()
        self._first_token_s: list[float] = []

    @property
    def num_requests(self) -> int:
        return self._statuses.total()

    def add(self, entry: AccessEntry) -> None:
        self._statuses[entry.status] += 1
        self._num_tokens["prompt"] += entry.num_prompt_tokens
        self._num_tokens["output"] += entry.num_output_tokens
        if entry.first_token_s is not None:
            self._first_token_s.append(entry.first_token_s)

    def write(self, ended_s: float) -> None:
        first = sorted(self._first_token_s)
        logger.info(
            "requests",
            extra=fields(
                period_s=ended_s - self.began_s,
                requests=self.num_requests,
                **{f"status_{status}": count for status, count in sorted(self._statuses.items())},
                prompt_tokens=self._num_tokens["prompt"],
                output_tokens=self._num_tokens["output"],
                median_first_token_s=first[len(first) // 2] if first else None,
                max_first_token_s=first[-1] if first else None,
            ),
        )
