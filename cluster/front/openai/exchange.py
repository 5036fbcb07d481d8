"""One HTTP request and its response, over plain ASGI."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from cluster.front.openai.api_error import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Nginx's word for a client that went before it was answered; nobody sees it but Serve's logs.
CLIENT_CLOSED_REQUEST = 499
JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.has_begun = False

    @property
    def root_path(self) -> str:
        """Where the application is mounted: empty, or like /name."""
        return str(self._scope.get("root_path", ""))

    @property
    def path_parameters(self) -> Mapping[str, str]:
        parameters: Mapping[str, str] = self._scope.get("path_params", {})
        return parameters

    def request_id(self) -> str:
        """The client's X-Request-Id, else a new one. Serve's proxy puts it into the response. Raises ApiError."""
        given = self._header(REQUEST_ID_HEADER)
        if given is None:
            return secrets.token_hex(16)
        if not REQUEST_ID.fullmatch(given):
            rule = "must be 1 to 128 letters, digits, '.', '_', ':' or '-'"
            raise ApiError(400, f"X-Request-Id: {rule}, not {given[:80]!r}", param="X-Request-Id")
        return given

    async def read_body(self, *, max_bytes: int, timeout_s: float) -> bytes:
        """Nothing above max_bytes is kept. Raises ApiError (408, 413), ClientGoneError."""
        declared = self._header("content-length")
        if declared is not None and declared.isdecimal() and int(declared) > max_bytes:
            raise _too_large(max_bytes, declared)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read_all(max_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {timeout_s:g} s") from None

    async def _read_all(self, max_bytes: int) -> bytes:
        body = bytearray()
        while True:
            message = await self._next_message()
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise _too_large(max_bytes, f"at least {len(body)}")
            if not message.get("more_body", False):
                return bytes(body)

    async def wait_until_gone(self) -> None:
        """Raises ClientGoneError when the client has gone. Must not run along with read_body."""
        while True:
            await self._next_message()

    async def _next_message(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    async def respond(
        self, body: bytes, *, status: int = 200, content_type: str = JSON, headers: Mapping[str, str] | None = None
    ) -> None:
        """The whole response."""
        length = {"content-length": str(len(body))}
        await self._begin(status, {"content-type": content_type, **length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def send_events(self, data: bytes, *, more: bool = True) -> None:
        """A part of a stream of server-sent events; the first begins the response."""
        if not self.has_begun:
            await self._begin(200, {"content-type": EVENTS, "cache-control": "no-cache", "x-accel-buffering": "no"})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def end_unheard(self) -> None:
        """For a client that has gone: Serve's proxy wants to see a response all the same."""
        if not self.has_begun:
            await self.respond(b"", status=CLIENT_CLOSED_REQUEST)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.has_begun = True
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    def _header(self, name: str) -> str | None:
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self._scope["headers"] if key == wanted), None)


def _too_large(max_bytes: int, size: str) -> ApiError:
    return ApiError(413, f"the body has {size} bytes, the limit is {max_bytes}")
