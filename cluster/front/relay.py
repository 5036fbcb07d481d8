"""From routers to one client: submits the choices of a request, follows them through the loss of routers, and
hands their tokens on at the pace the client was promised. Plain: routers and token path are protocols.

    ChoiceRun 0 --\\
    ChoiceRun 1 ----> Outbox --> Relay.batches() --> the client's stream
    ChoiceRun 2 --/
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.front.choice_progress import ChoiceProgress
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.journal import ChoiceJournal, Delta
from cluster.front.outbox import Outbox
from cluster.front.token_stream import StreamBrokenError, TokenStream
from router.choice_id import log_fields
from router.messages import ErrorCode, FinishReason, GenerateRequest, SequenceOutput

logger = logging.getLogger("arriero.gateway")

# The end of a request and its last tokens take different ways: how long one waits for the other.
LAST_TOKENS_TIMEOUT_S = 5.0
FIRST_RETRY_S = 0.05
MAX_RETRY_S = 1.0


class RouterLostError(Exception):
    """The router, or the way to it, is gone; the request can be submitted to another. The message says why."""


class QueueFullError(Exception):
    """Every router is busy and the queue before them is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnd:
    """What a router says when a request has ended with it. error is set where finish_reason is ERROR, and for an
    ABORT that nobody had asked for."""

    finish_reason: FinishReason
    error: str | None = None
    error_code: ErrorCode | None = None


class Routers(Protocol):
    async def generate(self, request: GenerateRequest) -> CallEnd:
        """Returns when the request has ended with its router; cancelling aborts it there.

        Raises RouterLostError, QueueFullError, ServiceError.
        """
        ...


class TokenPath(Protocol):
    """What a relay needs of cluster.front.token_listener.TokenListener."""

    @property
    def address(self) -> str:
        """Where routers send tokens: host:port."""
        ...

    def open(self, request_id: str, attempt: int) -> TokenStream: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """stream_interval_s: the least time between two messages after the first. resubmit_timeout_s: how long a
    lost router is replaced before the request fails."""

    stream_interval_s: float
    resubmit_timeout_s: float


class ChoiceRun:
    """One choice from submission to end, over as many attempts as it takes."""

    def __init__(
        self,
        journal: ChoiceJournal,
        *,
        progress: ChoiceProgress,
        routers: Routers,
        tokens: TokenPath,
        outbox: Outbox,
        limits: RelayLimits,
    ) -> None:
        self.journal = journal
        self._progress = progress
        self._routers = routers
        self._tokens = tokens
        self._outbox = outbox
        self._limits = limits

    async def run(self) -> None:
        """Raises ServiceError when the choice cannot be brought to its end."""
        end = self.journal.take_untold_end()
        if end is not None:
            self._outbox.put(end)
        deadline: float | None = None
        retry_s = FIRST_RETRY_S
        while not self.journal.is_finished:
            num_tokens = self.journal.num_completion_tokens
            try:
                await self._attempt()
            except (RouterLostError, QueueFullError) as error:
                now = asyncio.get_running_loop().time()
                if self.journal.num_completion_tokens > num_tokens:
                    deadline, retry_s = None, FIRST_RETRY_S
                deadline = self._deadline(deadline, now, error)
                logger.warning("attempt %d failed: %s", self.journal.attempt, error, extra=self._log_fields())
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
                retry_s = min(2 * retry_s, MAX_RETRY_S)

    def _log_fields(self) -> dict[str, Any]:
        return log_fields(self.journal.engine_id, router=self._progress.router_id or None)

    def _deadline(self, deadline: float | None, now: float, error: Exception) -> float:
        """A full queue refuses a request at its start; one that is already running waits for its turn."""
        if isinstance(error, QueueFullError) and self.journal.attempt == 0:
            raise ServiceError(StatusCode.RESOURCE_EXHAUSTED, "the queue is full: try again later") from None
        if deadline is not None and now > deadline:
            raise ServiceError(StatusCode.UNAVAILABLE, "no router can go on with this request: try again") from None
        return now + self._limits.resubmit_timeout_s if deadline is None else deadline

    async def _attempt(self) -> None:
        request = self.journal.submit(self._tokens.address)
        with self._tokens.open(request.request_id, request.attempt) as stream:
            self._progress.submitted(request.attempt, stream)
            call = asyncio.create_task(self._routers.generate(request))
            call.add_done_callback(lambda call: _end_stream(stream, call))
            try:
                await self._follow(stream, call)
            except BaseException:
                # However this attempt failed, its router must not go on with it.
                call.cancel()
                await asyncio.wait([call])
                raise
        # The call returns about now, nobody needs to wait for that. After a stop string it does so because closing the
        # stream has told the router.
        asyncio.get_running_loop().call_later(LAST_TOKENS_TIMEOUT_S, call.cancel)

    async def _follow(self, stream: TokenStream, call: asyncio.Task[CallEnd]) -> None:
        """To the end of the choice. Raises what the call raised, where that is why no more tokens come."""
        try:
            async for output in stream:
                self._progress.heard(output)
                self._accept(output)
                if self.journal.is_finished:
                    return
        except StreamBrokenError as error:
            if call.done():
                self._check_end(call.result())
            raise RouterLostError(str(error)) from None

    def _accept(self, output: SequenceOutput) -> None:
        match output.finish_reason:
            case FinishReason.ERROR:
                raise self._service_error(output.error_code, output.error)
            case FinishReason.ABORT:
                raise RouterLostError(output.error or "the router gave the request up")
        delta = self.journal.accept(output)
        # The first step of a long prompt brings nothing that a client waits for.
        if delta is not None and (delta.token_ids or delta.finish_reason is not None):
            self._outbox.put(delta)

    def _check_end(self, end: CallEnd) -> None:
        match end.finish_reason:
            case FinishReason.ERROR:
                raise self._service_error(end.error_code, end.error)
            case FinishReason.ABORT:
                raise RouterLostError(end.error or "the router gave the request up")

    def _service_error(self, code: ErrorCode | None, message: str | None) -> ServiceError:
        if code is None or code is ErrorCode.INTERNAL:
            logger.error("its router failed the request: %s", message, extra=self._log_fields())
            return ServiceError(StatusCode.INTERNAL, "internal error")
        return ServiceError(StatusCode(code.value), message or code.value)


