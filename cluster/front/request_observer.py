"""One client request from arrival to end: what is measured of it, and what the log says when it has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from cluster.control.member_report import OpenChoice
from cluster.front.access_log import AccessEntry, AccessLog
from cluster.front.choice_progress import ChoiceProgress, Clock
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import Origin
from cluster.front.journal import ChoiceJournal, Delta
from cluster.metrics import definitions as metrics
from cluster.metrics.recorder import Recorder
from experts.logs import fields
from router.messages import FinishReason

logger = logging.getLogger("arriero.gateway")

ANSWERED = "OK"
CLIENT_LEFT = "CANCELLED"


@dataclass(slots=True, kw_only=True)
class ObservedChoice:
    """last_sent_s is None before the first token. had_ended: the client holds its end already."""

    journal: ChoiceJournal
    progress: ChoiceProgress
    num_sent: int = 0
    last_sent_s: float | None = None
    finish_reason: FinishReason | None = None
    had_ended: bool

    @property
    def has_ended(self) -> bool:
        return self.had_ended or self.finish_reason is not None


class RequestObserver:
    """Used as a context around the work on a request. Knows nothing of choices before ``accepted``.

    Leaving it by an exception that is neither a ServiceError nor a cancellation logs that one and raises
    ServiceError(INTERNAL) in its place.
    """

    def __init__(
        self,
        origin: Origin,
        request_id: str,
        *,
        recorder: Recorder,
        access_log: AccessLog,
        clock: Clock,
        on_end: Callable[[RequestObserver], object],
    ) -> None:
        """request_id: the client's, or empty."""
        self.request_id = request_id
        self.choices: tuple[ObservedChoice, ...] = ()
        self._origin = origin
        self._recorder = recorder
        self._access_log = access_log
        self._clock = clock
        self._on_end = on_end
        self._began_s = clock()
        self._num_prompt_tokens = 0
        self._first_token_s: float | None = None

    def accepted(self, request_id: str, num_prompt_tokens: int, journals: Sequence[ChoiceJournal]) -> None:
        """The request has passed all checks; its choices are about to be submitted."""
        self.request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self.choices = tuple(
            ObservedChoice(
                journal=journal,
                progress=ChoiceProgress(self._recorder, clock=self._clock),
                had_ended=journal.is_finished,
            )
            for journal in journals
        )

    @property
    def progress(self) -> list[ChoiceProgress]:
        return [choice.progress for choice in self.choices]

    def sending(self, delta: Delta) -> None:
        """The delta is on its way to the client."""
        choice = self.choices[delta.choice_index]
        if delta.token_ids:
            self._count_tokens(choice, len(delta.token_ids))
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            self._recorder.add(metrics.REQUEST_SUCCESS, 1, delta.finish_reason)

    def _count_tokens(self, choice: ObservedChoice, num_tokens: int) -> None:
        now = self._clock()
        if self._first_token_s is None:
            self._first_token_s = now
            self._recorder.observe(metrics.TIME_TO_FIRST_TOKEN, now - self._began_s)
            self._recorder.add(metrics.PROMPT_TOKENS, self._num_prompt_tokens)
        if choice.last_sent_s is not None:
            self._recorder.observe(metrics.INTER_TOKEN_LATENCY, (now - choice.last_sent_s) / num_tokens, num_tokens)
        elif num_tokens > 1:
            # They came together: between them the client waited for nothing.
            self._recorder.observe(metrics.INTER_TOKEN_LATENCY, 0.0, num_tokens - 1)
        self._recorder.add(metrics.GENERATION_TOKENS, num_tokens)
        choice.num_sent += num_tokens
        choice.last_sent_s = now

    @property
    def num_open(self) -> int:
        return sum(not choice.journal.is_finished for choice in self.choices)

    def open_choices(self) -> list[OpenChoice]:
        """Those that have not ended, as of now."""
        now = self._clock()
        return [self._describe(choice, now) for choice in self.choices if not choice.journal.is_finished]

    def _describe(self, choice: ObservedChoice, now: float) -> OpenChoice:
        return OpenChoice(
            request_id=self.request_id,
            choice_index=choice.journal.choice_index,
            router_id=choice.progress.router_id,
            attempt=choice.progress.attempt,
            phase=choice.progress.phase,
            age_s=now - self._began_s,
            idle_s=now - choice.progress.last_news_s,
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=choice.journal.num_completion_tokens,
        )

    def __enter__(self) -> RequestObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._on_end(self)
        match error:
            case None:
                self._end(ANSWERED)
            case ServiceError():
                self._end(error.code)
            case asyncio.CancelledError() | GeneratorExit():
                self._end(ANSWERED if self._is_whole else CLIENT_LEFT)
            case Exception():
                logger.error("a request failed", exc_info=error, extra=fields(request_id=self.request_id))
                self._end(StatusCode.INTERNAL)
                raise ServiceError(StatusCode.INTERNAL, "internal error") from None

    @property
    def _is_whole(self) -> bool:
        """Whether every choice has ended; a client may leave with the last message, before we do."""
        return bool(self.choices) and all(choice.has_ended for choice in self.choices)

    def _end(self, status: str) -> None:
        total_s = self._clock() - self._began_s
        if status == ANSWERED:
            self._recorder.observe(metrics.REQUEST_LATENCY, total_s)
            self._recorder.observe(metrics.REQUEST_PROMPT_TOKENS, self._num_prompt_tokens)
            for choice in self.choices:
                self._recorder.observe(metrics.REQUEST_GENERATION_TOKENS, choice.num_sent)
        elif status == CLIENT_LEFT:
            num_open = sum(not choice.has_ended for choice in self.choices)
            self._recorder.add(metrics.REQUEST_SUCCESS, num_open, FinishReason.ABORT)
        else:
            self._recorder.add(metrics.REQUEST_ERRORS, 1, status)
        self._access_log.write(self._entry(status, total_s))

    def _entry(self, status: str, total_s: float) -> AccessEntry:
        reasons = sorted({choice.finish_reason for choice in self.choices if choice.finish_reason is not None})
        return AccessEntry(
            origin=self._origin,
            request_id=self.request_id,
            status=status,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self.choices[0].journal.num_cached_tokens if self.choices else 0,
            num_output_tokens=sum(choice.num_sent for choice in self.choices),
            first_token_s=None if self._first_token_s is None else self._first_token_s - self._began_s,
            total_s=total_s,
            finish_reasons=tuple(reasons),
        )
