"""Routers and token path that follow a script: real journals and real streams, no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.front.relay import CallEnd, RouterLostError
from cluster.front.token_stream import TokenStream
from router.messages import FinishReason, GenerateRequest, SequenceOutput

NUM_TOKENS = 6
STOPPED = CallEnd(finish_reason=FinishReason.LENGTH)

Script = Callable[["Attempt"], Awaitable[CallEnd]]


@dataclass
class Attempt:
    """One call of a router, the stream its tokens go to, and the connection that feeds it."""

    request: GenerateRequest
    stream: TokenStream
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    router_id: str = "router-scripted"

    def abort(self, request_id: str, attempt: int) -> None:
        assert (request_id, attempt) == (self.request.request_id, self.request.attempt)
        self.aborted.set()

    def send(self, *token_ids: int, finish_reason: FinishReason | None = None, **fields: Any) -> None:
        output = SequenceOutput(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            token_ids=list(token_ids),
            finish_reason=finish_reason,
            **fields,
        )
        self.stream.put(output, self)

    def send_rest(self) -> None:
        """Token i of a choice is 100 * choice + i, whoever computes it: what a seed does for real ones."""
        base = 100 * self.request.params.choice_index
        rest = range(base + len(self.request.resume_ids), base + NUM_TOKENS)
        self.send(*rest, finish_reason=FinishReason.LENGTH)


@dataclass
class ScriptedRouters:
    """Routers and token path in one. Call i follows script i; the last script is followed for ever."""

    scripts: list[Script]
    address: str = "gateway:1"
    requests: list[GenerateRequest] = field(default_factory=list)
    num_aborted: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    streams: dict[tuple[str, int], TokenStream] = field(default_factory=dict)

    def open(self, request_id: str, attempt: int) -> TokenStream:
        key = (request_id, attempt)
        stream = TokenStream(request_id=request_id, attempt=attempt, on_close=lambda: self.streams.pop(key))
        self.streams[key] = stream
        return stream

    async def generate(self, request: GenerateRequest) -> CallEnd:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        self.attempts.append(Attempt(request, self.streams[request.request_id, request.attempt]))
        try:
            return await script(self.attempts[-1])
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise


async def serve_whole(attempt: Attempt) -> CallEnd:
    attempt.send_rest()
    return STOPPED


async def serve_two_then_die(attempt: Attempt) -> CallEnd:
    first = len(attempt.request.resume_ids)
    attempt.send(first, first + 1)
    await asyncio.sleep(0)
    raise RouterLostError("killed")
