"""The engine process's main thread: take what the replica sent, step while there is work, pass the outputs on."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from experts.epoch import Epoch
from experts.placement import ShardId
from router.choice_id import log_fields
from router.epoch_pause import EpochPauseMeter
from router.epoch_switch import EpochSwitch
from router.heartbeat import HeartbeatThread
from router.messages import (
    AbandonEpoch,
    Abort,
    Add,
    AdoptEpoch,
    EngineStats,
    EpochPrepared,
    ErrorCode,
    Finished,
    FinishReason,
    FromEngine,
    GenerateRequest,
    LanesChanged,
    PrepareEpoch,
    RequestAttempt,
    SequenceOutput,
    Shutdown,
    ToEngine,
)
from router.token_links import TokenLinks

logger = logging.getLogger(__name__)

# While bytes wait for a gateway that reads slowly, and otherwise: how long the idle loop sleeps between two looks.
_BACKLOG_WAIT_S = 0.01
_IDLE_WAIT_S = 1.0
_FAREWELL_S = 1.0


class Steppable(Protocol):
    """What the loop needs of router.engine.Engine."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: GenerateRequest) -> None:
        """Raises ValueError when the request cannot be served."""

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[SequenceOutput]: ...

    def resume_parked(self) -> None: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine ready to serve. close frees what outlives a step: lanes, mostly. epochs: None where the experts are
    in this process."""

    engine: Steppable
    capacity: str
    close: Callable[[], None]
    epochs: EpochSwitch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    attempt: int
    return_address: str


class EngineLoop:
    """Owns the engine; everything here happens in the thread that calls ``run``."""

    def __init__(
        self,
        *,
        engine: Steppable,
        inbox: SimpleQueue[ToEngine],
        send: Callable[[FromEngine], None],
        links: TokenLinks,
        heartbeat: HeartbeatThread,
        epochs: EpochSwitch | None = None,
    ) -> None:
        """inbox is filled by another thread; send goes to the replica and may be called from any thread."""
        self._engine = engine
        self._inbox = inbox
        self._send = send
        self._links = links
        self._heartbeat = heartbeat
        self._epochs = epochs
        self._pauses = EpochPauseMeter()
        self._told_lanes: LanesChanged | None = None
        self._open: dict[str, OpenRequest] = {}
        self._begun: defaultdict[str, list[RequestAttempt]] = defaultdict(list)

    def run(self) -> None:
        """Until Shutdown: then open requests are aborted and reported. Raises what a step raises."""
        while self._take_messages():
            self._tell_begun()
            if self._engine.has_work:
                self._step()
            self._tell_lanes()
            self._hear_gateways()
        for request_id in tuple(self._open):
            self._abort(request_id)
        self._links.close(_FAREWELL_S)

    def _take_messages(self) -> bool:
        """Handles all that has arrived, waiting for it when there is nothing else to do. False after Shutdown."""
        message = self._next_message()
        while message is not None:
            if isinstance(message, Shutdown):
                return False
            self._handle(message)
            message = self._message_at_hand()
        return True

    def _next_message(self) -> ToEngine | None:
        if self._engine.has_work:
            return self._message_at_hand()
        self._pauses.rests()
        self._heartbeat.update(self._engine.stats())
        try:
            return self._inbox.get(timeout=_BACKLOG_WAIT_S if self._links.have_backlog else _IDLE_WAIT_S)
        except Empty:
            return None

    def _message_at_hand(self) -> ToEngine | None:
        try:
            return self._inbox.get_nowait()
        except Empty:
            return None

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Add(request=request):
                self._add(request)
            case Abort():
                self._abort_attempt(message)
            case PrepareEpoch(epoch=epoch) if self._epochs is not None:
                self._epochs.prepare(Epoch.from_dict(epoch), self._tell_prepared)
            case AdoptEpoch(number=number) if self._epochs is not None:
                self._adopt(self._epochs, number)
            case AbandonEpoch(number=number) if self._epochs is not None:
                self._epochs.abandon(number)
            case _:
                raise AssertionError(f"{type(message).__name__} is no message for a running engine")

    def _adopt(self, epochs: EpochSwitch, number: int) -> None:
        began_s = time.monotonic()
        if epochs.adopt(number):
            self._engine.resume_parked()
            self._pauses.epoch_adopted(number, began_s)

    def _tell_prepared(self, number: int, unreachable: Mapping[ShardId, str]) -> None:
        """In the thread that has opened the last link."""
        reasons = {str(shard_id): reason for shard_id, reason in unreachable.items()}
        self._send(EpochPrepared(number=number, unreachable=reasons))

    def _tell_lanes(self) -> None:
        if self._epochs is None:
            return
        lanes = LanesChanged(epoch=self._epochs.epoch, lost=self._epochs.lost)
        if lanes != self._told_lanes:
            self._told_lanes = lanes
            self._send(lanes)

    def _add(self, request: GenerateRequest) -> None:
        """A newer attempt takes the place of an older one, whose gateway has given it up."""
        opened = self._open.get(request.request_id)
        try:
            if opened is not None and opened.attempt >= request.attempt:
                raise ValueError(f"request_id {request.request_id!r} is open already, attempt {opened.attempt}")
            self._links.open(request.return_address)
            if opened is not None:
                self._abort(request.request_id)
            self._engine.add(request)
        except ValueError as error:
            self._refuse(request, str(error))
            return
        logger.debug(
            "attempt %d begins: %d prompt tokens, %d resumed",
            request.attempt,
            len(request.prompt_ids),
            len(request.resume_ids),
            extra=log_fields(request.request_id),
        )
        self._open[request.request_id] = OpenRequest(attempt=request.attempt, return_address=request.return_address)
        begun = RequestAttempt(request_id=request.request_id, attempt=request.attempt)
        self._begun[request.return_address].append(begun)

    def _refuse(self, request: GenerateRequest, error: str) -> None:
        logger.debug("refused: %s", error, extra=log_fields(request.request_id))
        self._send(
            Finished(
                request_id=request.request_id,
                attempt=request.attempt,
                finish_reason=FinishReason.ERROR,
                error=error,
                error_code=ErrorCode.INVALID_ARGUMENT,
            )
        )

    def _tell_begun(self) -> None:
        """A gateway that has given a request up meanwhile shall not have to wait for its first token to say so."""
        for address, begun in self._begun.items():
            self._links.tell_begun(address, begun)
        self._begun.clear()

    def _step(self) -> None:
        self._heartbeat.step_begins()
        began_s = time.monotonic()
        outputs = self._engine.step()
        pause = self._pauses.step_ended(began_s, time.monotonic())
        self._heartbeat.step_ended()
        self._deliver(outputs)
        if pause is not None:
            logger.info("%s", pause.sentence)
        if self._heartbeat.is_due:
            self._heartbeat.update(self._engine.stats())

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        """Tokens first, then the ends of requests."""
        by_address: defaultdict[str, list[SequenceOutput]] = defaultdict(list)
        for output in outputs:
            by_address[self._open[output.request_id].return_address].append(output)
        for address, batch in by_address.items():
            for too_large in self._links.send(address, batch):
                self._end_too_large(address, too_large)
        for output in outputs:
            if output.finish_reason is not None and output.request_id in self._open:
                self._finish(output)

    def _end_too_large(self, address: str, output: SequenceOutput) -> None:
        self._engine.abort(output.request_id)
        error = "the answer to one step is larger than a gateway takes: ask for fewer logprobs"
        ended = SequenceOutput(
            request_id=output.request_id,
            attempt=output.attempt,
            finish_reason=FinishReason.ERROR,
            error=error,
            error_code=ErrorCode.INVALID_ARGUMENT,
        )
        self._links.send(address, [ended])
        self._finish(ended)

    def _finish(self, output: SequenceOutput) -> None:
        assert output.finish_reason is not None
        del self._open[output.request_id]
        logger.debug("ended: %s", output.error or output.finish_reason, extra=log_fields(output.request_id))
        self._send(
            Finished(
                request_id=output.request_id,
                attempt=output.attempt,
                finish_reason=output.finish_reason,
                error=output.error,
                error_code=output.error_code,
            )
        )

    def _abort(self, request_id: str, error: str | None = None) -> None:
        """error: why, where the client did not ask for it."""
        opened = self._open.pop(request_id)
        logger.debug("aborted: %s", error or "as told", extra=log_fields(request_id))
        self._engine.abort(request_id)
        self._send(
            Finished(
                request_id=request_id,
                attempt=opened.attempt,
                finish_reason=FinishReason.ABORT,
                error=error,
                error_code=None if error is None else ErrorCode.UNAVAILABLE,
            )
        )

    def _abort_attempt(self, abort: Abort, gateway: str | None = None) -> None:
        """gateway: the address of the one that asks for it; each can end its own requests alone."""
        opened = self._open.get(abort.request_id)
        if opened is None or opened.attempt != abort.attempt:
            return
        if gateway is None or gateway == opened.return_address:
            self._abort(abort.request_id)

    def _hear_gateways(self) -> None:
        """Ends what they want no more, and requests whose gateway is gone, does not read or could not be reached: who
        should hear the answer?"""
        lost = self._links.poll()
        for address, abort in self._links.take_aborts():
            self._abort_attempt(abort, address)
        if not lost:
            return
        for address, reason in lost.items():
            num_open = sum(opened.return_address == address for opened in self._open.values())
            logger.warning("gateway %s is lost, its %d requests are aborted: %s", address, num_open, reason)
        for request_id, opened in tuple(self._open.items()):
            if opened.return_address in lost:
                self._abort(request_id, lost[opened.return_address])
