"""All requests that a gateway works on: what is told of them, and the search for those that stand still."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from itertools import islice

from cluster.control.member_report import MemberReport, OpenChoice
from cluster.front.access_log import AccessLog
from cluster.front.choice_progress import Clock
from cluster.front.errors import ServiceError
from cluster.front.generate_call import GenerateCall, Origin
from cluster.front.request_observer import RequestObserver
from cluster.metrics.definitions import GATEWAY_METRICS, OPEN_CHOICES
from cluster.metrics.recorder import Recorder
from experts.logs import fields

logger = logging.getLogger("arriero.gateway")

MAX_REPORTED = 100


class OpenRequests:
    """Belongs to the event loop. ``tick`` about once a second."""

    def __init__(
        self,
        *,
        access_log: AccessLog | None = None,
        slow_after_s: float = 0.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """slow_after_s: how long a request may stand still before the log names it; 0: for ever."""
        self._recorder = Recorder(GATEWAY_METRICS)
        self._access_log = access_log or AccessLog("off")
        self._slow_after_s = slow_after_s
        self._clock = clock
        # Oldest first, each with how long it may stand still before it is named next.
        self._patience_s: dict[RequestObserver, float] = {}

    def observe(self, call: GenerateCall) -> RequestObserver:
        """For one request, which is open until the context that this returns is left."""
        return self._observer(call.origin, call.request_id)

    def refuse(self, origin: Origin, error: ServiceError) -> None:
        """Counts and logs what did not even become a call."""
        with suppress(ServiceError), self._observer(origin, ""):
            raise error

    def tick(self) -> None:
        self._access_log.tick()
        if self._slow_after_s > 0:
            for observer in tuple(self._patience_s):
                self._name_if_slow(observer)

    @property
    def weights_versions(self) -> frozenset[int]:
        """That open requests are bound to."""
        return frozenset(choice.journal.weights_version for observer in self._patience_s for choice in observer.choices)

    def report(self) -> MemberReport:
        """What this gateway has counted, and its oldest open choices."""
        num_open = sum(observer.num_open for observer in self._patience_s)
        oldest = (choice for observer in self._patience_s for choice in observer.open_choices())
        snapshot = self._recorder.snapshot()
        snapshot.put(OPEN_CHOICES, num_open)
        return MemberReport(
            metrics=snapshot, open_choices=tuple(islice(oldest, MAX_REPORTED)), num_open_choices=num_open
        )

    def _observer(self, origin: Origin, request_id: str) -> RequestObserver:
        observer = RequestObserver(
            origin,
            request_id,
            recorder=self._recorder,
            access_log=self._access_log,
            clock=self._clock,
            on_end=self._patience_s.pop,
        )
        self._patience_s[observer] = self._slow_after_s
        return observer

    def _name_if_slow(self, observer: RequestObserver) -> None:
        """By the choice that has been standing still for longest; once for each doubling of that time."""
        slowest = max(observer.open_choices(), key=lambda choice: choice.idle_s, default=None)
        if slowest is None or slowest.idle_s < self._patience_s[observer]:
            return
        while self._patience_s[observer] <= slowest.idle_s:
            self._patience_s[observer] *= 2
        logger.warning("no progress for %.0f s", slowest.idle_s, extra=_fields(slowest, observer.num_open))


def _fields(choice: OpenChoice, num_open: int) -> dict[str, object]:
    return fields(
        request_id=choice.request_id,
        choice=choice.choice_index,
        open_choices=num_open,
        phase=choice.phase,
        router=choice.router_id or None,
        attempt=choice.attempt,
        age_s=choice.age_s,
        prompt_tokens=choice.num_prompt_tokens,
        output_tokens=choice.num_completion_tokens,
    )
