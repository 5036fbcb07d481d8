"""How far one choice has come, as its run hears it from routers."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from cluster.metrics.definitions import GATEWAY_METRICS, REQUEST_QUEUE_TIME, RESUBMISSIONS
from cluster.metrics.recorder import Recorder
from router.messages import SequenceOutput

Clock = Callable[[], float]


class Phase(StrEnum):
    """queued: in front of routers or in one, whose first step for it has not ended yet."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODING = "decoding"


class Source(Protocol):
    """Where the outputs of an attempt come from."""

    @property
    def router_id(self) -> str:
        """Empty until a router says that it has the request."""
        ...


class ChoiceProgress:
    """Belongs to the event loop; times are of ``clock``."""

    def __init__(self, recorder: Recorder | None = None, *, clock: Clock = time.monotonic) -> None:
        self._recorder = recorder or Recorder(GATEWAY_METRICS)
        self._clock = clock
        self._submitted_s: float | None = None
        self._has_begun = False
        self._source: Source | None = None
        self.attempt = -1
        self.phase = Phase.QUEUED
        self.last_news_s = clock()

    @property
    def router_id(self) -> str:
        """Who has the choice; empty until a router says so."""
        return "" if self._source is None else self._source.router_id

    def submitted(self, attempt: int, source: Source) -> None:
        """The choice has been given to the routers, for the attempt-th time from 0."""
        if self._submitted_s is None:
            self._submitted_s = self._clock()
        if attempt > 0:
            self._recorder.add(RESUBMISSIONS)
        self.attempt, self._source, self.phase = attempt, source, Phase.QUEUED

    def heard(self, output: SequenceOutput) -> None:
        """An output of the attempt that was submitted last."""
        self.last_news_s = self._clock()
        if output.token_ids:
            self.phase = Phase.DECODING
        elif self.phase is Phase.QUEUED:
            self.phase = Phase.PREFILL
        if output.since_begin_s is not None and not self._has_begun:
            self._has_begun = True
            self._observe_queue_time(output.since_begin_s)

    def _observe_queue_time(self, since_begin_s: float) -> None:
        assert self._submitted_s is not None, "what was not submitted is not heard of"
        queued_s = self.last_news_s - since_begin_s - self._submitted_s
        self._recorder.observe(REQUEST_QUEUE_TIME, max(0.0, queued_s))
