"""A router as its Serve replica has it: one engine process, its requests, its health. No Ray and no torch in here;
cluster/router_replica.py joins the service and forwards."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from router.choice_id import log_fields
from router.engine_client import EngineClient, EngineDiedError
from router.engine_watch import EngineWatch
from router.lane_state import EpochOffer, LaneState, next_messages
from router.messages import (
    EngineStats,
    ErrorCode,
    Finished,
    FinishReason,
    GenerateRequest,
    Ready,
    Start,
    decode_request,
    encode,
)

logger = logging.getLogger(__name__)

__all__ = ["EngineDiedError", "Router", "RouterTimeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTimeouts:
    """start_s: until the engine is ready. doubt_s: silence after which its requests are given up, for others to take.
    heartbeat_s: silence after which it is ill. step_s: a step that takes longer hangs; it must allow for lost shards
    that are waited for. Both are named in the log before, after silent_s and slow_step_s. close_s: for each way of
    ending the process."""

    start_s: float
    doubt_s: float = 1.3
    silent_s: float = 3.0
    heartbeat_s: float = 60.0
    slow_step_s: float = 10.0
    step_s: float = 300.0
    close_s: float = 3.0


# Between two looks at a silent engine.
LOOK_S = 0.1


class Router:
    """Made, then started once. ``generate`` may be called by many tasks at once."""

    def __init__(
        self,
        *,
        timeouts: RouterTimeouts,
        on_death: Callable[[str], None] | None = None,
        on_lanes: Callable[[], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
        name: str = "",
        module: str = "router.process",
    ) -> None:
        """Starts the process. on_death hears, from another thread, why a ready engine ended before ``close``;
        on_lanes, likewise, that ``lanes`` has changed; on_doubt, in the event loop, that ``is_doubted`` has. name: see
        messages.Finished.suspect.

        Raises OSError when the process cannot be started.
        """
        self._timeouts = timeouts
        self._name = name
        self._on_doubt = on_doubt
        self._closing = threading.Event()
        self._minding: asyncio.Task[None] | None = None
        self._on_death = on_death
        self._is_ready = threading.Event()
        self._watch = EngineWatch(silent_after_s=timeouts.silent_s, slow_after_s=timeouts.slow_step_s)
        self._client = EngineClient(on_death=self._tell_death, on_lanes=on_lanes, module=module)

    @property
    def is_doubted(self) -> bool:
        """The engine is silent, and requests should go elsewhere until it speaks again."""
        return self._client.is_doubted

    @property
    def engine_pid(self) -> int:
        return self._client.pid

    @property
    def stats(self) -> EngineStats | None:
        """Of the last heartbeat, at most a second old; None before the first."""
        return self._client.stats()

    @property
    def step_s(self) -> float:
        """How long the engine's step under way has taken, by the last heartbeat; 0 between steps."""
        return 0.0 if self._client.heartbeat is None else self._client.heartbeat.step_s

    @property
    def lanes(self) -> LaneState:
        """Which epoch the engine uses, which it could adopt, and whom it does without."""
        return self._client.lanes

    def follow(self, offer: EpochOffer) -> None:
        """Leads the engine towards what the controller offers, a message at a time. Repeating it does no harm."""
        for message in next_messages(self._client.lanes, offer):
            self._client.guide(message)

    async def start(self, start: Start) -> Ready:
        """Returns when the engine serves. Raises EngineDiedError saying why it does not; the process is then gone."""
        try:
            ready = await asyncio.to_thread(self._client.start, start, self._timeouts.start_s)
        except BaseException:
            await asyncio.to_thread(self.close)
            raise
        self._is_ready.set()
        # Kept: the event loop itself holds no task.
        self._minding = asyncio.create_task(self._mind_silence())
        logger.info("%s is ready, engine process %d: %s", start.router_id, ready.pid, ready.capacity)
        return ready

    async def generate(self, request: bytes) -> bytes:
        """An encoded GenerateRequest in; an encoded Finished out when it has ended with this engine.

        The tokens go to the request's return_address meanwhile. Their way is another one: the call may end before
        the last of them arrives, so what ends a request is the finish_reason among its tokens. The call tells what
        no token can: a request refused at once (ERROR, nothing was sent), given up because its gateway could not
        be reached or the engine is silent or gone (ABORT with an error): then submit it elsewhere.
        Cancelling the call aborts the request.
        """
        try:
            decoded = decode_request(request)
        except msgspec.DecodeError as error:
            return encode(_refusal(str(error)))
        logger.debug("to the engine: attempt %d", decoded.attempt, extra=log_fields(decoded.request_id))
        try:
            finished = await self._client.generate(decoded)
        except EngineDiedError as error:
            return encode(_lost(decoded, str(error), self._name))
        if self._client.is_doubted:
            finished = msgspec.structs.replace(finished, suspect=self._name)
        logger.debug("the engine has ended it: %s", finished.finish_reason, extra=log_fields(decoded.request_id))
        return encode(finished)

    def check_health(self) -> None:
        """Raises EngineDiedError when the engine has ended, is silent, or hangs in a step; logs what may become one
        of these. To be called about once a second."""
        silence_s, heartbeat = self._client.silence_s, self._client.heartbeat
        for complaint in self._watch.complaints(silence_s=silence_s, heartbeat=heartbeat):
            logger.warning("%s; open: %s", complaint, self._client.oldest_open())
        self._client.check_health(heartbeat_timeout_s=self._timeouts.heartbeat_s, step_timeout_s=self._timeouts.step_s)

    def close(self) -> None:
        """Ends the engine process, its requests first, and returns when it is gone. Idempotent."""
        self._closing.set()
        self._client.close(self._timeouts.close_s)

    async def _mind_silence(self) -> None:
        """Doubts an engine that has been silent for doubt_s, until it speaks again. A look that comes late counts as
        one: then it is this process that was stopped."""
        heard_at, num_looks = 0.0, 0
        while not self._closing.is_set():
            await asyncio.sleep(LOOK_S)
            num_looks = num_looks + 1 if self._client.heard_at == heard_at else 0
            heard_at = self._client.heard_at
            is_silent = num_looks * LOOK_S >= self._timeouts.doubt_s
            if is_silent == self._client.is_doubted:
                continue
            if is_silent:
                why = f"engine process {self._client.pid} has been silent for {self._client.silence_s:.1f} s"
                logger.warning("%s: its requests go elsewhere; open: %s", why, self._client.oldest_open())
                self._client.doubt(why)
            else:
                logger.info("engine process %d speaks again", self._client.pid)
                self._client.trust()
            if self._on_doubt is not None:
                self._on_doubt()

    def _tell_death(self, reason: str) -> None:
        if self._is_ready.is_set() and self._on_death is not None:
            self._on_death(reason)


def _lost(request: GenerateRequest, error: str, name: str) -> Finished:
    return Finished(
        request_id=request.request_id,
        attempt=request.attempt,
        finish_reason=FinishReason.ABORT,
        error=error,
        suspect=name,
    )


def _refusal(error: str) -> Finished:
    """For what is no request and so has no id."""
    return Finished(
        request_id="",
        attempt=0,
        finish_reason=FinishReason.ERROR,
        error=error,
        error_code=ErrorCode.INVALID_ARGUMENT,
    )
