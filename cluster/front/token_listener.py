"""The gateway's end of the token path: routers connect here and send one TokenBatch per step.

Only a router that knows the cluster secret gets past the opening (router/token_opening.py), and only then is
anything of a size it names allocated, up to a limit. Everything runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import msgspec

from cluster.front.token_stream import TokenStream
from experts.opening import ANSWER_BYTES, OpeningError
from router.messages import TokenBatch, decode_token_batch
from router.token_opening import LENGTH, MAX_BATCH_BYTES, check_router, make_challenge, make_welcome

logger = logging.getLogger(__name__)

StreamKey = tuple[str, int]


class TokenListener:
    """Listens on a port of the system's choice. ``start`` it, then ``open`` a stream before its request is sent."""

    def __init__(
        self, *, host: str, secret: bytes, opening_timeout_s: float = 5.0, max_batch_bytes: int = MAX_BATCH_BYTES
    ) -> None:
        """host: this node's address as routers reach it. Raises ValueError for an empty secret."""
        if not secret:
            raise ValueError("secret is empty: routers must be able to prove themselves")
        self.num_late_outputs = 0
        self.num_refused = 0
        self._host = host
        self._secret = secret
        self._opening_timeout_s = opening_timeout_s
        self._max_batch_bytes = max_batch_bytes
        self._streams: dict[StreamKey, TokenStream] = {}
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._address = ""

    @property
    def address(self) -> str:
        """The return_address for requests. Empty before ``start``."""
        return self._address

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    async def start(self) -> None:
        """Raises OSError when it cannot listen on host."""
        self._server = await asyncio.start_server(self._serve, self._host, 0, limit=1 << 20)
        port = self._server.sockets[0].getsockname()[1]
        self._address = f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    def open(self, request_id: str, attempt: int) -> TokenStream:
        """Raises ValueError when this attempt has a stream already."""
        key = (request_id, attempt)
        if key in self._streams:
            raise ValueError(f"request_id {request_id!r} attempt {attempt} has a stream already")
        stream = TokenStream(request_id=request_id, attempt=attempt, on_close=lambda: self._forget(key, stream))
        self._streams[key] = stream
        return stream

    async def close(self) -> None:
        """Hangs up on all routers; open streams break. Idempotent."""
        if self._server is not None:
            self._server.close()
            connections = dict(self._connections)
            for writer in connections:
                writer.transport.abort()
            await asyncio.gather(*connections.values())
            await self._server.wait_closed()
            self._server = None
        for stream in tuple(self._streams.values()):
            stream.fail("this gateway is closing")

    def _forget(self, key: StreamKey, stream: TokenStream) -> None:
        if self._streams.get(key) is stream:
            del self._streams[key]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One router's connection, from its first byte to its last."""
        task = asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        router_id = "a router"
        try:
            async with asyncio.timeout(self._opening_timeout_s):
                router_id = await self._admit(reader, writer)
            while True:
                self._deliver(await self._read_batch(reader), writer)
        except (OpeningError, msgspec.ValidationError, TimeoutError) as error:
            self.num_refused += 1
            logger.warning("token connection of %s refused: %s", router_id, error or "it did not open in time")
        except (asyncio.IncompleteReadError, OSError):
            logger.info("token connection of %s has ended", router_id)
        finally:
            del self._connections[writer]
            self._break(writer, f"the token connection of {router_id} was lost")
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        challenge = make_challenge()
        writer.write(challenge)
        answer = await reader.readexactly(ANSWER_BYTES)
        router_id = check_router(answer, challenge=challenge, secret=self._secret, address=self._address)
        writer.write(make_welcome(challenge=challenge, answer=answer, secret=self._secret))
        return router_id

    async def _read_batch(self, reader: asyncio.StreamReader) -> TokenBatch:
        """Raises msgspec.ValidationError for what is no batch or too large to be one."""
        (num_bytes,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if num_bytes > self._max_batch_bytes:
            raise msgspec.ValidationError(f"a batch of {num_bytes} bytes, the limit is {self._max_batch_bytes}")
        return decode_token_batch(await reader.readexactly(num_bytes))

    def _deliver(self, batch: TokenBatch, connection: asyncio.StreamWriter) -> None:
        for output in batch.outputs:
            stream = self._streams.get((output.request_id, output.attempt))
            if stream is None:
                self.num_late_outputs += 1
            else:
                stream.put(output, connection, batch.router_id)

    def _break(self, connection: asyncio.StreamWriter, reason: str) -> None:
        """Tells the streams that this connection has fed; others may still hear of their router elsewhere."""
        for stream in self._streams.values():
            if stream.feeder is connection:
                stream.fail(reason)