class Relay:
    """All choices of one request."""

    def __init__(
        self,
        journals: Sequence[ChoiceJournal],
        *,
        routers: Routers,
        tokens: TokenPath,
        limits: RelayLimits,
        progress: Sequence[ChoiceProgress] | None = None,
    ) -> None:
        """progress: what each choice's run is to tell of itself."""
        self._outbox = Outbox()
        self._limits = limits
        self._runs = [
            ChoiceRun(journal, progress=each, routers=routers, tokens=tokens, outbox=self._outbox, limits=limits)
            for journal, each in zip(journals, progress or [ChoiceProgress() for _ in journals], strict=True)
        ]

    async def batches(self) -> AsyncGenerator[list[Delta]]:
        """News, at most one Delta per choice at a time, until every choice has ended.

        Raises ServiceError as soon as one choice fails, after the tokens that had come. Leaving the iteration
        aborts what still runs.
        """
        tasks = [asyncio.create_task(run.run()) for run in self._runs]
        for task in tasks:
            task.add_done_callback(lambda _: self._outbox.wake())
        try:
            async for deltas in self._until_done(tasks):
                yield deltas
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_done(self, tasks: Sequence[asyncio.Task[None]]) -> AsyncGenerator[list[Delta]]:
        earliest_s = 0.0
        while True:
            done = [task for task in tasks if task.done()]
            deltas = self._outbox.take()
            if deltas:
                yield deltas
                earliest_s = asyncio.get_running_loop().time() + self._limits.stream_interval_s
            for task in done:
                task.result()
            if len(done) == len(tasks):
                return
            await self._outbox.wait(earliest_s)


def _end_stream(stream: TokenStream, call: asyncio.Task[CallEnd]) -> None:
    """The call has ended. The end of its stream, if it has one, takes another way and may still be coming."""
    if call.cancelled() or call.exception() is not None:
        stream.fail("the call has failed")
    elif call.result().finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        stream.fail("the router has ended the request")
    else:
        late = "the request has ended, but its last tokens did not come"
        asyncio.get_running_loop().call_later(LAST_TOKENS_TIMEOUT_S, stream.fail, late)
