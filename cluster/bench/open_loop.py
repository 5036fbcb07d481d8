"""An open-loop load: every request leaves when it is due, on a connection that is shared, and is timed by message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.bench.stream_timing import StreamTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: greedy, and no token ends it before max_tokens."""

    prompt_ids: Sequence[int]
    max_tokens: int


class AskFailedError(RuntimeError):
    """The service refused, or the answer broke off; the text says how."""


class LoadClient(Protocol):
    """One way to speak to a service."""

    def answer(self, ask: Ask) -> AsyncIterator[int]:
        """How many tokens each message of the answer brings. Raises AskFailedError."""

    async def close(self) -> None: ...


async def run_open_loop(
    client: LoadClient, asks: Sequence[Ask], arrivals: Sequence[float], *, timeout_s: float
) -> list[StreamTiming]:
    """All asks, each at its arrival. timeout_s bounds a single answer; one that is not there by then is an error."""
    start_s = time.monotonic()
    timings = [StreamTiming(due_s=start_s + arrival) for arrival in arrivals]
    async with asyncio.TaskGroup() as group:
        for ask, timing in zip(asks, timings, strict=True):
            await asyncio.sleep(timing.due_s - time.monotonic())
            group.create_task(_attend(client, ask, timing, timeout_s))
    return timings


async def _attend(client: LoadClient, ask: Ask, timing: StreamTiming, timeout_s: float) -> None:
    timing.sent_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            async for count in client.answer(ask):
                timing.messages.append((time.monotonic(), count))
    except TimeoutError:
        timing.error = f"no whole answer within {timeout_s:g} s"
    except AskFailedError as error:
        timing.error = str(error)
    else:
        if timing.num_tokens != ask.max_tokens:
            timing.error = f"{timing.num_tokens} tokens came, {ask.max_tokens} were asked for"
