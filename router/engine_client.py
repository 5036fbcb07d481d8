"""The replica's side of an engine process: requests as awaitable calls, and whether the engine is well."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from router.engine_child import EngineChild
from router.lane_state import LaneState
from router.messages import (
    AbandonEpoch,
    Abort,
    Add,
    AdoptEpoch,
    EngineStats,
    EpochPrepared,
    Failed,
    Finished,
    FinishReason,
    FromEngine,
    GenerateRequest,
    Heartbeat,
    LanesChanged,
    PrepareEpoch,
    Ready,
    Start,
)


class EngineDiedError(RuntimeError):
    """The engine process cannot start, has ended, or does not answer. Its requests may be submitted elsewhere."""


class EngineClient:
    """One engine process and the calls that are open on it. Methods may be called from any thread."""

    def __init__(
        self,
        *,
        on_death: Callable[[str], None] | None = None,
        on_lanes: Callable[[], None] | None = None,
        module: str = "router.process",
    ) -> None:
        """Starts the process, not yet the engine. on_death hears why it ended, once, and on_lanes that ``lanes`` has
        changed, both from another thread.

        Raises OSError when the process cannot be started.
        """
        self._on_death = on_death
        self._on_lanes = on_lanes
        self._lanes = LaneState()
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], Future[Finished]] = {}
        self._death: str | None = None
        self._doubt: str | None = None
        self._ready: Future[Ready] = Future()
        self._heartbeat: Heartbeat | None = None
        self._heard_at = time.monotonic()
        self._child = EngineChild(on_message=self._take, on_death=self._die, module=module)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def num_open(self) -> int:
        return len(self._open)

    def oldest_open(self, at_most: int = 3) -> str:
        """The calls that have been open for longest, for a log line; "none" where there are none."""
        with self._lock:
            names = [request_id for request_id, _attempt in self._open]
        more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
        return ", ".join(names[:at_most]) + more if names else "none"

    def start(self, start: Start, timeout_s: float) -> Ready:
        """Builds the engine. Raises EngineDiedError, with the engine's own reason where it has one; then close it."""
        self._child.send(start)
        try:
            return self._ready.result(timeout_s)
        except FutureTimeoutError:
            raise EngineDiedError(f"the engine is not ready after {timeout_s} s") from None

    async def generate(self, request: GenerateRequest) -> Finished:
        """Ends when the request has, or when the engine is doubted. Cancelling it aborts the request. Raises
        EngineDiedError, or ValueError for a request_id and attempt that are open already."""
        key = (request.request_id, request.attempt)
        future = self._register(key)
        if future.done():
            return future.result()
        try:
            self._child.send(Add(request=request))
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._child.send(Abort(request_id=request.request_id, attempt=request.attempt))
            raise
        finally:
            with self._lock:
                self._open.pop(key, None)

    def doubt(self, why: str) -> None:
        """Gives up the open calls, and takes none, until ``trust``. What the engine still does for them it ends when
        it hears of it."""
        with self._lock:
            self._doubt = why
            open_calls, self._open = self._open, {}
        for key, future in open_calls.items():
            self._child.send(Abort(request_id=key[0], attempt=key[1]))
            future.set_result(_given_up(key, why))

    def trust(self) -> None:
        self._doubt = None

    @property
    def is_doubted(self) -> bool:
        return self._doubt is not None

    @property
    def lanes(self) -> LaneState:
        """As the engine has told last."""
        return self._lanes

    def guide(self, message: PrepareEpoch | AdoptEpoch | AbandonEpoch) -> None:
        """Leads the engine to another epoch. Does not wait; ``lanes`` shows what comes of it."""
        if isinstance(message, AbandonEpoch):
            self._lanes = self._lanes.without(message.number)
        self._child.send(message)

    def stats(self) -> EngineStats | None:
        """Of the last heartbeat; None before the first."""
        return None if self._heartbeat is None else self._heartbeat.stats

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The last one; None before the first."""
        return self._heartbeat

    @property
    def heard_at(self) -> float:
        """When anything was last heard of the engine process, by time.monotonic()."""
        return self._heard_at

    @property
    def silence_s(self) -> float:
        """Since then."""
        return time.monotonic() - self._heard_at

    def check_health(self, *, heartbeat_timeout_s: float, step_timeout_s: float) -> None:
        """Raises EngineDiedError when the engine has ended, has been silent for too long, or hangs in a step."""
        if self._death is not None:
            raise EngineDiedError(self._death)
        silence_s = self.silence_s
        if silence_s > heartbeat_timeout_s:
            raise EngineDiedError(f"engine process {self.pid} has sent no heartbeat for {silence_s:.1f} s")
        if self._heartbeat is not None and self._heartbeat.step_s > step_timeout_s:
            raise EngineDiedError(
                f"engine process {self.pid} hangs in step {self._heartbeat.step} since {self._heartbeat.step_s:.1f} s"
            )

    def close(self, timeout_s: float) -> None:
        """Ends the process: asked, told, killed, each after timeout_s. Idempotent."""
        self._on_death = None
        self._child.close(timeout_s)

    def _register(self, key: tuple[str, int]) -> Future[Finished]:
        """Done already, and not open, where the engine is doubted."""
        with self._lock:
            if self._death is not None:
                raise EngineDiedError(self._death)
            if key in self._open:
                raise ValueError(f"request_id {key[0]!r} attempt {key[1]} is open already")
            future: Future[Finished] = Future()
            if self._doubt is not None:
                future.set_result(_given_up(key, self._doubt))
                return future
            # From here on only the engine ends it: a cancelled caller leaves it behind.
            future.set_running_or_notify_cancel()
            self._open[key] = future
            return future

    def _take(self, message: FromEngine) -> None:
        self._heard_at = time.monotonic()
        match message:
            case Ready():
                self._ready.set_result(message)
            case Heartbeat():
                self._heartbeat = message
            case Finished():
                with self._lock:
                    future = self._open.pop((message.request_id, message.attempt), None)
                if future is not None:
                    future.set_result(message)
            case EpochPrepared() | LanesChanged():
                self._lanes = self._lanes.after(message)
                if self._on_lanes is not None:
                    self._on_lanes()
            case Failed():
                pass  # The process ends now; its death carries the reason.

    def _die(self, reason: str) -> None:
        with self._lock:
            self._death = reason
            orphans, self._open = list(self._open.values()), {}
        if not self._ready.done():
            self._ready.set_exception(EngineDiedError(reason))
        for future in orphans:
            future.set_exception(EngineDiedError(reason))
        if self._on_death is not None:
            self._on_death(reason)


def _given_up(key: tuple[str, int], why: str) -> Finished:
    return Finished(request_id=key[0], attempt=key[1], finish_reason=FinishReason.ABORT, error=why)
