"""A client of the HTTP API without a network: plain ASGI around one operation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripted_routers import ScriptedRouters

from cluster.front.admission import ServiceLimits
from cluster.front.generator import Generator, SeedSource
from cluster.front.open_requests import OpenRequests
from cluster.front.openai.api import OpenAiApi
from cluster.front.openai.attendance import attend
from cluster.front.openai.exchange import Exchange
from cluster.front.openai.operations import OPERATIONS
from cluster.front.openai.planning import Planner
from cluster.front.openai.served_model import ServedModel
from cluster.front.relay import RelayLimits
from cluster.front.tokenizer import Tokenizer

LIMITS = ServiceLimits(max_model_len=256, vocab_size=512, max_logprobs=5, max_choices=8, max_request_bytes=100_000)
MODEL = ServedModel(name="llama", created=7, fingerprint="fp_1", max_model_len=256)
TIMEOUT_S = 20.0


def make_api(tokenizer: Tokenizer, routers: ScriptedRouters, requests: OpenRequests | None = None) -> OpenAiApi:
    seeds = SeedSource(1, gateway_index=0)
    generator = Generator(
        tokenizer=tokenizer,
        limits=LIMITS,
        routers=routers,
        tokens=routers,
        relay_limits=RelayLimits(stream_interval_s=0.0, resubmit_timeout_s=5.0),
        seeds=seeds,
        requests=requests,
    )
    planner = Planner(
        generator=generator, tokenizer=tokenizer, seeds=seeds, model=MODEL, max_choices=LIMITS.max_choices
    )
    return OpenAiApi(planner, max_request_bytes=LIMITS.max_request_bytes)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """parts: what was sent, message by message."""

    status: int
    headers: Mapping[str, str]
    parts: Sequence[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json()["error"]

    def events(self) -> list[Any]:
        """The data of each event, but for [DONE], which must be the last."""
        *events, last, rest = self.body.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Connection:
    """One request to one operation."""

    def __init__(
        self, *, parts: Sequence[bytes], is_whole: bool, headers: Mapping[str, str], path_params: Mapping[str, str]
    ) -> None:
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.scope: dict[str, Any] = {"type": "http", "headers": encoded, "path_params": path_params}
        self.sent: list[MutableMapping[str, Any]] = []
        self.gone = asyncio.Event()
        self.begun = asyncio.Event()
        self.num_read = 0
        self._parts = list(parts)
        self._is_whole = is_whole

    async def receive(self) -> MutableMapping[str, Any]:
        if self._parts:
            body = self._parts.pop(0)
            self.num_read += 1
            return {"type": "http.request", "body": body, "more_body": bool(self._parts) or not self._is_whole}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)
        self.begun.set()

    async def serve(self, api: OpenAiApi, operation_name: str) -> None:
        [operation] = [operation for operation in OPERATIONS if operation.name == operation_name]

        async def handle(exchange: Exchange, body: bytes) -> None:
            await operation.handler(api, exchange, body)

        limit = None if operation.request is None else api.max_request_bytes
        async with asyncio.timeout(TIMEOUT_S):
            await attend(Exchange(self.scope, self.receive, self.send), handle, max_body_bytes=limit)

    def answer(self) -> Answer:
        start, *parts = self.sent
        assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(status=start["status"], headers=headers, parts=[part["body"] for part in parts])


def connection(
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    path_params: Mapping[str, str] | None = None,
    parts: Sequence[bytes] | None = None,
    is_whole: bool = True,
) -> Connection:
    """body: sent as JSON, bytes as they are. parts: what is sent instead, message by message, all of it or not."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [data] if parts is None else parts
    return Connection(parts=parts, is_whole=is_whole, headers=headers or {}, path_params=path_params or {})


def ask(api: OpenAiApi, operation_name: str, body: Any = None, **more: Any) -> Answer:
    async def run() -> Answer:
        asked = connection(body, **more)
        await asked.serve(api, operation_name)
        return asked.answer()

    return asyncio.run(run())
