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
from router.messages import EngineStats, ErrorCode, Finished, FinishReason, Ready, Start, decode_request, encode

logger = logging.getLogger(__name__)

__all__ = ["EngineDiedError", "Router", "RouterTimeouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTimeouts:
    """start_s: until the engine is ready. heartbeat_s: silence after which it is ill. step_s: a step that takes
    longer hangs; it must allow for lost shards that are waited for. Both are named in the log before, after silent_s
    and slow_step_s. close_s: for each way of ending the process."""

    start_s: float
    silent_s: float = 3.0
    heartbeat_s: float = 10.0
    slow_step_s: float = 10.0
    step_s: float = 300.0
    close_s: float = 3.0


class Router:
    """Made, then started once. ``generate`` may be called by many tasks at once."""

    def __init__(
        self,
        *,
        timeouts: RouterTimeouts,
        on_death: Callable[[str], None] | None = None,
        on_lanes: Callable[[], None] | None = None,
        module: str = "router.process",
    ) -> None:
        """Starts the process. on_death hears, from another thread, why a ready engine ended before ``close``;
        on_lanes, likewise, that ``lanes`` has changed.

        Raises OSError when the process cannot be started.
        """
        self._timeouts = timeouts
        self._on_death = on_death
        self._is_ready = threading.Event()
        self._watch = EngineWatch(silent_after_s=timeouts.silent_s, slow_after_s=timeouts.slow_step_s)
        self._client = EngineClient(on_death=self._tell_death, on_lanes=on_lanes, module=module)

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
        logger.info("%s is ready, engine process %d: %s", start.router_id, ready.pid, ready.capacity)
        return ready

    async def generate(self, request: bytes) -> bytes:
        """An encoded GenerateRequest in; an encoded Finished out when it has ended with this engine.

        The tokens go to the request's return_address meanwhile. Their way is another one: the call may end before
        the last of them arrives, so what ends a request is the finish_reason among its tokens. The call tells what
        no token can: a request refused at once (ERROR, nothing was sent), given up because its gateway could not
        be reached (ABORT with an error), or lost with its engine (raises EngineDiedError; submit it elsewhere).
        Cancelling the call aborts the request.
        """
        try:
            decoded = decode_request(request)
        except msgspec.DecodeError as error:
            return encode(_refusal(str(error)))
        logger.debug("to the engine: attempt %d", decoded.attempt, extra=log_fields(decoded.request_id))
        finished = await self._client.generate(decoded)
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
        self._client.close(self._timeouts.close_s)

    def _tell_death(self, reason: str) -> None:
        if self._is_ready.is_set() and self._on_death is not None:
            self._on_death(reason)


def _refusal(error: str) -> Finished:
    """For what is no request and so has no id."""
    return Finished(
        request_id="",
        attempt=0,
        finish_reason=FinishReason.ERROR,
        error=error,
        error_code=ErrorCode.INVALID_ARGUMENT,
    )
